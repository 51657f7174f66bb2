"""Which samples are in the domain, and how varied those are: leftovers and garbage are no variety."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from domainstudio.errors import DataError
from domainstudio.metrics.distances import Float64s, Floats, nearest
from domainstudio.metrics.diversity import intra_distance
from domainstudio.metrics.metric import Figure, Indices, Measured, Metric, Scores, Statistic, undefined
from domainstudio.metrics.ridge import Probe, Ridge

LARGEST = 500
"""Most real images of either side that the probe is fitted to."""

TARGET, SOURCE, GARBAGE = "target", "source", "garbage"


@dataclass(frozen=True, eq=False)
class DomainProbe:
    """Tells images of the target domain from images of the source's, and from garbage.

    Attributes:
        probe: A linear classifier of the kinds of images.
        margins: By each other kind, how much larger the target's score is at least in images of the target.
        accuracy: Mean share of the images of each kind that the fits without them put on their side.
    """

    probe: Probe
    margins: Mapping[str, float]
    accuracy: float

    @classmethod
    def fit(cls, target: Floats, source: Floats, garbage: Floats | None, seed: int) -> DomainProbe:
        """Fit a linear discriminant between the target and each other kind of images.

        `domain_probe` fits it to perceptual features. They know where on the picture something is, which
        pooled ones do not: those miss one pair of sunglasses in thirty.

        An image belongs to the target where its scores are on the target's side of the middle between the two
        kinds' means, as in linear discriminant analysis with equal priors. A probe between two domains says
        nothing of an image that is in neither: hence garbage.

        Args:
            target: Real images of the target, with shape (N, D), N ≥ 2.
            source: Images of the source's domain, with shape (M, D), M ≥ 2.
            garbage: Images in neither (`garbage`), with shape (K, D), or None to do without.
            seed: Seed of the draw where there are more than `LARGEST`.

        Raises:
            DataError: a side has fewer than 2 images.
        """
        if min(len(target), len(source)) < 2:
            raise DataError(f"a probe needs 2 images a side, got {len(target)} and {len(source)}")
        kinds = {TARGET: _drawn(target, seed), SOURCE: _drawn(source, seed)}
        kinds |= {} if garbage is None else {GARBAGE: garbage}
        labels = np.repeat(list(kinds), [len(rows) for rows in kinds.values()])
        probe = Ridge(np.concatenate(list(kinds.values()))).fit(labels.tolist())
        margins = {kind: _middle(probe, labels, kind) for kind in kinds if kind != TARGET}
        inside = _inside(probe, probe.held_out, margins)
        right = inside == (labels == TARGET)
        return cls(probe, margins, float(np.mean([right[labels == kind].mean() for kind in kinds])))

    def contains(self, rows: Floats) -> NDArray[np.bool_]:
        """Return whether each row, with shape (M, D), is an image of the target domain; shape (M,)."""
        return _inside(self.probe, self.probe.scores(rows), self.margins)


def _inside(probe: Probe, scores: Float64s, margins: Mapping[str, float]) -> NDArray[np.bool_]:
    found = np.ones(len(scores), dtype=bool)
    for kind, margin in margins.items():
        found &= _lead(probe, scores, kind) > margin
    return found


def _middle(probe: Probe, labels: NDArray[np.str_], kind: str) -> float:
    lead = _lead(probe, probe.held_out, kind)
    return float(lead[labels == TARGET].mean() + lead[labels == kind].mean()) / 2


def _lead(probe: Probe, scores: Float64s, kind: str) -> Float64s:
    """Return by how much the target's score exceeds that of another kind."""
    lead: Float64s = scores[:, probe.classes.index(TARGET)] - scores[:, probe.classes.index(kind)]
    return lead


def _drawn(rows: Floats, seed: int) -> Floats:
    if len(rows) <= LARGEST:
        return rows
    return rows[np.sort(np.random.default_rng(seed).permutation(len(rows))[:LARGEST])]


def domain_probe(measured: Measured) -> DomainProbe | None:
    """Return the probe between the reference and the images of the source's domain, if there are enough."""
    if measured.source is None or min(len(measured.reference), len(measured.source)) < 2:
        return None
    garbage = None if measured.garbage is None else measured.garbage.perceptual
    rows = measured.reference.perceptual, measured.source.perceptual
    return DomainProbe.fit(*rows, garbage, measured.settings.seed)


def in_domain(measured: Measured) -> NDArray[np.bool_] | None:
    """Return whether each of the images is in the domain, or None where that cannot be told.

    It cannot be told of the images that the probe was fitted to.
    """
    if measured.images is measured.source or measured.images is measured.reference:
        return None
    probe = measured.once(domain_probe)
    return None if probe is None else probe.contains(measured.images.perceptual)


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
            "Share of the samples that a linear probe takes for the target domain, rather than for the "
            "source's or for garbage.",
            percent=True,
        ),
    ),
)
