"""How near samples are to the training images, and when that is too near."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from domainstudio.errors import DataError
from domainstudio.metrics.distances import Float64s, Floats, nearest
from domainstudio.metrics.metric import Figure, Indices, Measured, Metric, Scores, Statistic

FALSE_ALARMS = 2
"""Real images below a derived threshold that there must be at least."""


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
        threshold: Distance below which a sample counts as memorised (`threshold_of`).
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


class Threshold(NamedTuple):
    """Distance below which an image counts as memorised, and what share of unseen real images is as near."""

    below: float
    false_alarms: float | None


def threshold_of(distances: Float64s | None, fixed: float, rate: float | None) -> Threshold:
    """Return the distance at which at most `rate` of unseen real images would count as memorised.

    Real images resemble training images too. A threshold is worth as much as the share of them that it
    takes for copies. With fewer than `FALSE_ALARMS` / rate real images their quantile is not known well
    enough, and `fixed` is taken.

    Args:
        distances: Distance of each unseen real image to the nearest training image, with shape (N,), or None.
        fixed: `evaluate.memorized_below`.
        rate: `evaluate.memorized_false_alarms`, or None to take `fixed`.
    """
    if distances is None:
        return Threshold(fixed, None)
    below = fixed
    if rate and len(distances) >= FALSE_ALARMS / rate:
        below = float(np.sort(distances)[int(rate * len(distances))])
    return Threshold(below, float((distances < below).mean()))


def memorization_of(measured: Measured) -> Memorization:
    """Return `memorization` of the images that are measured."""
    mirrored = None if measured.mirrored is None else measured.mirrored.perceptual
    rows = (measured.images.perceptual, measured.shots.perceptual)
    return memorization(*rows, measured.memorized_below, mirrored)


def _prepare(measured: Measured) -> Statistic:
    found = memorization_of(measured)
    alarms: Scores = (
        {} if measured.false_alarms is None else {"memorized_false_alarms": measured.false_alarms}
    )

    def scores(chosen: Indices) -> Scores:
        part = found.take(chosen)
        return {"memorized_share": part.share, **alarms, "nearest_distance_median": part.median}

    return scores


METRIC = Metric(
    _prepare,
    (
        Figure(
            "memorized_share",
            "Memorised",
            "lower",
            "Share of the samples closer to a training image than the threshold. Chance is the share of "
            "unseen real images that are as close: so many are no copies.",
            percent=True,
            chance="memorized_false_alarms",
        ),
        Figure(
            "nearest_distance_median",
            "Nearest distance",
            None,
            "Median distance of a sample to its nearest training image.",
            detail=True,
        ),
    ),
)
