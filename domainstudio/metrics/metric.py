"""What a metric is: a function of features, and the words that explain its figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from domainstudio.config import EvaluateSettings
from domainstudio.metrics.features import Features

Better = Literal["lower", "higher", None]
Scores = Mapping[str, Any]
"""Numbers, or lists of them, by their keys in metrics.json; one that is not defined is left out."""

Indices = NDArray[np.intp]
Statistic = Callable[[Indices], Scores]
"""The figures of those images that the indices name."""

T = TypeVar("T")


@dataclass(frozen=True)
class Figure:
    """A figure of metrics.json as the report shows it.

    Attributes:
        key: Its key.
        name: Its name in the report's table.
        better: Which values are better.
        meaning: What it says, for readers.
        percent: Whether it is a share, shown in percent.
        count: Whether it is a whole number.
        spread: Key of its standard deviation, if it has one.
        chance: Key of the figure that chance alone would give, if there is one.
        capped: Whether more than real images have is no merit.
        detail: Whether it stands among the further figures, below the main ones.
        part: The part of metrics.json that holds its `samples` and `references`; None is the whole.
    """

    key: str
    name: str
    better: Better
    meaning: str
    percent: bool = False
    count: bool = False
    spread: str | None = None
    chance: str | None = None
    capped: bool = False
    detail: bool = False
    part: str | None = None


@dataclass(frozen=True, eq=False)
class Measured:
    """A set of images and what it is measured against.

    Attributes:
        images: Features of the images.
        reference: Features of real images of the domain.
        shots: Features of the training images.
        mirrored: Features of the training images mirrored left to right, or None to disregard them.
        settings: Neighbours, subsets, threshold and seed.
        copies: Whether the images stand for two copies of each, as for a model that only copies.
        source: Features of images of the source's domain, or None where there are none.
        garbage: Features of images in no domain, or None.
        memorized_below: Distance to a training image below which an image counts as memorised.
        false_alarms: Share of unseen real images below that distance, or None where there are none.
        memo: What `once` has computed. It must be a new one for another reference, source or training images.
    """

    images: Features
    reference: Features
    shots: Features
    mirrored: Features | None
    settings: EvaluateSettings
    copies: bool = False
    source: Features | None = None
    garbage: Features | None = None
    memorized_below: float = 0.0
    false_alarms: float | None = None
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    def once(self, compute: Callable[[Measured], T]) -> T:
        """Return `compute(self)`, computed once for all sets of images that share the memo.

        Args:
            compute: A function of all but `images` and `copies`.
        """
        if compute not in self.memo:
            self.memo[compute] = compute(self)
        found: T = self.memo[compute]
        return found

    @property
    def fewest(self) -> int:
        """Number of images in the smaller one of the images and the reference."""
        return min(len(self.images), len(self.reference))


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        prepare: Computes what does not depend on which of the images count. The function that it returns
            gives their figures, or none where too few images leave them undefined.
        figures: What the figures say.
        resamples: Most resamples of its intervals, where one takes long.
    """

    prepare: Callable[[Measured], Statistic]
    figures: tuple[Figure, ...]
    resamples: int | None = None


def undefined(chosen: Indices) -> Scores:
    """The statistic of a metric that is not defined."""
    return {}
