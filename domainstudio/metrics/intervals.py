"""Intervals of figures: how much they would change with other samples of the same model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from domainstudio.metrics.metric import Indices, Metric, Statistic

NORMAL_95 = 1.959964
"""97.5% quantile of the standard normal distribution."""

Intervals = Mapping[str, tuple[float, float]]


def half_samples(number: int, resamples: int, seed: int) -> Iterator[Indices]:
    """Yield random halves of `number` images, drawn without replacement and sorted.

    A bootstrap with replacement draws images twice. Two equal images are at distance 0 of each other, which
    biases every figure that looks at pairs or neighbours. Halves contain no image twice.

    Args:
        number: Images in all.
        resamples: How many halves.
        seed: Seed of the draws.
    """
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.sort(generator.permutation(number)[: number // 2])


def interval(value: float, replicates: Sequence[float], number: int) -> tuple[float, float]:
    """Return a 95% interval around a figure from its values on random halves.

    The delete-d jackknife (Shao and Wu, Annals of Statistics 17, 1989, eq. 2.2): with r of n images in each
    resample and d = n − r, the figure's variance is r/d times the variance of the replicates. A normal
    distribution around the figure gives the interval.

    Args:
        value: The figure of all images.
        replicates: The figure of each half, at least 2.
        number: Images in all.
    """
    kept = number // 2
    deviation = float(np.std(replicates)) * math.sqrt(kept / (number - kept))
    return value - NORMAL_95 * deviation, value + NORMAL_95 * deviation


def intervals(metric: Metric, statistic: Statistic, number: int, resamples: int, seed: int) -> Intervals:
    """Return the interval of each figure of a metric that has one.

    Figures that count have none, nor those that are not defined for most halves.

    Args:
        metric: The metric.
        statistic: What its `prepare` returned for the images.
        number: How many images there are.
        resamples: How many halves to draw; below 2 there are no intervals.
        seed: Seed of the draws.
    """
    allowed = resamples if metric.resamples is None else min(resamples, metric.resamples)
    if number < 4 or allowed < 2:
        return {}
    values = statistic(np.arange(number))
    replicates = [statistic(half) for half in half_samples(number, allowed, seed)]
    found: dict[str, tuple[float, float]] = {}
    for figure in metric.figures:
        known = [scores[figure.key] for scores in replicates if scores.get(figure.key) is not None]
        if figure.key in values and not figure.count and 2 * len(known) >= max(4, len(replicates)):
            low, high = interval(values[figure.key], known, number)
            found[figure.key] = (max(0.0, low), min(1.0, high)) if figure.percent else (low, high)
    return found
