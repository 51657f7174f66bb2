"""Ridge regression as a classifier on features: a probe of what a network's features say about images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from domainstudio.errors import DataError
from domainstudio.metrics.distances import Float64s, Floats

STRENGTHS = np.logspace(-4, 2, 13)
"""Ridge strengths that are tried, as multiples of the features' mean variance."""

ZERO = 1e-10
"""Directions with less than this share of the largest variance are left out."""


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear classifier.

    Attributes:
        classes: Names of the K classes.
        offset: Mean of the features, with shape (D,).
        weights: With shape (D, K).
        bias: With shape (K,).
        held_out: Scores of the images that it was fitted to, each by the fit without it, with shape (N, K).
        labels: Position in `classes` of each of those images, with shape (N,).
    """

    classes: tuple[str, ...]
    offset: Float64s
    weights: Float64s
    bias: Float64s
    held_out: Float64s
    labels: np.ndarray

    def scores(self, rows: Floats) -> Float64s:
        """Return the score of each class for rows with shape (M, D); shape (M, K)."""
        found: Float64s = (rows - self.offset) @ self.weights + self.bias
        return found

    def predict(self, rows: Floats) -> list[str]:
        """Return the class with the highest score for each row."""
        return [self.classes[index] for index in self.scores(rows).argmax(axis=1)]

    @property
    def accuracy(self) -> float:
        """Share of the images that it was fitted to that the fit without them gets right."""
        return float((self.held_out.argmax(axis=1) == self.labels).mean())


class Ridge:
    """Rows of features, decomposed once: probes of several labels then cost little.

    The least squares fit of K indicators with a penalty on the weights has a closed form. It holds for any
    number of features, and its direction for two classes is that of the ridge-regularised linear discriminant
    (Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, sections 3.4.1 and 4.3).
    """

    def __init__(self, rows: Floats) -> None:
        """Decompose rows with shape (N, D), N ≥ 2.

        Raises:
            DataError: there are fewer than 2 rows.
        """
        if len(rows) < 2:
            raise DataError(f"a probe needs at least 2 images, got {len(rows)}")
        everything = rows.astype(np.float64)
        self._offset = everything.mean(axis=0)
        centred = everything - self._offset
        self._squares, self._axes, self._rotated = _decomposed(centred)

    def fit(self, labels: Sequence[str]) -> Probe:
        """Fit a probe, at the strength with the smallest leave-one-out error.

        The prediction of a row by the fit without it is y − (y − ŷ) / (1 − h), with h its leverage (Allen's
        PRESS, Technometrics 16, 1974): no fit is done twice.

        Args:
            labels: The class of each row.

        Raises:
            DataError: labels and rows are not equally many.
        """
        number = len(self._rotated)
        if len(labels) != number:
            raise DataError(f"a probe needs a label per image, got {len(labels)} for {number}")
        classes, positions = np.unique(np.asarray(labels), return_inverse=True)
        indicators = np.eye(len(classes))[positions]
        bias = indicators.mean(axis=0)
        products = self._rotated.T @ (indicators - bias)
        scale = self._squares.sum() / len(self._offset)
        tried = [self._held_out(strength * scale, indicators, bias, products) for strength in STRENGTHS]
        best = int(np.argmin([((held - indicators) ** 2).sum() for held in tried]))
        shrunk = products / (self._squares + STRENGTHS[best] * scale)[:, None]
        names = tuple(str(name) for name in classes)
        return Probe(names, self._offset, self._axes @ shrunk, bias, tried[best], positions)

    def _held_out(self, penalty: float, indicators: Float64s, bias: Float64s, products: Float64s) -> Float64s:
        factors = 1 / (self._squares + penalty)
        fitted = self._rotated @ (products * factors[:, None]) + bias
        leverage = (self._rotated**2) @ factors + 1 / len(self._rotated)
        held: Float64s = indicators - (indicators - fitted) / np.maximum(1 - leverage, ZERO)[:, None]
        return held


def _decomposed(centred: Float64s) -> tuple[Float64s, Float64s, Float64s]:
    """Return squared singular values (R,), right singular vectors (D, R), and the rows in them (N, R)."""
    wide = len(centred) < centred.shape[1]
    squares, vectors = np.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    kept = squares > ZERO * max(squares[-1], np.finfo(np.float64).tiny)
    squares, vectors = squares[kept], vectors[:, kept]
    if not wide:
        return squares, vectors, centred @ vectors
    values = np.sqrt(squares)
    return squares, (centred.T @ vectors) / values, vectors * values
