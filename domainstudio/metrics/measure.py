"""From images to a report: encode every set once, then compute every metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from domainstudio.config import EvaluateSettings
from domainstudio.data import ImageSet
from domainstudio.data.image_set import MANIFEST
from domainstudio.errors import DataError
from domainstudio.metrics import clip, pairing
from domainstudio.metrics.attributes import Attributes, Labelled, attributes_kept
from domainstudio.metrics.attributes import summary as attributes_summary
from domainstudio.metrics.evaluation import Images, MetricReport, evaluate, held_out, split_domain
from domainstudio.metrics.features import FEATURES, FeatureNetwork, Features, extract
from domainstudio.metrics.garbage import garbage
from domainstudio.metrics.networks import load_network
from domainstudio.metrics.pairing import SampleTexts, Texts
from domainstudio.sampling import load_samples
from domainstudio.storage.files import read_json


def measure_folders(
    samples: Path,
    source: Path,
    target: Path,
    settings: EvaluateSettings,
    cache: Path = FEATURES,
    source_images: Path | None = None,
    *,
    references: bool = True,
    memo: dict[Any, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the contents of metrics.json and nearest.json.

    Args:
        samples: folder of the adapted model's samples.
        source: folder of the source model's samples.
        target: folder with the image sets `shots` and `domain`.
        settings: how to measure.
        cache: folder that keeps features.
        source_images: folder with real images of the source's domain; it may have none, or not be there.
        references: whether to measure the references too; they are the same for all samples of a target.
        memo: what an earlier call has computed for the same target, settings and real source images.

    Raises:
        DataError: a folder is missing or damaged.
    """
    known_source = None
    if source_images is not None and (source_images / MANIFEST).is_file():
        known_source = ImageSet.load(source_images)
    shots, domain = (ImageSet.load(target / part) for part in ("shots", "domain"))
    images = (load_samples(samples), load_samples(source), shots.images, domain.images)
    drawn, drawn_source = (_entries(folder) for folder in (samples, source))
    captions = (tuple(record.caption for record in part.records) for part in (shots, domain))
    known = Known(
        texts=Texts(SampleTexts.read(drawn), SampleTexts.read(drawn_source), *captions),
        source_domain=known_source,
        domain_attributes=tuple(record.attributes for record in domain.records),
        pairs=_pairs(drawn, drawn_source),
    )
    report = measure_images(
        *images, settings, cache, known=known, progress=True, references=references, memo=memo
    )
    return report.metrics(), report.nearest_pairs([image["seed"] for image in drawn])


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of the images of one evaluation beside their pixels.

    Attributes:
        texts: Captions of the images, and the samples' subjects and prompts: subjects for the paired measure,
            prompts for the CLIP score.
        source_domain: Real images of the source's domain, and their attributes.
        domain_attributes: Attributes of each image of the target domain.
        pairs: Positions of a sample and of the source's sample from the same noise.
    """

    texts: Texts | None = None
    source_domain: ImageSet | None = None
    domain_attributes: Attributes = ()
    pairs: Sequence[tuple[int, int]] = ()


def measure_images(
    samples: Images,
    source: Images,
    shots: Images,
    domain: Images,
    settings: EvaluateSettings,
    cache: Path,
    *,
    known: Known | None = None,
    progress: bool = False,
    references: bool = True,
    memo: dict[Any, Any] | None = None,
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
        known: what else is known of the images.
        progress: show a bar per set.
        references: whether to measure the references too.
        memo: see `Measured.memo`.
    """
    known = Known() if known is None else known
    memo = {} if memo is None else memo
    texts, rest = known.texts, held_out(domain, shots)
    sets = {"samples": samples, "source": source, "shots": shots, "domain": domain}
    encode = partial(_encode, rest=rest, settings=settings, cache=cache, progress=progress)
    further = {"mirrored shots": shots[..., ::-1], "garbage": garbage(shots, settings.seed)}
    if known.source_domain is not None:
        further["source domain"] = known.source_domain.images
    encoded = encode(sets | further, load_network(settings.features), "encode")
    domain_features, mirrored = encoded.get("domain"), encoded["mirrored shots"]
    report = evaluate(
        encoded["samples"],
        encoded["shots"],
        domain_features,
        encoded["source"],
        settings,
        mirrored,
        encoded.get("source domain"),
        encoded["garbage"],
        references=references,
        memo=memo,
    )
    parts = {}
    if kept := _attributes(encoded, known, rest, report.in_domain, settings, memo):
        parts["attributes"] = kept
    if texts is not None and any(texts.samples.subjects):
        names = pairing.drawing_names([*shots, *domain], [*texts.shots, *texts.domain])
        of_shots, of_domain = names[: len(shots)], names[len(shots) :]
        parts["paired"] = _paired(encoded, texts, of_shots, [of_domain[index] for index in rest])
    if settings.clip is not None:
        network = clip.load_clip(settings.clip)
        captions = () if texts is None else tuple(texts.domain[index] for index in rest)
        parts["clip"] = _clip(encode(sets, network, "CLIP of"), texts, captions, network, settings)
    return replace(report, parts=parts)


def _pairs(
    samples: Sequence[Mapping[str, Any]], source: Sequence[Mapping[str, Any]]
) -> list[tuple[int, int]]:
    """Return positions of samples and of the source's samples with the same seed."""
    position = {entry["seed"]: index for index, entry in enumerate(source)}
    return [(i, position[entry["seed"]]) for i, entry in enumerate(samples) if entry["seed"] in position]


def _attributes(
    encoded: Mapping[str, Features],
    known: Known,
    rest: Sequence[int],
    inside: NDArray[np.bool_] | None,
    settings: EvaluateSettings,
    memo: dict[Any, Any],
) -> dict[str, Any]:
    """Return the attributes kept by samples in the domain; empty where none are known, or no such sample."""
    pairs = [pair for pair in known.pairs if inside is None or inside[pair[0]]]
    if known.source_domain is None or not pairs:
        return {}
    own, other = np.array(pairs).T
    if Labelled not in memo:
        attributes = tuple(record.attributes for record in known.source_domain.records)
        source, target = Labelled(encoded["source domain"].perceptual, attributes), None
        if known.domain_attributes and "domain" in encoded:
            named = tuple(known.domain_attributes[index] for index in rest)
            target = Labelled(encoded["domain"].perceptual, named)
        memo[Labelled] = source, target
    rows = encoded["samples"].perceptual[own], encoded["source"].perceptual[other]
    kept = attributes_kept(*rows, *memo[Labelled])
    if not kept:
        return {}
    found = attributes_summary(kept, settings.resamples, settings.seed)
    return {"samples": found, "references": {}}


def _entries(folder: Path) -> list[dict[str, Any]]:
    content = read_json(folder / "manifest.json", "Delete its folder and draw again")
    entries = content.get("images")
    if not isinstance(entries, list) or not all(isinstance(e, dict) and "seed" in e for e in entries):
        raise DataError(f"{folder}/manifest.json is damaged: it has no list of images with seeds. Draw again")
    return entries


def _encode(
    sets: Mapping[str, Images],
    network: FeatureNetwork,
    verb: str,
    rest: Sequence[int],
    settings: EvaluateSettings,
    cache: Path,
    progress: bool,
) -> dict[str, Features]:
    """Return the features of every set that has images; `verb` and a set's name are its bar's title.

    The whole domain is encoded, so that its features serve every draw of training images; only the images at
    `rest` are returned.
    """
    found = {
        name: extract(images, network, settings.batch_size, cache, f"{verb} {name}" if progress else None)
        for name, images in sets.items()
        if len(images)
    }
    if "domain" in found:
        found["domain"] = found["domain"].take(rest)
    return {name: features for name, features in found.items() if len(features)}


def _paired(
    encoded: Mapping[str, Features],
    texts: Texts,
    of_shots: Sequence[frozenset[str]],
    of_domain: Sequence[frozenset[str]],
) -> dict[str, Any]:
    """Look for the subjects' drawings in the whole domain.

    The training images are part of it: a copy of one of them keeps no other subject.

    Args:
        encoded: Features by set.
        texts: The samples' subjects.
        of_shots: Names of each training image.
        of_domain: Names of each other image of the domain.
    """
    rows = [encoded[name].perceptual for name in ("shots", "domain") if name in encoded]
    trained = frozenset().union(*of_shots)
    drawings = pairing.Drawings(np.concatenate(rows), [*of_shots, *of_domain], trained)
    samples, source = (
        pairing.retrieval(encoded[name].perceptual, subjects, drawings).to_json()
        for name, subjects in (("samples", texts.samples.subjects), ("source", texts.source.subjects))
    )
    return {"samples": samples, "references": {"source": source} if any(texts.source.subjects) else {}}


def _clip(
    encoded: Mapping[str, Features],
    texts: Texts | None,
    captions: Sequence[str],
    network: clip.ClipNetwork,
    settings: EvaluateSettings,
) -> dict[str, Any]:
    """Measure the samples, the source and the real images that `evaluate` measures as samples."""

    def scores(images: Features, shown: SampleTexts | None) -> dict[str, Any]:
        prompts, subjects = ((), ()) if shown is None else (shown.prompts, shown.subjects)
        return clip.scores(network, images, encoded["shots"], prompts, subjects).to_json()

    references = {"source": scores(encoded["source"], None if texts is None else texts.source)}
    domain = encoded.get("domain")
    if domain is not None and len(domain) >= 2:
        drawn, _ = split_domain(len(domain), len(encoded["samples"]), settings.seed)
        chosen = tuple(captions[index] for index in drawn) if captions else ()
        references["domain"] = scores(domain.take(drawn), SampleTexts(chosen, chosen))
    return {
        "model": network.name,
        "digest": network.digest,
        "samples": scores(encoded["samples"], None if texts is None else texts.samples),
        "references": references,
    }
