"""Precision, recall, density and coverage: fidelity and diversity from k nearest neighbours."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from domainstudio.errors import DataError
from domainstudio.metrics.distances import Float64s, Floats, squared_distance_blocks
from domainstudio.metrics.metric import Figure, Measured, Metric, Scores


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
    reference_radii, sample_radii = squared_radii(reference, k), squared_radii(samples, k)
    covered = np.zeros(len(reference), dtype=bool)
    recalled = np.zeros(len(reference), dtype=bool)
    precise = balls = 0
    for block, squared in squared_distance_blocks(samples, reference):
        inside = squared <= reference_radii
        balls += int(inside.sum())
        precise += int(inside.any(axis=1).sum())
        covered |= inside.any(axis=0)
        recalled |= (squared <= sample_radii[block, None]).any(axis=0)
    return NeighbourScores(
        precision=precise / len(samples),
        recall=float(recalled.mean()),
        density=balls / (k * len(samples)),
        coverage=float(covered.mean()),
    )


def _check_numbers(samples: int, reference: int, k: int) -> None:
    if min(samples, reference) <= k:
        raise DataError(
            f"{k} neighbours need more than {k} images on either side, got {samples} samples and "
            f"{reference} of the reference: lower evaluate.neighbours or take more images"
        )


def _scores(measured: Measured) -> Scores:
    k = measured.settings.neighbours
    if measured.fewest <= k:
        return {}
    return neighbour_scores(measured.images.pooled, measured.reference.pooled, k)._asdict()


METRIC = Metric(
    _scores,
    (
        Figure(
            "precision",
            "Precision",
            "higher",
            "Share of the samples that look like some real image of the domain.",
            percent=True,
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
        ),
        Figure(
            "coverage",
            "Coverage",
            "higher",
            "Share of the real images with at least one sample close by.",
            percent=True,
        ),
    ),
)
