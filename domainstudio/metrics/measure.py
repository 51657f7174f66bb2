"""From images to a report: encode every set once, then compute every metric."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from domainstudio.config import EvaluateSettings
from domainstudio.data import ImageSet
from domainstudio.metrics.clip import ClipNetwork, ClipReport, ClipScores, clip_score, load_clip
from domainstudio.metrics.diversity import intra_distance
from domainstudio.metrics.evaluation import Images, MetricReport, evaluate, held_out, split_domain
from domainstudio.metrics.features import FEATURES, FeatureNetwork, Features, extract
from domainstudio.metrics.networks import load_network
from domainstudio.metrics.pairing import PairedReport, Texts, Told, drawing_names, retrieval
from domainstudio.sampling import load_samples


@dataclass(frozen=True, eq=False)
class _Images:
    samples: Images
    source: Images
    shots: Images
    domain: Images
    rest: list[int]
    """Positions of the domain's images that are no training images."""


@dataclass(frozen=True, eq=False)
class _Encoded:
    """Features of the same sets by one network."""

    samples: Features
    source: Features
    shots: Features
    rest: Features | None


def measure_folders(
    samples: Path, source: Path, target: Path, settings: EvaluateSettings, cache: Path = FEATURES
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the contents of metrics.json and nearest.json.

    Args:
        samples: folder of the adapted model's samples.
        source: folder of the source model's samples.
        target: folder with the image sets `shots` and `domain`.
        settings: how to measure.
        cache: folder that keeps features.

    Raises:
        DataError: a folder is missing or damaged.
    """
    shots, domain = (ImageSet.load(target / part) for part in ("shots", "domain"))
    images = (load_samples(samples), load_samples(source), shots.images, domain.images)
    drawn, drawn_source = (_entries(folder) for folder in (samples, source))
    captions = (tuple(record.caption for record in part.records) for part in (shots, domain))
    texts = Texts(Told.of(drawn), Told.of(drawn_source), *captions)
    report = measure_images(*images, settings, cache, texts=texts, progress=True)
    return report.metrics(), report.nearest_pairs([image["seed"] for image in drawn])


def _entries(folder: Path) -> list[dict[str, Any]]:
    content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return list(content["images"])


def measure_images(
    samples: Images,
    source: Images,
    shots: Images,
    domain: Images,
    settings: EvaluateSettings,
    cache: Path,
    *,
    texts: Texts | None = None,
    progress: bool = False,
) -> MetricReport:
    """Measure samples against the domain's held-out images and the training images.

    Args:
        samples: the adapted model's samples, uint8 with shape (N, 3, H, W).
        source: the source model's samples.
        shots: the training images, as squares even where training had them in aspect-ratio buckets; mirrored
            copies of them count as memorised too.
        domain: the whole target domain; images that are training images are left out.
        settings: feature network, CLIP model and how to measure.
        cache: folder that keeps features.
        texts: captions of the images and what the models were told: subjects for the paired measure, prompts
            for the CLIP score.
        progress: show a bar per set.
    """
    network = load_network(settings.features)
    images = _Images(samples, source, shots, domain, held_out(domain, shots))
    encoded = _encode(images, network, settings, cache, "encode" if progress else None)
    mirrored = extract(
        shots[..., ::-1],
        network,
        settings.batch_size,
        cache,
        progress="encode mirrored shots" if progress else None,
    )
    report = evaluate(encoded.samples, encoded.shots, encoded.rest, encoded.source, settings, mirrored)
    paired = None if texts is None else _paired(images, encoded, texts)
    if settings.clip is None:
        return replace(report, paired=paired)
    clip_network = load_clip(settings.clip)
    seen = _encode(images, clip_network, settings, cache, "CLIP of" if progress else None)
    return replace(report, paired=paired, clip=_clip(images, seen, texts, clip_network, settings))


def _encode(
    images: _Images, network: FeatureNetwork, settings: EvaluateSettings, cache: Path, verb: str | None
) -> _Encoded:
    def encode(pixels: Images, title: str) -> Features:
        bar = None if verb is None else f"{verb} {title}"
        return extract(pixels, network, settings.batch_size, cache, progress=bar)

    return _Encoded(
        samples=encode(images.samples, "samples"),
        source=encode(images.source, "source"),
        shots=encode(images.shots, "shots"),
        rest=encode(images.domain[images.rest], "domain") if images.rest else None,
    )


def _paired(images: _Images, encoded: _Encoded, texts: Texts) -> PairedReport | None:
    """Look for the subjects' drawings in the whole domain.

    The training images are part of it: a copy of one of them keeps no other subject.
    """
    if not any(texts.samples.subjects):
        return None
    names = drawing_names([*images.shots, *images.domain], [*texts.shots, *texts.domain])
    trained = frozenset().union(*names[: len(images.shots)])
    names = names[: len(images.shots)] + [names[len(images.shots) + index] for index in images.rest]
    parts = [encoded.shots] if encoded.rest is None else [encoded.shots, encoded.rest]
    drawings = np.concatenate([part.perceptual for part in parts])
    samples, source = (
        retrieval(features.perceptual, told.subjects, drawings, names, trained)
        for features, told in ((encoded.samples, texts.samples), (encoded.source, texts.source))
    )
    return PairedReport(samples, source if any(texts.source.subjects) else None)


def _clip(
    images: _Images, seen: _Encoded, texts: Texts | None, network: ClipNetwork, settings: EvaluateSettings
) -> ClipReport:
    """Measure the samples, the source and the real images that `evaluate` measures as samples."""

    def scores(features: Features, told: Told | None) -> ClipScores:
        intra = intra_distance(features.perceptual, seen.shots.perceptual)
        return ClipScores(
            clip_score=None if told is None else _score(network, features, told.prompts),
            subject_clip_score=None if told is None else _score(network, features, told.subjects),
            intra_clip=intra.mean,
            intra_clip_clusters=intra.clusters,
        )

    references = {"source": scores(seen.source, None if texts is None else texts.source)}
    if seen.rest is not None and len(seen.rest) >= 2:
        drawn, _ = split_domain(len(seen.rest), len(seen.samples), settings.seed)
        captions = () if texts is None else tuple(texts.domain[images.rest[index]] for index in drawn)
        references["domain"] = scores(seen.rest.take(drawn), Told(captions, captions) if captions else None)
    samples = scores(seen.samples, None if texts is None else texts.samples)
    return ClipReport(network.name, network.digest, samples, references)


def _score(network: ClipNetwork, images: Features, texts: Sequence[str]) -> float | None:
    """Return the CLIP score of the images that have a text, or None where none has."""
    told = [index for index, text in enumerate(texts) if text]
    if not told:
        return None
    return clip_score(images.take(told), network.encode_texts([texts[index] for index in told]))
