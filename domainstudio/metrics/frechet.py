"""The Fréchet distance between Gaussians fitted to two sets of features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from domainstudio.errors import DataError
from domainstudio.metrics.distances import Float64s, Floats
from domainstudio.metrics.metric import Figure, Measured, Metric, Scores


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean and covariance of a set of features, all that the Fréchet distance needs of it.

    Attributes:
        mean: float64 with shape (D,).
        factor: float64 with shape (R, D), R = min(N, D): the covariance is factorᵀ factor.
    """

    mean: Float64s
    factor: Float64s

    @property
    def covariance(self) -> Float64s:
        """Unbiased covariance, with shape (D, D)."""
        return self.factor.T @ self.factor


def gaussian(features: Floats) -> Gaussian:
    """Fit a Gaussian to rows of features, in float64.

    Args:
        features: Rows with shape (N, D), N ≥ 2.

    Raises:
        DataError: there are fewer than 2 rows, or values that are not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise DataError(f"a covariance needs at least 2 images, got features of shape {features.shape}")
    if not np.isfinite(features).all():
        raise DataError("features are not finite: check the feature network and the images")
    rows = features.astype(np.float64)
    mean = rows.mean(axis=0)
    centred = (rows - mean) / np.sqrt(len(rows) - 1)
    if len(rows) > rows.shape[1]:
        centred = np.asarray(np.linalg.qr(centred, mode="r"))
    return Gaussian(mean, centred)


def frechet_distance_of(a: Gaussian, b: Gaussian) -> float:
    """Return the squared 2-Wasserstein distance of two Gaussians (Dowson and Landau 1982; FID's formula).

        d = ‖μ_a − μ_b‖² + tr Σ_a + tr Σ_b − 2 tr (Σ_a Σ_b)^½

    With Σ = FᵀF the nonzero eigenvalues of Σ_a Σ_b are those of (F_a F_bᵀ)(F_a F_bᵀ)ᵀ, so the last trace
    is the sum of the singular values of F_a F_bᵀ. That needs no square root of a matrix that is singular
    whenever there are fewer images than features, and cannot turn complex.
    """
    means = float(((a.mean - b.mean) ** 2).sum())
    traces = float((a.factor**2).sum() + (b.factor**2).sum())
    cross = float(np.linalg.svd(a.factor @ b.factor.T, compute_uv=False).sum())
    return max(0.0, means + traces - 2 * cross)


def frechet_distance(a: Floats, b: Floats) -> float:
    """Return the Fréchet distance between two sets of features.

    Small sets overestimate it, the more the smaller they are: compare only distances of equally many
    images against the same reference, and never with published FID, which has another network and
    usually thousands of images.

    Args:
        a: Rows with shape (N, D), N ≥ 2.
        b: Rows with shape (M, D), M ≥ 2.

    Raises:
        DataError: a set has fewer than 2 rows, or values that are not finite.
    """
    return frechet_distance_of(gaussian(a), gaussian(b))


def _scores(measured: Measured) -> Scores:
    if measured.fewest < 2:
        return {}
    return {"frechet_distance": frechet_distance(measured.images.pooled, measured.reference.pooled)}


METRIC = Metric(
    _scores,
    (
        Figure(
            "frechet_distance",
            "Fréchet distance",
            "lower",
            "How far the samples are, as a cloud of features, from real images of the domain. Too few images "
            "push it up, so only equal numbers of images compare.",
        ),
    ),
)
