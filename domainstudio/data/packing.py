"""From an origin to an image set: read every image, refuse what cannot be used, pack the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from PIL import ImageColor

from domainstudio.config import PrepareSettings
from domainstudio.data.image_set import ImageRecord, ImageSet, Refusal
from domainstudio.data.origins import Candidate, Lister, list_origin
from domainstudio.data.reading import Prepared, prepare_image
from domainstudio.errors import ConfigError, DataError


def prepare(
    origin: str,
    settings: PrepareSettings,
    listers: Mapping[str, Lister] = MappingProxyType({}),
    buckets: bool = False,
) -> ImageSet:
    """Read, check and pack every image of an origin.

    Refused are files that cannot be read faithfully, and duplicates: the same bytes as an earlier file, or
    the same pixels once prepared (unless a demo domain wants them).

    Args:
        origin: A folder, or an origin that one of `listers` lists.
        settings: Section `prepare` of `params.yaml`.
        listers: See `list_origin`.
        buckets: Pack every image in its aspect-ratio bucket too.

    Raises:
        ConfigError: `prepare.background` is no colour.
        DataError: the origin is not usable; files were refused and `prepare.on_refusal` is `stop`; or none
            was left.
        MissingExtraError: the origin needs a package that is not installed.
    """
    _check_background(settings.background)
    listing = list_origin(origin, listers)
    collector = _Collector(settings, listing.keep_repeats, buckets)
    for candidate in listing.candidates:
        collector.add(candidate)
    _judge(origin, collector, settings)
    return ImageSet(
        images=np.stack(collector.pixels),
        records=tuple(collector.records),
        origin=origin,
        licence=listing.licence,
        attribution=listing.attribution,
        refused=tuple(collector.refused),
        ignored=listing.ignored,
        bucketed=tuple(collector.bucketed),
    )


class _Collector:
    """Accepted and refused images so far, and what is needed to notice a duplicate."""

    def __init__(self, settings: PrepareSettings, keep_repeats: bool, buckets: bool) -> None:
        self.settings = settings
        self.keep_repeats = keep_repeats
        self.buckets = buckets
        self.pixels: list[np.ndarray] = []
        self.bucketed: list[np.ndarray] = []
        self.records: list[ImageRecord] = []
        self.refused: list[Refusal] = []
        self._files: dict[str, str] = {}
        self._pictures: dict[bytes, str] = {}

    def add(self, candidate: Candidate) -> None:
        try:
            data = candidate.read()
            caption = candidate.caption()
            sha256 = hashlib.sha256(data).hexdigest()
            if (twin := self._files.get(sha256)) and not self.keep_repeats:
                raise DataError(f"the same file as {twin}. Remove one of them")
            picture = candidate.rasterize(data, self.settings.resolution) if candidate.rasterize else data
            prepared = prepare_image(picture, self.settings, self.buckets)
            if (twin := self._pictures.get(_fingerprint(prepared))) and not self.keep_repeats:
                raise DataError(f"the same pixels as {twin}, once prepared. Remove one of them")
        except DataError as error:
            self.refused.append(Refusal(candidate.origin, str(error)))
            return
        self._files[sha256] = self._pictures[_fingerprint(prepared)] = candidate.origin
        self.pixels.append(prepared.pixels)
        if prepared.bucketed is not None:
            self.bucketed.append(prepared.bucketed)
        self.records.append(
            ImageRecord(
                id=candidate.id,
                sha256=sha256,
                width=prepared.width,
                height=prepared.height,
                origin=candidate.origin,
                caption=caption,
                label=candidate.label,
                codepoint=candidate.codepoint,
                keywords=candidate.keywords,
            )
        )


def _fingerprint(prepared: Prepared) -> bytes:
    return hashlib.sha256(prepared.pixels.tobytes()).digest()


def _judge(origin: str, collector: _Collector, settings: PrepareSettings) -> None:
    refused, total = collector.refused, len(collector.refused) + len(collector.records)
    reasons = "".join(f"\n  {refusal.origin}: {refusal.reason}" for refusal in refused)
    if not collector.records:
        raise DataError(f"{origin}: none of its {total} images can be used:{reasons}")
    if refused and settings.on_refusal == "stop":
        raise DataError(
            f"{origin}: {len(refused)} of {total} images cannot be used:{reasons}\n"
            "Correct or remove them, or set prepare.on_refusal: skip to leave them out."
        )


def _check_background(colour: str) -> None:
    try:
        ImageColor.getrgb(colour)
    except ValueError as error:
        raise ConfigError(f"prepare.background must be a colour as #rrggbb, got {colour!r}") from error
