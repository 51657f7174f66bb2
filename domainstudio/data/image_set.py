"""An image set: checked, cropped and packed images with a manifest of where each came from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError

from domainstudio.data.pictures import contact_sheet
from domainstudio.data.pixels import blocks, map_pixels, write_pixels
from domainstudio.errors import DataError

IMAGES, MANIFEST, SHEET = "images.safetensors", "manifest.json", "contact_sheet.png"


@dataclass(frozen=True)
class ImageRecord:
    """Where one image of a set came from.

    Attributes:
        id: Its name, unique in the set: the path inside the origin, or the emoji's code points.
        sha256: Hash of the file's bytes.
        width: Pixels as read, before cropping; for a drawing, as rendered.
        height: The same.
        origin: File or URL.
        caption: Text that describes it, or an empty string.
        label: Class, or None: a demo domain's group, or the folder inside the origin.
        codepoint: The emoji's code points, as in `1F9D1-200D-1F680`, or None.
        keywords: Further words for what it shows, the best first.
        attributes: What is known of it, by the attribute's name; such as `hair`: `bob`.
    """

    id: str
    sha256: str
    width: int
    height: int
    origin: str
    caption: str = ""
    label: str | None = None
    codepoint: str | None = None
    keywords: tuple[str, ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)


def bucketed_name(index: int) -> str:
    """Return the name in `IMAGES` of an image in its bucket."""
    return f"bucketed.{index}"


def draw_indices(total: int, number: int, seed: int, origin: str) -> list[int]:
    """Draw `number` of `total` images without replacement, in their order.

    Raises:
        DataError: there are fewer.
    """
    if not 1 <= number <= total:
        raise DataError(
            f"{origin} has {total} usable images and {number} were asked for: lower `number`, or add images"
        )
    return sorted(np.random.default_rng(seed).choice(total, number, replace=False).tolist())


def find_captions(records: Sequence[ImageRecord], captions: Sequence[str]) -> list[int | None]:
    """Return the position of the image of each caption, or None where there is none."""
    position = {record.caption: index for index, record in enumerate(records) if record.caption}
    return [position.get(caption) for caption in captions]


@dataclass(frozen=True)
class Refusal:
    """A file that was meant as an image and cannot be used."""

    origin: str
    reason: str


class Manifest(BaseModel):
    """`manifest.json` of an image set's folder."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1]
    origin: str
    licence: str | None
    attribution: str | None
    resolution: int
    digest: str
    images: tuple[ImageRecord, ...]
    refused: tuple[Refusal, ...]
    ignored: tuple[str, ...]


DESCRIPTION = ("origin", "licence", "attribution", "refused", "ignored")
"""What an image set and its manifest both name."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Packed square images, and on request each of them in its aspect-ratio bucket too.

    Metrics measure the squares, because feature networks take one shape. The squares also tell which image of
    a domain a training image is. Training, the contact sheet and the report use the buckets if there are any.

    Attributes:
        images: uint8 RGB images in 0 … 255, with shape (N, 3, H, W); squares, except in `buckets()`.
        records: One per image, in the same order.
        origin: What was read: a folder, an `s3://` prefix or a demo domain.
        licence: SPDX name of the images' licence, where known.
        attribution: The attribution that the licence asks for, where known.
        refused: Files that were left out, with the reason.
        ignored: Stray files that are no images.
        bucketed: The same images in their buckets, each uint8 with shape (3, H, W); empty without buckets.
    """

    images: np.ndarray
    records: tuple[ImageRecord, ...]
    origin: str
    licence: str | None = None
    attribution: str | None = None
    refused: tuple[Refusal, ...] = ()
    ignored: tuple[str, ...] = ()
    bucketed: tuple[np.ndarray, ...] = ()

    def __post_init__(self) -> None:
        shape = self.images.shape
        if self.images.dtype != np.uint8 or len(shape) != 4 or shape[1] != 3:
            raise DataError(f"{self.origin}: expected uint8 (N, 3, H, W), got {self.images.dtype} {shape}")
        if len(self.records) != shape[0]:
            raise DataError(f"{self.origin}: {shape[0]} images but {len(self.records)} records")
        if self.bucketed and len(self.bucketed) != shape[0]:
            raise DataError(f"{self.origin}: {shape[0]} images but {len(self.bucketed)} in buckets")

    def __len__(self) -> int:
        return len(self.records)

    @property
    def resolution(self) -> int:
        """Height and width, in pixels."""
        return int(self.images.shape[-1])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the bytes of images, in (N, 3, H, W) order, and buckets: equal digests, equal pixels."""
        total = hashlib.sha256()
        for block in blocks(self.images):
            total.update(block)
        for image in self.bucketed:
            total.update(f"{image.shape}".encode())
            for block in blocks(image):
                total.update(block)
        return total.hexdigest()

    def draw(self, number: int | None, seed: int) -> ImageSet:
        """Draw images without replacement, kept in their order.

        Args:
            number: How many, at least 1; None takes all.
            seed: Seed of `numpy.random.default_rng`.

        Raises:
            DataError: there are fewer than `number`.
        """
        if number is None:
            return self
        return self.take(draw_indices(len(self), number, seed, self.origin))

    def take(self, indices: Sequence[int]) -> ImageSet:
        """Return the images at `indices`, in that order, as a set of the same origin."""
        records = tuple(self.records[index] for index in indices)
        bucketed = tuple(self.bucketed[index] for index in indices) if self.bucketed else ()
        return replace(self, images=self.images[list(indices)], records=records, bucketed=bucketed)

    def buckets(self) -> tuple[ImageSet, ...]:
        """Return the images to train on, a set for each of their shapes; without buckets this set itself."""
        if not self.bucketed:
            return (self,)
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(self.bucketed):
            groups.setdefault(image.shape, []).append(index)
        return tuple(
            replace(
                self,
                images=np.stack([self.bucketed[index] for index in group]),
                records=tuple(self.records[index] for index in group),
                bucketed=(),
            )
            for _, group in sorted(groups.items())
        )

    def save(self, folder: str | Path) -> None:
        """Write the images, their manifest and a contact sheet into `folder`, the manifest last."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        bucketed = {bucketed_name(index): image for index, image in enumerate(self.bucketed)}
        write_pixels(folder / IMAGES, {"images": self.images, **bucketed})
        contact_sheet(self.bucketed or self.images).save(folder / SHEET)
        manifest = Manifest(
            format=1,
            resolution=self.resolution,
            digest=self.digest,
            images=self.records,
            **{name: getattr(self, name) for name in DESCRIPTION},
        )
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Map a folder that `save` wrote, and verify that manifest and pixels belong together.

        Pixels are read from the file when they are looked at: a set may be larger than the memory.

        Raises:
            DataError: a file is missing or damaged, or the pixels are not those of the manifest.
        """
        folder = Path(folder)
        manifest = read_manifest(folder / MANIFEST)
        described = {name: getattr(manifest, name) for name in DESCRIPTION}
        mapped = (_map_images(folder / IMAGES, "r"), _map_images(folder / IMAGES, "c"))
        try:
            # Pages that were read to compare are given back; the set itself may be changed in memory.
            compared, loaded = (
                cls(images, manifest.images, bucketed=bucketed, **described) for images, bucketed in mapped
            )
        except DataError as error:
            raise DataError(f"{folder} is damaged: {error}. {_REMEDY}") from error
        if compared.digest != manifest.digest or loaded.resolution != manifest.resolution:
            raise DataError(f"{folder / IMAGES} is not what {MANIFEST} describes (digest differs). {_REMEDY}")
        vars(loaded)["digest"] = compared.digest
        return loaded


_REMEDY = "Prepare the image set again: `dvc repro --force` its prepare stage."


def read_manifest(path: Path) -> Manifest:
    """Read an image set's manifest alone.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). {_REMEDY}") from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not an image set's manifest: {error}\n{_REMEDY}") from error


def _map_images(path: Path, mode: Literal["r", "c"]) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    try:
        arrays = map_pixels(path, mode)
        images = arrays.pop("images")
        return images, tuple(arrays[bucketed_name(index)] for index in range(len(arrays)))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or 'missing'}). {_REMEDY}") from error
    except (SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}). {_REMEDY}") from error
