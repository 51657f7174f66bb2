"""Which samples are in the domain, and how varied those are: leftovers and garbage are no variety."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from domainstudio.errors import DataError
from domainstudio.metrics.distances import Floats, nearest, squared_distance_blocks
from domainstudio.metrics.diversity import intra_distance
from domainstudio.metrics.metric import Figure, Indices, Measured, Metric, Scores, Statistic, undefined
from domainstudio.metrics.ridge import Probe, Ridge

LARGEST = 1000
"""Most real images of either side that the probe is fitted to."""

OUTLYING = 0.99
"""Share of the real images, of both sides, that are as near to the domain as an image of it must be."""

TARGET, SOURCE = "target", "source"


@dataclass(frozen=True, eq=False)
class DomainProbe:
    """Tells images of the target domain from images of the source's, and both from garbage.

    Attributes:
        probe: Between target and source.
        threshold: Least score of the target at which an image belongs to it.
        domain: Real images of the target, with shape (N, D).
        radius: Squared distance to the nearest of them beyond which an image is garbage.
        accuracy: Mean share of the images of each side that the fits without them get right.
    """

    probe: Probe
    threshold: float
    domain: Floats
    radius: float
    accuracy: float

    @classmethod
    def fit(cls, target: Floats, source: Floats, seed: int) -> DomainProbe:
        """Fit a linear discriminant between the domains, and the distance that is usual in both.

        An image belongs to the target where the probe's score is above the middle of the two domains' mean
        scores, as in linear discriminant analysis with equal priors. A probe between two domains says nothing
        of an image that is in neither. So the image must also be as near to a real image of the target as
        `OUTLYING` of the real images of target and source are.

        Args:
            target: Real images of the target, with shape (N, D), N ≥ 2.
            source: Images of the source's domain, with shape (M, D), M ≥ 2.
            seed: Seed of the draw where there are more than `LARGEST`.

        Raises:
            DataError: a side has fewer than 2 images.
        """
        if min(len(target), len(source)) < 2:
            raise DataError(f"a probe needs 2 images a side, got {len(target)} and {len(source)}")
        target, source = _drawn(target, seed), _drawn(source, seed)
        labels = np.repeat([TARGET, SOURCE], [len(target), len(source)])
        probe = Ridge(np.concatenate([target, source])).fit(labels.tolist())
        held = probe.held_out[:, probe.classes.index(TARGET)]
        own = labels == TARGET
        threshold = (held[own].mean() + held[~own].mean()) / 2
        accuracy = ((held[own] > threshold).mean() + (held[~own] <= threshold).mean()) / 2
        radius = np.quantile(np.concatenate([_to_others(target), nearest(source, target)[1]]), OUTLYING)
        return cls(probe, float(threshold), target, float(radius), float(accuracy))

    def contains(self, rows: Floats) -> NDArray[np.bool_]:
        """Return whether each row, with shape (M, D), is an image of the target domain; shape (M,)."""
        score = self.probe.scores(rows)[:, self.probe.classes.index(TARGET)]
        near: NDArray[np.bool_] = nearest(rows, self.domain)[1] <= self.radius
        return near & (score > self.threshold)


def _drawn(rows: Floats, seed: int) -> Floats:
    if len(rows) <= LARGEST:
        return rows
    return rows[np.sort(np.random.default_rng(seed).permutation(len(rows))[:LARGEST])]


def _to_others(rows: Floats) -> NDArray[np.float64]:
    """Return each row's squared distance to the nearest other row."""
    found = np.empty(len(rows))
    for block, squared in squared_distance_blocks(rows, rows):
        squared[np.arange(len(squared)), np.arange(block.start, block.stop)] = np.inf
        found[block] = squared.min(axis=1)
    return found


def domain_probe(measured: Measured) -> DomainProbe | None:
    """Return the probe between the reference and the images of the source's domain, if there are enough."""
    if measured.source is None or min(len(measured.reference), len(measured.source)) < 2:
        return None
    rows = measured.reference.pooled, measured.source.pooled
    return DomainProbe.fit(*rows, measured.settings.seed)


def in_domain(measured: Measured) -> NDArray[np.bool_] | None:
    """Return whether each of the images is in the domain, or None where that cannot be told.

    It cannot be told of the images that the probe was fitted to.
    """
    if measured.images is measured.source or measured.images is measured.reference:
        return None
    probe = measured.once(domain_probe)
    return None if probe is None else probe.contains(measured.images.pooled)


def describe(measured: Measured, real_source: bool) -> Mapping[str, Any]:
    """Return what the probe was fitted to and how well it tells the domains apart; empty without one."""
    probe = measured.once(domain_probe)
    if probe is None:
        return {}
    return {"source": "real images" if real_source else "samples", "accuracy": probe.accuracy}


def _prepare(measured: Measured) -> Statistic:
    inside = in_domain(measured)
    if inside is None:
        return undefined
    samples, training = measured.images.perceptual, measured.shots.perceptual
    assigned, _ = nearest(samples, training)

    def scores(chosen: Indices) -> Scores:
        share = float(inside[chosen].mean())
        rows = np.repeat(chosen[inside[chosen]], 2 if measured.copies else 1)
        mean = intra_distance(samples[rows], training, assigned[rows]).mean
        varied: Scores = {} if mean is None else {"intra_distance_in_domain": mean}
        return {"in_domain_share": share, **varied}

    return scores


METRIC = Metric(
    _prepare,
    (
        Figure(
            "intra_distance_in_domain",
            "Intra distance in the domain",
            "higher",
            "How varied the samples are that are in the domain: their mean distance among those nearest to "
            "the same training image. Exact copies give 0; leftovers of the source and garbage do not count.",
            capped=True,
        ),
        Figure(
            "in_domain_share",
            "In the domain",
            "higher",
            "Share of the samples that a linear probe takes for the target domain rather than the source's, "
            "and that are as near to a real image as real images are.",
            percent=True,
        ),
    ),
)
