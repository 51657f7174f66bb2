"""Precision, recall, density and coverage: fidelity and diversity from k nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from domainstudio.errors import DataError
from domainstudio.metrics.distances import Float64s, Floats, squared_distance_blocks
from domainstudio.metrics.metric import Figure, Indices, Measured, Metric, Scores, Statistic, undefined


class NeighbourScores(NamedTuple):
    """Four shares; all are 0 … 1 except density, which may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def squared_radii(rows: Floats, k: int) -> Float64s:
    """Return each row's squared distance to its k-th nearest other row, with shape (N,).

    Args:
        rows: Rows with shape (N, D), N > k.
        k: Which neighbour, at least 1; the row itself is none.
    """
    radii = np.empty(len(rows))
    for block, squared in squared_distance_blocks(rows, rows):
        squared[np.arange(len(squared)), np.arange(block.start, block.stop)] = np.inf
        radii[block] = np.partition(squared, k - 1, axis=1)[:, k - 1]
    return radii


def neighbour_scores(samples: Floats, reference: Floats, k: int = 3) -> NeighbourScores:
    """Compare samples with a reference by balls around each image up to its k-th neighbour.

    With B(x) the ball of x among its own set, N reference images r and M samples s:

    * precision: share of samples inside any B(r); recall: share of references inside any B(s)
      (Kynkäänniemi et al., arXiv 1904.06991);
    * density = 1/(kM) Σ_s #{r: s ∈ B(r)}; coverage: share of B(r) with any sample inside
      (Naeem et al., arXiv 2002.09797), which one outlier of the reference cannot spoil.

    A point on the boundary is inside (≤, as the first paper defines it).

    Args:
        samples: Rows with shape (M, D), M > k.
        reference: Rows with shape (N, D), N > k.
        k: Which neighbour ends a ball, at least 1.

    Raises:
        DataError: a set has no more than k rows.
    """
    _check_numbers(len(samples), len(reference), k)
    return Balls.of(samples, reference, squared_radii(reference, k), k).scores(np.arange(len(samples)))


@dataclass(frozen=True, eq=False)
class Balls:
    """Distances that tell which images are in whose ball, for any of the samples.

    Squared distances are rounded to float32. Rounding keeps their order, and equal ones stay equal.

    Attributes:
        within: Squared distances of the samples, infinite on the diagonal; float32 with shape (M, M).
        across: Squared distances of samples and reference, float32 with shape (M, N).
        inside: Whether each sample is in each ball of the reference, with shape (M, N).
        k: Which neighbour ends a ball.
    """

    within: NDArray[np.float32]
    across: NDArray[np.float32]
    inside: NDArray[np.bool_]
    k: int

    @classmethod
    def of(cls, samples: Floats, reference: Floats, radii: Float64s, k: int) -> Balls:
        """Compute the distances.

        Args:
            samples: Rows with shape (M, D).
            reference: Rows with shape (N, D).
            radii: The reference's `squared_radii`.
            k: Which neighbour ends a ball.
        """
        across = np.empty((len(samples), len(reference)), dtype=np.float32)
        inside = np.empty(across.shape, dtype=bool)
        for block, squared in squared_distance_blocks(samples, reference):
            across[block], inside[block] = squared, squared <= radii
        within = np.empty((len(samples), len(samples)), dtype=np.float32)
        for block, squared in squared_distance_blocks(samples, samples):
            within[block] = squared
        np.fill_diagonal(within, np.inf)
        return cls(within, across, inside, k)

    def scores(self, chosen: Indices) -> NeighbourScores:
        """Return the scores of the samples at `chosen`, more than k."""
        inside = self.inside[chosen]
        radii = np.partition(self.within[np.ix_(chosen, chosen)], self.k - 1, axis=1)[:, self.k - 1]
        recalled = (self.across[chosen] <= radii[:, None]).any(axis=0)
        return NeighbourScores(
            precision=float(inside.any(axis=1).mean()),
            recall=float(recalled.mean()),
            density=float(inside.sum()) / (self.k * len(chosen)),
            coverage=float(inside.any(axis=0).mean()),
        )


def _check_numbers(samples: int, reference: int, k: int) -> None:
    if min(samples, reference) <= k:
        raise DataError(
            f"{k} neighbours need more than {k} images on either side, got {samples} samples and "
            f"{reference} of the reference: lower evaluate.neighbours or take more images"
        )


def _radii(measured: Measured) -> Float64s:
    return squared_radii(measured.reference.pooled, measured.settings.neighbours)


def _prepare(measured: Measured) -> Statistic:
    k = measured.settings.neighbours
    if measured.fewest <= k:
        return undefined
    rows = measured.images.pooled, measured.reference.pooled
    balls = Balls.of(*rows, measured.once(_radii), k)

    def scores(chosen: Indices) -> Scores:
        return balls.scores(chosen)._asdict() if len(chosen) > k else {}

    return scores


METRIC = Metric(
    _prepare,
    (
        Figure(
            "precision",
            "Precision",
            "higher",
            "Share of the samples that look like some real image of the domain.",
            percent=True,
            detail=True,
        ),
        Figure(
            "recall",
            "Recall",
            "higher",
            "Share of the real images that look like some sample: how much of the domain is reached.",
            percent=True,
        ),
        Figure(
            "density",
            "Density",
            "higher",
            "Like precision, but counts how many real images a sample is close to; outliers weigh less, and "
            "it can exceed 1.",
            detail=True,
        ),
        Figure(
            "coverage",
            "Coverage",
            "higher",
            "Share of the real images with at least one sample close by.",
            percent=True,
        ),
    ),
    resamples=100,
)
