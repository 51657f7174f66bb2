"""The intra-cluster distance: how far apart the samples around one training image are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from domainstudio.errors import DataError
from domainstudio.metrics.distances import Floats, nearest
from domainstudio.metrics.metric import Figure, Indices, Measured, Metric, Scores, Statistic


@dataclass(frozen=True)
class IntraDistance:
    """Result of `intra_distance`.

    Attributes:
        mean: Average over the clusters that have at least two samples, or None where no cluster has.
        distances: Average pairwise distance of each cluster; None for clusters of fewer than two samples.
        sizes: Samples of each cluster, one entry per training image.
    """

    mean: float | None
    distances: tuple[float | None, ...]
    sizes: tuple[int, ...]

    @property
    def clusters(self) -> int:
        """How many clusters the mean is over."""
        return sum(distance is not None for distance in self.distances)


def intra_distance(
    samples: Floats, training: Floats, assigned: NDArray[np.intp] | None = None
) -> IntraDistance:
    """Average the pairwise perceptual distances of the samples nearest to the same training image.

    The definition of Intra-LPIPS (Ojha et al., arXiv 2104.06820, section 4.2): assign each sample to the
    nearest training image, average the pairwise distances inside each cluster, then over clusters. Samples
    that copy the training images score 0; with the default network it is not LPIPS.

    A cluster of none or one sample has no pair and is left out of the average, as in the authors' code
    (the mean over no pair is NaN, and NaN clusters are dropped). So a model that covers a single training
    image with varied samples scores well: read `sizes` and recall beside it. Departure from that code:
    every pair counts, not those of 50 random members.

    The perceptual distance is a squared Euclidean distance of rows, so the mean over the pairs of n rows
    is 2/(n−1) Σ_i ‖x_i − x̄‖² and no pair is ever formed.

    Args:
        samples: Perceptual features with shape (M, P).
        training: Perceptual features of the training images, with shape (N, P), N ≥ 1.
        assigned: Each sample's nearest training image, where it is known, with shape (M,).

    Raises:
        DataError: there is no training image.
    """
    if not len(training):
        raise DataError("an intra-cluster distance needs at least one training image")
    if assigned is None:
        assigned, _ = nearest(samples, training)
    distances = tuple(_mean_pairwise(samples, assigned == cluster) for cluster in range(len(training)))
    used = [distance for distance in distances if distance is not None]
    sizes = np.bincount(assigned, minlength=len(training))
    return IntraDistance(float(np.mean(used)) if used else None, distances, tuple(sizes.tolist()))


def _mean_pairwise(rows: Floats, chosen: NDArray[np.bool_]) -> float | None:
    members = rows[chosen]
    if len(members) < 2:
        return None
    centre = members.mean(axis=0, dtype=np.float64)
    return 2 / (len(members) - 1) * sum(float(((row - centre) ** 2).sum()) for row in members)


def _prepare(measured: Measured) -> Statistic:
    samples, training = measured.images.perceptual, measured.shots.perceptual
    assigned, _ = nearest(samples, training)

    def scores(chosen: Indices) -> Scores:
        rows = np.repeat(chosen, 2) if measured.copies else chosen
        found = intra_distance(samples[rows], training, assigned[rows])
        mean: Scores = {} if found.mean is None else {"intra_distance": found.mean}
        sizes: Scores = {} if measured.copies else {"intra_sizes": found.sizes}
        return {**mean, "intra_clusters": found.clusters, **sizes}

    return scores


METRIC = Metric(
    _prepare,
    (
        Figure(
            "intra_distance",
            "Intra distance",
            None,
            "Samples are grouped by their nearest training image; this is the mean distance inside a group. "
            "Exact copies give 0, but leftovers of the source and garbage give much.",
            capped=True,
            detail=True,
        ),
        Figure(
            "intra_clusters",
            "Groups",
            None,
            "How many training images have at least two samples grouped around them.",
            count=True,
            detail=True,
        ),
    ),
)
