"""What the report reads: every part is optional, so that a half-run pipeline already has a report.

Folders are those of `dvc.yaml`. A missing file becomes `None`; a damaged one is an error, because a report
that leaves it out without a word would hide it.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open

from domainstudio.config import Adaptation, Combination, Settings, combination_of
from domainstudio.data import ImageRecord
from domainstudio.data.image_set import IMAGES, MANIFEST, Manifest, bucketed_name
from domainstudio.errors import DataError

BOOKKEEPING = frozenset({"step", "total", "learning_rate", "grad_norm", "seconds", "timestamp"})
"""Columns of `losses.csv` that are no loss term."""

T = TypeVar("T")


@dataclass(frozen=True)
class PackedImages:
    """A prepared image set, read image by image: a whole domain need not fit in memory for a few pictures."""

    folder: Path
    manifest: Manifest

    @property
    def number(self) -> int:
        """How many images the set holds."""
        return len(self.manifest.images)

    @property
    def records(self) -> Sequence[ImageRecord]:
        """The manifest's entry of each image."""
        return self.manifest.images

    def image(self, index: int) -> Image.Image:
        """One image, RGB; in its aspect-ratio bucket, where it has one (metrics measure its square).

        Raises:
            DataError: the packed images are missing, damaged, or fewer than the manifest says.
        """
        path = self.folder / IMAGES
        try:
            with safe_open(path, framework="numpy") as tensors:
                if (name := bucketed_name(index)) in tensors.keys():  # noqa: SIM118
                    pixels = tensors.get_tensor(name)
                else:
                    pixels = tensors.get_slice("images")[index : index + 1][0]
            return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        except (OSError, SafetensorError, IndexError, ValueError) as error:
            raise DataError(
                f"{path}: cannot read image {index} ({error}). Run stage prepare again"
            ) from error


@dataclass(frozen=True)
class Samples:
    """Generated images on disk, in the manifest's order."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def number(self) -> int:
        """How many images were drawn."""
        return len(self.manifest["images"])

    @cached_property
    def index_of_seed(self) -> dict[int, int]:
        """Position of the image drawn from each seed."""
        return {int(item["seed"]): index for index, item in enumerate(self.manifest["images"])}

    def seed(self, index: int) -> int:
        """Seed of the noise of one image."""
        return int(self.manifest["images"][index]["seed"])

    def subject(self, index: int) -> str:
        """Subject of one image; empty if its model is unconditional."""
        return str(self.manifest["images"][index].get("subject", ""))

    def title(self, index: int) -> str:
        """Its prompt, if it has one, and the seed of its noise."""
        prompt = self.manifest["images"][index].get("prompt")
        noise = f"noise {self.seed(index)}"
        return f"{prompt} · {noise}" if prompt else noise

    def image(self, index: int) -> Image.Image:
        """One image, RGB.

        Raises:
            DataError: the file is missing or is no image.
        """
        return open_image(self.folder / self.manifest["images"][index]["file"])


@dataclass(frozen=True)
class Pair:
    """A generated image and the training image nearest to it in feature space."""

    sample: int
    training: int
    distance: float
    mirrored: bool
    """Whether the sample is that near to the training image's mirror image."""


@dataclass(frozen=True)
class Nearest:
    """All pairs, closest first; below `threshold` a sample counts as memorised."""

    threshold: float
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class TradeoffPoint:
    """The adapted model alone, or in a combination with its source model, measured."""

    combination: Combination | None
    scores: Mapping[str, Any]
    images: Path
    """A picture of the first samples in a row."""


@dataclass(frozen=True)
class Tradeoff:
    """What the stage `tradeoff` measured of one adaptation: the model alone first."""

    points: tuple[TradeoffPoint, ...]
    references: Mapping[str, Mapping[str, Any]]
    """The same figures of other images, as in metrics.json."""


@dataclass(frozen=True)
class Results:
    """What one adaptation has produced so far."""

    adaptation: Adaptation
    samples: Samples | None
    losses: Mapping[str, np.ndarray] | None
    """Columns of `losses.csv`, float64 `(rows,)`, NaN where a cell is empty."""
    previews: tuple[tuple[int, Path], ...]
    """Step and file of each preview, in the order of training."""
    metrics: Mapping[str, Any] | None
    nearest: Nearest | None
    selection: Path
    """Folder of the choice among the candidates of the training, where there was one."""
    tradeoff: Tradeoff | None = None

    @cached_property
    def memorized(self) -> frozenset[int]:
        """Positions of the memorised samples."""
        pairs, threshold = (self.nearest.pairs, self.nearest.threshold) if self.nearest else ((), 0.0)
        return frozenset(pair.sample for pair in pairs if pair.distance < threshold)

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the loss terms that were logged."""
        return tuple(name for name in self.losses or () if name not in BOOKKEEPING)


@dataclass(frozen=True)
class Target:
    """A target domain: the training images, and the whole domain."""

    shots: PackedImages | None
    domain: PackedImages | None

    def unseen(self, number: int) -> list[int]:
        """Evenly spaced positions of domain images that are not among the training images (by file hash)."""
        if self.domain is None:
            return []
        seen = {record.sha256 for record in self.shots.records} if self.shots else set()
        rest = [i for i, record in enumerate(self.domain.records) if record.sha256 not in seen]
        count = min(number, len(rest))
        return [rest[i * len(rest) // count] for i in range(count)]


@dataclass(frozen=True)
class Content:
    """Everything that the report shows."""

    settings: Settings
    source_images: Mapping[str, PackedImages | None]
    targets: Mapping[str, Target]
    sources: Mapping[str, Samples | None]
    results: tuple[Results, ...]


def read(root: Path, settings: Settings, names: Sequence[str] | None = None) -> Content:
    """Read the outputs of the stages below `root`, of all adaptations or those that are named.

    Raises:
        ConfigError: there is no adaptation of a name.
        DataError: a file is there but cannot be understood.
    """
    adaptations = settings.resolved.values() if names is None else [settings.adaptation(n) for n in names]
    targets = {
        name: Target(*(_packed(root / "data/targets" / name / part) for part in ("shots", "domain")))
        for name in dict.fromkeys(item.target for item in adaptations)
    }
    sources = {
        name: _samples(root / "samples/sources" / name)
        for name in dict.fromkeys(item.source for item in adaptations)
    }
    source_images = {name: _packed(root / "data/sources" / name) for name in sources}
    results = tuple(_results(root, item) for item in adaptations)
    return Content(settings, source_images, targets, sources, results)


def open_image(path: Path) -> Image.Image:
    """Read an image file as RGB.

    Raises:
        DataError: the file is missing or is no image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(
            f"{path}: cannot read the image ({error}). Run the stage that writes it again"
        ) from error


def read_selection(folder: Path) -> Mapping[str, Any] | None:
    """Return the record of a choice among candidates; None where there is none.

    Raises:
        DataError: it cannot be understood.
    """
    return _parsed(folder / "selection.json", _selection)


def _results(root: Path, adaptation: Adaptation) -> Results:
    training, evaluation = root / "training" / adaptation.name, root / "evaluation" / adaptation.name
    tradeoff = root / "tradeoff" / adaptation.name
    return Results(
        adaptation=adaptation,
        samples=_samples(root / "samples/adapted" / adaptation.name),
        losses=_parsed(training / "losses.csv", _losses),
        previews=_previews(training / "previews"),
        metrics=_parsed(evaluation / "metrics.json", _mapping),
        nearest=_parsed(evaluation / "nearest.json", _nearest),
        tradeoff=_parsed(tradeoff / "tradeoff.json", partial(_tradeoff, tradeoff)),
        selection=training / "selection",
    )


def _packed(folder: Path) -> PackedImages | None:
    manifest = _parsed(folder / MANIFEST, Manifest.model_validate_json)
    return None if manifest is None else PackedImages(folder, manifest)


def _samples(folder: Path) -> Samples | None:
    manifest = _parsed(folder / "manifest.json", _samples_manifest)
    return None if manifest is None else Samples(folder, manifest)


def _parsed(path: Path, parse: Callable[[str], T]) -> T | None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        return parse(text)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be understood ({error!r}): run the stage that writes it again"
        ) from error


def _mapping(text: str) -> Mapping[str, Any]:
    # NaN and infinities are what json.dumps makes of figures that could not be computed.
    values = json.loads(text, parse_constant=lambda _: None)
    if not isinstance(values, dict):
        raise ValueError(f"expected a mapping, got {type(values).__name__}")
    return values


def _samples_manifest(text: str) -> Mapping[str, Any]:
    manifest = _mapping(text)
    if manifest["format"] != 1:
        raise ValueError(f"format {manifest['format']!r} is not 1, the one this version reads")
    for item in manifest["images"]:
        str(item["file"]), int(item["seed"])
    return manifest


def _selection(text: str) -> Mapping[str, Any]:
    values = _mapping(text)
    if values["format"] != 1:
        raise ValueError(f"format {values['format']!r} is not 1, the one this version reads")
    for item in values["candidates"]:
        int(item["step"]), str(item["name"])
    return values


def _losses(text: str) -> Mapping[str, np.ndarray]:
    rows = list(csv.DictReader(text.splitlines()))
    names = list(rows[0]) if rows else []
    columns = {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}
    if rows and "step" not in columns:
        raise ValueError("there is no column `step`")
    return columns


def _nearest(text: str) -> Nearest:
    values = _mapping(text)
    pairs = [
        Pair(int(item["sample"]), int(item["training"]), float(item["distance"]), bool(item.get("mirrored")))
        for item in values["pairs"]
        if item["distance"] is not None
    ]
    threshold = float(values["threshold"])
    if not math.isfinite(threshold):
        raise ValueError("the threshold is not a number")
    return Nearest(threshold, tuple(sorted(pairs, key=lambda pair: (pair.distance, pair.sample))))


def _tradeoff(folder: Path, text: str) -> Tradeoff | None:
    values = _mapping(text)
    points = []
    for item in values["points"]:
        combine = item.get("combine")
        combination = None if combine is None else combination_of(combine)
        points.append(TradeoffPoint(combination, dict(item["scores"]), folder / str(item["images"])))
    return Tradeoff(tuple(points), values.get("references") or {}) if points else None


def _previews(folder: Path) -> tuple[tuple[int, Path], ...]:
    found = ((re.fullmatch(r"step-(\d+)\.png", path.name), path) for path in folder.glob("step-*.png"))
    return tuple(sorted((int(match[1]), path) for match, path in found if match))
