"""The Fréchet distance between Gaussians fitted to two sets of features, also for infinitely many images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from domainstudio.errors import DataError
from domainstudio.metrics.distances import Float64s, Floats
from domainstudio.metrics.metric import Figure, Indices, Measured, Metric, Scores, Statistic, undefined

SPLITS = 3
"""Random splits into halves that the extrapolation averages."""

FEWEST = 8
"""Fewest images on either side of which the distance is extrapolated."""


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

    @property
    def trace(self) -> float:
        """Trace of the covariance."""
        return float((self.factor**2).sum())


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
    return _distance(a.mean - b.mean, a.trace + b.trace, a.factor @ b.factor.T)


def frechet_distance(a: Floats, b: Floats) -> float:
    """Return the Fréchet distance between two sets of features.

    Small sets overestimate it, the more the smaller and the more varied they are: a model that draws the same
    few pictures can come before a perfect one. Compare `frechet_distance_infinity` instead. It never compares
    with published FID, which has another network.

    Args:
        a: Rows with shape (N, D), N ≥ 2.
        b: Rows with shape (M, D), M ≥ 2.

    Raises:
        DataError: a set has fewer than 2 rows, or values that are not finite.
    """
    return frechet_distance_of(gaussian(a), gaussian(b))


def frechet_distance_infinity(samples: Floats, reference: Floats, seed: int = 0) -> float:
    """Return the Fréchet distance that infinitely many images would have: FD∞.

    With n samples and m images of the reference the distance is FD∞ + a/n + b/m + …, with a and b of the
    distributions (Chong and Forsyth, arXiv 1911.07023, section 3). The regression on 1/n goes through two
    points, all images and both halves of them, and its intercept is

        FD∞ = 2 FD(n, m) − mean FD(n/2, m/2).

    Departures from the paper: it halves the reference too, which frees the result of the reference's bias b/m
    as well; and it takes two sizes and every image equally often at each, where the paper draws 15 sizes down
    to a tenth. Small sets bend the line, so that points far from n would pull the intercept up.

    The result can be below 0, by chance, where the sets come from one distribution. With fewer than about
    half as many images as features some of the bias stays.

    Args:
        samples: Rows with shape (N, D), N ≥ 4.
        reference: Rows with shape (M, D), M ≥ 4.
        seed: Seed of the reference's split.

    Raises:
        DataError: a set has fewer than 4 rows, or values that are not finite.
    """
    if min(len(samples), len(reference)) < 4:
        raise DataError(
            f"an extrapolated Fréchet distance needs at least 4 images on either side, got {len(samples)} "
            f"and {len(reference)}"
        )
    sets = Extrapolation(samples, Reference.of(reference, seed))
    everything = np.arange(len(samples))
    return sets.at_infinity(everything, sets.distance(everything))


@dataclass(frozen=True, eq=False)
class Reference:
    """Gaussians of a reference and of its two random halves."""

    whole: Gaussian
    halves: tuple[Gaussian, ...]

    @classmethod
    def of(cls, rows: Floats, seed: int) -> Reference:
        """Fit them.

        Args:
            rows: Rows with shape (M, D). With fewer than 4 there are no halves.
            seed: Seed of the split.
        """
        order = np.random.default_rng(seed).permutation(len(rows))
        halves = np.array_split(order, 2) if len(rows) >= 4 else ()
        return cls(gaussian(rows), tuple(gaussian(rows[half]) for half in halves))


class Extrapolation:
    """Fréchet distances of some of the samples from a reference, and their extrapolation.

    What does not depend on which samples count is computed once: factors of the reference and of its halves
    (`Reference`), and the samples' products with them.
    """

    def __init__(self, samples: Floats, reference: Reference) -> None:
        """Multiply all samples with the reference.

        Args:
            samples: Rows with shape (N, D).
            reference: What they are compared with.
        """
        rows = samples.astype(np.float64) - reference.whole.mean
        self._whole = _Projected(rows, reference.whole, reference.whole.mean)
        self._halves = [_Projected(rows, half, reference.whole.mean) for half in reference.halves]

    def distance(self, chosen: Indices) -> float:
        """Return the Fréchet distance of the samples at `chosen`, at least 2, from the whole reference."""
        return self._whole.distance(chosen)

    def at_infinity(self, chosen: Indices, distance: float) -> float:
        """Extrapolate to infinitely many images on both sides; see `frechet_distance_infinity`.

        Args:
            chosen: Which samples count, at least 4.
            distance: Their distance from the whole reference.
        """
        generator = np.random.default_rng(len(chosen))
        found = []
        for _ in range(SPLITS):
            halves = np.array_split(generator.permutation(chosen), 2)
            found += [side.distance(half) for side, half in zip(self._halves, halves, strict=True)]
        return 2 * distance - float(np.mean(found))


class _Projected:
    """Samples multiplied with one Gaussian's factor."""

    def __init__(self, rows: Float64s, to: Gaussian, origin: Float64s) -> None:
        self._rows, self._mean, self._trace = rows, to.mean - origin, to.trace
        self._products = rows @ to.factor.T

    def distance(self, chosen: Indices) -> float:
        rows, products = self._rows[chosen], self._products[chosen]
        mean = rows.mean(axis=0)
        centred = (products - products.mean(axis=0)) / np.sqrt(len(rows) - 1)
        trace = float(((rows - mean) ** 2).sum()) / (len(rows) - 1)
        return _distance(mean - self._mean, trace + self._trace, centred)


def _distance(means: Float64s, traces: float, cross: Float64s) -> float:
    """Return ‖means‖² + traces − 2 Σ singular values of `cross`, which come from its smaller Gram matrix."""
    gram: NDArray[np.float64] = cross @ cross.T if len(cross) < cross.shape[1] else cross.T @ cross
    roots = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0))
    return max(0.0, float((means**2).sum()) + traces - 2 * float(roots.sum()))


def _reference(measured: Measured) -> Reference:
    return Reference.of(measured.reference.pooled, measured.settings.seed)


def _prepare(measured: Measured) -> Statistic:
    if measured.fewest < 2:
        return undefined
    sets = Extrapolation(measured.images.pooled, measured.once(_reference))

    def scores(chosen: Indices) -> Scores:
        distance = sets.distance(chosen)
        if min(len(chosen), len(measured.reference)) < FEWEST:
            return {"frechet_distance": distance}
        return {
            "frechet_distance_infinity": sets.at_infinity(chosen, distance),
            "frechet_distance": distance,
        }

    return scores


METRIC = Metric(
    _prepare,
    (
        Figure(
            "frechet_distance_infinity",
            "Fréchet distance ∞",
            "lower",
            "How far the samples are, as a cloud of features, from real images of the domain, extrapolated "
            "to infinitely many images. Around 0 nothing is left to learn; chance can take it below.",
        ),
        Figure(
            "frechet_distance",
            "Fréchet distance",
            None,
            "The same of these images as they are. Too few images push it up, and varied ones more than "
            "alike ones: compare the row before.",
            detail=True,
        ),
    ),
    resamples=30,
)
