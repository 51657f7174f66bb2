"""How near samples are to the training images, and when that is too near."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from domainstudio.errors import DataError
from domainstudio.metrics.distances import Float64s, Floats, nearest
from domainstudio.metrics.metric import Figure, Indices, Measured, Metric, Scores, Statistic


@dataclass(frozen=True, eq=False)
class Memorization:
    """Each sample's nearest training image.

    Attributes:
        training: Index of the nearest training image, with shape (M,).
        distances: Perceptual distance to it, with shape (M,).
        mirrored: Whether it is its mirror image that is so near, with shape (M,).
        threshold: Distance below which a sample counts as memorised.
    """

    training: NDArray[np.intp]
    distances: Float64s
    mirrored: NDArray[np.bool_]
    threshold: float

    @property
    def share(self) -> float:
        """Share of samples nearer than the threshold, 0 … 1."""
        return float((self.distances < self.threshold).mean())

    @property
    def median(self) -> float:
        """Median distance to the nearest training image."""
        return float(np.median(self.distances))

    def take(self, chosen: Indices) -> Memorization:
        """Return those of the samples at `chosen`."""
        rows = self.training[chosen], self.distances[chosen], self.mirrored[chosen]
        return Memorization(*rows, self.threshold)


def memorization(
    samples: Floats, training: Floats, threshold: float, mirrored: Floats | None = None
) -> Memorization:
    """Find each sample's nearest training image by perceptual distance.

    Args:
        samples: Perceptual features with shape (M, P), M ≥ 1.
        training: Perceptual features with shape (N, P), N ≥ 1.
        threshold: Distance below which a sample counts as memorised (`evaluate.memorized_below`).
        mirrored: Perceptual features of the training images mirrored left to right, in the same order, or
            None to disregard them. Training with `horizontal_flip` learns, and may copy, both.

    Raises:
        DataError: there is no sample or no training image.
    """
    if not len(samples) or not len(training):
        raise DataError(
            f"memorisation needs samples and training images, got {len(samples)} and {len(training)}"
        )
    indices, distances = nearest(samples, training)
    flipped = np.zeros(len(samples), dtype=bool)
    if mirrored is not None:
        flipped_indices, flipped_distances = nearest(samples, mirrored)
        flipped = flipped_distances < distances
        indices = np.where(flipped, flipped_indices, indices)
        distances = np.minimum(distances, flipped_distances)
    return Memorization(indices, distances, flipped, threshold)


def memorization_of(measured: Measured) -> Memorization:
    """Return `memorization` of the images that are measured."""
    mirrored = None if measured.mirrored is None else measured.mirrored.perceptual
    rows = (measured.images.perceptual, measured.shots.perceptual)
    return memorization(*rows, measured.settings.memorized_below, mirrored)


def _prepare(measured: Measured) -> Statistic:
    found = memorization_of(measured)

    def scores(chosen: Indices) -> Scores:
        part = found.take(chosen)
        return {"memorized_share": part.share, "nearest_distance_median": part.median}

    return scores


METRIC = Metric(
    _prepare,
    (
        Figure(
            "memorized_share",
            "Memorised",
            "lower",
            "Share of the samples closer to a training image than the threshold.",
            percent=True,
        ),
        Figure(
            "nearest_distance_median",
            "Nearest distance",
            None,
            "Median distance of a sample to its nearest training image.",
        ),
    ),
)
