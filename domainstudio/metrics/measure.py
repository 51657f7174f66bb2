"""From images to a report: encode every set once, then compute every metric."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from domainstudio.config import EvaluateSettings
from domainstudio.data import ImageSet
from domainstudio.metrics import clip, pairing
from domainstudio.metrics.evaluation import Images, MetricReport, evaluate, held_out, split_domain
from domainstudio.metrics.features import FEATURES, FeatureNetwork, Features, extract
from domainstudio.metrics.networks import load_network
from domainstudio.metrics.pairing import SampleTexts, Texts
from domainstudio.sampling import load_samples

Encode = Callable[[Images, str], Features]


@dataclass(frozen=True, eq=False)
class _Sets:
    """The sets of images of one evaluation; `rest` are the domain's images that are no training images."""

    samples: Images
    source: Images
    shots: Images
    domain: Images
    rest: list[int]


@dataclass(frozen=True, eq=False)
class _Encoded:
    """Features of the same sets by one network; `rest` is None where there are no such images."""

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
    texts = Texts(SampleTexts.read(drawn), SampleTexts.read(drawn_source), *captions)
    report = measure_images(*images, settings, cache, texts=texts, progress=True)
    return report.metrics(), report.nearest_pairs([image["seed"] for image in drawn])


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
        texts: captions of the images, and the samples' subjects and prompts: subjects for the paired
            measure, prompts for the CLIP score.
        progress: show a bar per set.
    """
    sets = _Sets(samples, source, shots, domain, held_out(domain, shots))
    encode = _encoder(load_network(settings.features), settings, cache, "encode" if progress else None)
    encoded = _encode(sets, encode)
    mirrored = encode(shots[..., ::-1], "mirrored shots")
    report = evaluate(encoded.samples, encoded.shots, encoded.rest, encoded.source, settings, mirrored)
    parts = {}
    if texts is not None and any(texts.samples.subjects):
        parts["paired"] = _paired(sets, encoded, texts)
    if settings.clip is not None:
        network = clip.load_clip(settings.clip)
        seen = _encode(sets, _encoder(network, settings, cache, "CLIP of" if progress else None))
        parts["clip"] = _clip(sets, seen, texts, network, settings)
    return replace(report, parts=parts)


def _entries(folder: Path) -> list[dict[str, Any]]:
    content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return list(content["images"])


def _encoder(network: FeatureNetwork, settings: EvaluateSettings, cache: Path, verb: str | None) -> Encode:
    def encode(images: Images, title: str) -> Features:
        progress = None if verb is None else f"{verb} {title}"
        return extract(images, network, settings.batch_size, cache, progress)

    return encode


def _encode(sets: _Sets, encode: Encode) -> _Encoded:
    return _Encoded(
        samples=encode(sets.samples, "samples"),
        source=encode(sets.source, "source"),
        shots=encode(sets.shots, "shots"),
        rest=encode(sets.domain[sets.rest], "domain") if sets.rest else None,
    )


def _paired(sets: _Sets, encoded: _Encoded, texts: Texts) -> dict[str, Any]:
    """Look for the subjects' drawings in the whole domain.

    The training images are part of it: a copy of one of them keeps no other subject.
    """
    names = pairing.drawing_names([*sets.shots, *sets.domain], [*texts.shots, *texts.domain])
    of_shots, of_domain = names[: len(sets.shots)], names[len(sets.shots) :]
    parts = [encoded.shots] if encoded.rest is None else [encoded.shots, encoded.rest]
    drawings = pairing.Drawings(
        np.concatenate([part.perceptual for part in parts]),
        [*of_shots, *(of_domain[index] for index in sets.rest)],
        trained=frozenset().union(*of_shots),
    )
    samples = pairing.retrieval(encoded.samples.perceptual, texts.samples.subjects, drawings)
    references = {}
    if any(texts.source.subjects):
        source = pairing.retrieval(encoded.source.perceptual, texts.source.subjects, drawings)
        references["source"] = source.to_json()
    return {"samples": samples.to_json(), "references": references}


def _clip(
    sets: _Sets, seen: _Encoded, texts: Texts | None, network: clip.ClipNetwork, settings: EvaluateSettings
) -> dict[str, Any]:
    """Measure the samples, the source and the real images that `evaluate` measures as samples."""

    def scores(images: Features, shown: SampleTexts | None) -> dict[str, Any]:
        prompts, subjects = ((), ()) if shown is None else (shown.prompts, shown.subjects)
        return clip.scores(network, images, seen.shots, prompts, subjects).to_json()

    references = {"source": scores(seen.source, None if texts is None else texts.source)}
    if seen.rest is not None and len(seen.rest) >= 2:
        drawn, _ = split_domain(len(seen.rest), len(seen.samples), settings.seed)
        captions = () if texts is None else tuple(texts.domain[sets.rest[index]] for index in drawn)
        references["domain"] = scores(seen.rest.take(drawn), SampleTexts(captions, captions))
    return {
        "model": network.name,
        "digest": network.digest,
        "samples": scores(seen.samples, None if texts is None else texts.samples),
        "references": references,
    }
