"""Every metric of one adaptation, beside references that say what the numbers can mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from domainstudio.config import EvaluateSettings
from domainstudio.errors import DataError
from domainstudio.metrics.catalogue import METRICS
from domainstudio.metrics.features import Features
from domainstudio.metrics.in_domain import describe, in_domain
from domainstudio.metrics.intervals import intervals
from domainstudio.metrics.memorization import (
    Memorization,
    Threshold,
    memorization,
    memorization_of,
    threshold_of,
)
from domainstudio.metrics.metric import Measured, Scores

Images = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class MetricReport:
    """What `evaluate` found.

    Attributes:
        features: Name of the feature network; figures of different networks are never comparable.
        features_digest: SHA-256 of its weights.
        domain_number: Images of the domain that were the reference of the distribution metrics.
        domain_is_shots: Whether the training images had to be that reference, for want of others.
        samples: Scores of the adapted model's samples, and their `number`.
        references: The same of other sets of images, by name.
        nearest: The samples' nearest training images.
        in_domain: Whether each sample is in the domain, or None where that cannot be told.
        probe: What the probe between the domains learnt from, and its accuracy; empty without one.
        parts: Further parts of metrics.json by name, each with `samples` and `references` of its own.
    """

    features: str
    features_digest: str
    domain_number: int
    domain_is_shots: bool
    samples: Scores
    references: Mapping[str, Scores]
    nearest: Memorization = field(repr=False)
    in_domain: NDArray[np.bool_] | None = field(default=None, repr=False)
    probe: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def metrics(self) -> dict[str, Any]:
        """Return the content of metrics.json."""
        return {
            "features": self.features,
            "features_digest": self.features_digest,
            "number": self.samples["number"],
            "domain_number": self.domain_number,
            "domain_is_shots": self.domain_is_shots,
            **({"probe": self.probe} if self.probe else {}),
            "samples": self.samples,
            "references": self.references,
            **self.parts,
        }

    def nearest_pairs(self, seeds: Sequence[int] | None = None) -> dict[str, Any]:
        """Return the content of nearest.json: every sample with its nearest training image, nearest first.

        Args:
            seeds: Seed of each sample, where known.
        """
        pairs = [
            {
                "sample": index,
                **({} if seeds is None else {"seed": seeds[index]}),
                "training": int(self.nearest.training[index]),
                "mirrored": bool(self.nearest.mirrored[index]),
                "distance": float(self.nearest.distances[index]),
            }
            for index in np.argsort(self.nearest.distances, kind="stable").tolist()
        ]
        return {"threshold": self.nearest.threshold, "pairs": pairs}


def held_out(domain: Images, shots: Images) -> list[int]:
    """Return the indices of the domain's images that are no training image, pixel by pixel.

    Args:
        domain: uint8 images with shape (N, 3, H, W).
        shots: uint8 images with shape (M, 3, H, W).
    """
    seen = {shot.tobytes() for shot in shots} if domain.shape[1:] == shots.shape[1:] else set()
    return [index for index, image in enumerate(domain) if image.tobytes() not in seen]


def evaluate(
    samples: Features,
    shots: Features,
    domain: Features | None,
    source: Features | None,
    settings: EvaluateSettings,
    mirrored: Features | None = None,
    source_domain: Features | None = None,
    garbage: Features | None = None,
    *,
    references: bool = True,
    memo: dict[Any, Any] | None = None,
) -> MetricReport:
    """Measure samples, and the same way three references.

    The domain should not contain the shots (`held_out`): with them in the reference, copying the training
    images would be rewarded. References:

    * `shots`: the training images as if they were samples, what a model that only copies gets. Its
      intra-cluster distance is that of each image drawn twice, hence 0.
    * `source`: samples of the source model, what adapting has to improve on.
    * `domain`: real images in place of samples, about the best a model can get. As many as samples, at
      most half the domain, drawn with `settings.seed`, against the rest of the domain. That rest is
      smaller than the reference of the samples, so this Fréchet distance is a little too high.

    Args:
        samples: Features of the adapted model's samples.
        shots: Features of the training images.
        domain: Features of the target domain without the shots; None where nothing but the shots is known,
            which then are the reference of the distribution metrics.
        source: Features of the source model's samples, or None.
        settings: Neighbours, subsets, threshold and seed.
        mirrored: Features of the training images mirrored left to right; with them a mirrored copy counts
            as memorised too.
        source_domain: Features of real images of the source's domain. Without them the samples of the source
            model teach the probe between the domains.
        garbage: Features of images in no domain, which the probe learns too.
        references: Whether to measure the references too.
        memo: See `Measured.memo`.

    Raises:
        DataError: features come from different networks, or a set is empty.
    """
    _check_networks(samples, shots, domain, source, mirrored, source_domain, garbage)
    threshold = _threshold(domain, shots, mirrored, settings)
    measured = Measured(
        samples,
        shots if domain is None else domain,
        shots,
        mirrored,
        settings,
        source=source if source_domain is None else source_domain,
        garbage=garbage,
        memorized_below=threshold.below,
        false_alarms=threshold.false_alarms,
        memo={} if memo is None else memo,
    )
    compared = _references(measured, domain, source) if references else {}
    return MetricReport(
        features=samples.network,
        features_digest=samples.digest,
        domain_number=len(measured.reference),
        domain_is_shots=domain is None,
        samples=_scores(measured, settings.resamples),
        references={name: _scores(item) for name, item in compared.items()},
        nearest=memorization_of(measured),
        in_domain=in_domain(measured),
        probe=describe(measured, real_source=source_domain is not None),
    )


def _threshold(
    domain: Features | None, shots: Features, mirrored: Features | None, settings: EvaluateSettings
) -> Threshold:
    """Derive the distance of copies from all real images that are no training images."""
    flipped = None if mirrored is None else mirrored.perceptual
    rows = None if domain is None else domain.perceptual
    distances = None if rows is None else memorization(rows, shots.perceptual, 0.0, flipped).distances
    return threshold_of(distances, settings.memorized_below, settings.memorized_false_alarms)


def _references(measured: Measured, domain: Features | None, source: Features | None) -> dict[str, Measured]:
    found = {"shots": replace(measured, images=measured.shots, copies=True)}
    if source is not None:
        found["source"] = replace(measured, images=source)
    if domain is not None and len(domain) >= 2:
        drawn, rest = split_domain(len(domain), len(measured.images), measured.settings.seed)
        apart = domain.take(rest)
        found["domain"] = replace(measured, images=domain.take(drawn), reference=apart, memo={})
    return found


def split_domain(domain: int, samples: int, seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the images of a domain that stand for samples, as many or half of it, and the rest."""
    order = np.random.default_rng(seed).permutation(domain)
    number = min(samples, domain // 2)
    return order[:number], order[number:]


def _scores(measured: Measured, resamples: int = 0) -> Scores:
    """Return all figures of a set of images, and their intervals where `resamples` is at least 2."""
    number, seed = len(measured.images), measured.settings.seed
    scores: dict[str, Any] = {"number": number}
    bounds: dict[str, tuple[float, float]] = {}
    for metric in METRICS:
        statistic = metric.prepare(measured)
        scores |= statistic(np.arange(number))
        bounds |= intervals(metric, statistic, number, resamples, seed)
    return {**scores, "intervals": bounds} if bounds else scores


def _check_networks(*features: Features | None) -> None:
    networks = {(item.network, item.digest) for item in features if item is not None}
    if len(networks) > 1:
        raise DataError(f"features of different networks cannot be compared: {sorted(networks)}")
