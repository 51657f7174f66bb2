"""Attributes kept: whether an adapted sample shows the same hair, skin or clothes as its source's sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from domainstudio.metrics.distances import Floats
from domainstudio.metrics.intervals import half_samples, interval
from domainstudio.metrics.metric import Figure
from domainstudio.metrics.ridge import Probe, Ridge

Attributes = Sequence[Mapping[str, str]]
"""What is known of each image, by the attribute's name."""

FEWEST = 10
"""Fewest images of a value that a probe learns; rarer ones count as `OTHER`."""

OTHER = "other"

LARGEST = 1200
"""Most real images of either side that probes are fitted to."""

FIGURES = (
    Figure(
        "attributes_kept",
        "Attributes kept",
        "higher",
        "Share of the attributes (hair, skin, clothes …) in which a sample in the domain agrees with the "
        "source model's sample from the same noise, by probes on features. Chance pairs them at random.",
        percent=True,
        chance="attributes_kept_chance",
        part="attributes",
    ),
)


@dataclass(frozen=True, eq=False)
class Labelled:
    """Real images with known attributes.

    Attributes:
        rows: Perceptual features with shape (N, P). Pooled ones do not know where colours are.
        attributes: What is known of each.
    """

    rows: Floats
    attributes: Attributes

    @cached_property
    def probes(self) -> Mapping[str, Probe]:
        """A probe of each attribute that has at least two values of `FEWEST` images each."""
        labels = {}
        for name in dict.fromkeys(name for each in self.attributes for name in each):
            values = [each.get(name, OTHER) for each in self.attributes[:LARGEST]]
            numbers = Counter(values)
            known = [value if numbers[value] >= FEWEST else OTHER for value in values]
            if len({*known} - {OTHER}) >= 2:
                labels[name] = known
        ridge = Ridge(self.rows[:LARGEST]) if labels else None
        return {} if ridge is None else {name: ridge.fit(values) for name, values in labels.items()}


@dataclass(frozen=True)
class Kept:
    """How often one attribute is kept.

    Attributes:
        agreement: For each pair whether both predictions are the same, with shape (N,).
        kept: Share of pairs that agree.
        chance: The same with the samples paired at random.
        ceiling: Share of held-out real images whose value the probe gets right: no more can be seen.
        probed_by: Whose real images taught the probe that looks at the adapted samples.
    """

    agreement: np.ndarray
    kept: float
    chance: float
    ceiling: float
    probed_by: str

    def to_json(self) -> dict[str, Any]:
        """Return the figures by name."""
        names = ("kept", "chance", "ceiling", "probed_by")
        return {name: getattr(self, name) for name in names}


def attributes_kept(
    samples: Floats, source: Floats, source_domain: Labelled, target_domain: Labelled | None = None
) -> dict[str, Kept]:
    """Compare what probes see in adapted samples and in the source's samples from the same noise.

    A probe learns each attribute from real images of the source's domain and looks at both samples of a pair.
    Where the target's real images know the same attribute with at least two of the same values, a probe of
    their own looks at the adapted samples: one that only knows the source's hand may misread another.
    The chance is exact: Σ_v p(v) q(v) over the two sides' shares of each value.

    Args:
        samples: Perceptual features of adapted samples, with shape (N, P), N ≥ 1.
        source: The source's samples from the same noise, in the same order.
        source_domain: Real images of the source's domain.
        target_domain: Real images of the target.

    Returns:
        The result of each attribute by its name.
    """
    own = {} if target_domain is None else target_domain.probes
    found = {}
    for name, probe in source_domain.probes.items():
        transferred = own.get(name)
        shared = transferred is not None and len({*transferred.classes} & {*probe.classes}) >= 2
        looking = transferred if transferred is not None and shared else probe
        seen, expected = np.array(looking.predict(samples)), np.array(probe.predict(source))
        agreement = seen == expected
        values = np.unique(expected)  # in order: a set's differs by process, and with it the last digit
        chance = sum(float((seen == value).mean() * (expected == value).mean()) for value in values)
        ceiling = min(probe.accuracy, looking.accuracy)
        learnt = "target" if shared else "source"
        found[name] = Kept(agreement, float(agreement.mean()), chance, ceiling, learnt)
    return found


def summary(kept: Mapping[str, Kept], resamples: int, seed: int) -> dict[str, Any]:
    """Return the means over attributes, the interval of the share kept, and each attribute's figures.

    Args:
        kept: What `attributes_kept` found; at least one attribute.
        resamples: Random halves of the pairs for the interval.
        seed: Seed of the draws.
    """
    agreement = np.mean([each.agreement for each in kept.values()], axis=0)
    number, value = len(agreement), float(agreement.mean())
    figures = {
        "number": number,
        "attributes_kept": value,
        "attributes_kept_chance": float(np.mean([each.chance for each in kept.values()])),
        "attributes_kept_ceiling": float(np.mean([each.ceiling for each in kept.values()])),
        "each": {name: each.to_json() for name, each in kept.items()},
    }
    if number >= 4 and resamples >= 2:
        halves = [float(agreement[half].mean()) for half in half_samples(number, resamples, seed)]
        figures["intervals"] = {"attributes_kept": interval(value, halves, number)}
    return figures
