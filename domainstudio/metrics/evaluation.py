"""Every metric of one adaptation, beside references that say what the numbers can mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from domainstudio.config import EvaluateSettings
from domainstudio.errors import DataError
from domainstudio.metrics.clip import ClipReport
from domainstudio.metrics.distances import Floats
from domainstudio.metrics.diversity import intra_distance
from domainstudio.metrics.features import Features
from domainstudio.metrics.frechet import frechet_distance
from domainstudio.metrics.kernel import kernel_distance
from domainstudio.metrics.memorization import Memorization, memorization
from domainstudio.metrics.neighbours import neighbour_scores
from domainstudio.metrics.pairing import PairedReport

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Scores:
    """All metrics of one set of images; None where too few images leave one undefined.

    Attributes:
        number: Images that were measured.
        frechet_distance: To the domain; see `frechet_distance`.
        kid: Kernel distance to the domain, mean over subsets.
        kid_std: Its standard deviation over subsets.
        precision: Share of images inside the domain's neighbourhoods.
        recall: Share of the domain inside the images' neighbourhoods.
        density: Like precision, robust to outliers of the domain.
        coverage: Share of the domain's neighbourhoods with an image inside.
        intra_distance: Perceptual distance among images of the same nearest training image.
        intra_clusters: Training images with at least two such images.
        intra_sizes: Images nearest to each training image.
        memorized_share: Share of images nearer to a training image than `evaluate.memorized_below`.
        nearest_distance_median: Median perceptual distance to the nearest training image.
    """

    number: int
    frechet_distance: float | None = None
    kid: float | None = None
    kid_std: float | None = None
    precision: float | None = None
    recall: float | None = None
    density: float | None = None
    coverage: float | None = None
    intra_distance: float | None = None
    intra_clusters: int | None = None
    intra_sizes: tuple[int, ...] | None = None
    memorized_share: float | None = None
    nearest_distance_median: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what is defined, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, eq=False)
class MetricReport:
    """What `evaluate` found.

    Attributes:
        features: Name of the feature network; figures of different networks are never comparable.
        features_digest: SHA-256 of its weights.
        domain_number: Images of the domain that were the reference of the distribution metrics.
        domain_is_shots: Whether the training images had to be that reference, for want of others.
        samples: Scores of the adapted model's samples.
        references: Scores of other sets of images, by name.
        nearest: The samples' nearest training images.
        paired: Whether samples show their subjects, where these are known.
        clip: CLIP's figures, where `evaluate.clip` names a model.
    """

    features: str
    features_digest: str
    domain_number: int
    domain_is_shots: bool
    samples: Scores
    references: Mapping[str, Scores]
    nearest: Memorization = field(repr=False)
    paired: PairedReport | None = None
    clip: ClipReport | None = None

    def metrics(self) -> dict[str, Any]:
        """Return the content of metrics.json."""
        parts = {"paired": self.paired, "clip": self.clip}
        return {
            "features": self.features,
            "features_digest": self.features_digest,
            "number": self.samples.number,
            "domain_number": self.domain_number,
            "domain_is_shots": self.domain_is_shots,
            "samples": self.samples.to_json(),
            "references": {name: scores.to_json() for name, scores in self.references.items()},
            **{name: part.to_json() for name, part in parts.items() if part is not None},
        }

    def nearest_pairs(self, seeds: Sequence[int] | None = None) -> dict[str, Any]:
        """Return the content of nearest.json: every sample with its nearest training image, nearest first.

        Args:
            seeds: Seed of each sample, where known.
        """
        pairs = []
        for index in np.argsort(self.nearest.distances, kind="stable").tolist():
            seed = {} if seeds is None else {"seed": seeds[index]}
            training, distance = int(self.nearest.training[index]), float(self.nearest.distances[index])
            mirrored = bool(self.nearest.mirrored[index])
            pairs.append(
                {
                    "sample": index,
                    **seed,
                    "training": training,
                    "mirrored": mirrored,
                    "distance": distance,
                }
            )
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

    Raises:
        DataError: features come from different networks, or a set is empty.
    """
    _check_networks(samples, shots, domain, source, mirrored)
    reference = shots if domain is None else domain
    measure = partial(_scores, shots=shots, mirrored=mirrored, settings=settings)
    references = {"shots": measure(shots, reference=reference, copies=True)[0]}
    if source is not None:
        references["source"] = measure(source, reference=reference)[0]
    if domain is not None and len(domain) >= 2:
        drawn, rest = split_domain(len(domain), len(samples), settings.seed)
        references["domain"] = measure(domain.take(drawn), reference=domain.take(rest))[0]
    scores, near = measure(samples, reference=reference)
    return MetricReport(
        features=samples.network,
        features_digest=samples.digest,
        domain_number=len(reference),
        domain_is_shots=domain is None,
        samples=scores,
        references=references,
        nearest=near,
    )


def _scores(
    images: Features,
    reference: Features,
    shots: Features,
    mirrored: Features | None,
    settings: EvaluateSettings,
    copies: bool = False,
) -> tuple[Scores, Memorization]:
    near = memorization(
        images.perceptual,
        shots.perceptual,
        settings.memorized_below,
        None if mirrored is None else mirrored.perceptual,
    )
    intra = intra_distance(np.repeat(images.perceptual, 2 if copies else 1, axis=0), shots.perceptual)
    scores = Scores(
        number=len(images),
        **_distribution_scores(images.pooled, reference.pooled, settings),
        intra_distance=intra.mean,
        intra_clusters=intra.clusters,
        intra_sizes=None if copies else intra.sizes,
        memorized_share=near.share,
        nearest_distance_median=near.median,
    )
    return scores, near


def _distribution_scores(images: Floats, reference: Floats, settings: EvaluateSettings) -> dict[str, Any]:
    fewest, scores = min(len(images), len(reference)), {}
    if fewest >= 2:
        kid = kernel_distance(
            images, reference, settings.kid_subset_size, settings.kid_subsets, settings.seed
        )
        scores = {
            "frechet_distance": frechet_distance(images, reference),
            "kid": kid.mean,
            "kid_std": kid.std,
        }
    if fewest > settings.neighbours:
        scores |= neighbour_scores(images, reference, settings.neighbours)._asdict()
    return scores


def split_domain(domain: int, samples: int, seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the images of a domain that stand for samples, as many or half of it, and the rest."""
    order = np.random.default_rng(seed).permutation(domain)
    number = min(samples, domain // 2)
    return order[:number], order[number:]


def _check_networks(*features: Features | None) -> None:
    networks = {(item.network, item.digest) for item in features if item is not None}
    if len(networks) > 1:
        raise DataError(f"features of different networks cannot be compared: {sorted(networks)}")
