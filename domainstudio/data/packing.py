"""From an origin to an image set: read every image, refuse what cannot be used, pack the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np
from PIL import ImageColor

from domainstudio.config import PrepareSettings
from domainstudio.data.image_set import ImageRecord, ImageSet, Refusal, draw_indices
from domainstudio.data.origins import Candidate, Lister, Listing, list_origin, printable
from domainstudio.data.reading import Prepared, prepare_image
from domainstudio.errors import ConfigError, DataError


def prepare(
    origin: str,
    settings: PrepareSettings,
    listers: Mapping[str, Lister] = MappingProxyType({}),
    buckets: bool = False,
    *,
    number: int | None = None,
    seed: int = 0,
) -> ImageSet:
    """Read, check and pack the images of an origin.

    Files that cannot be read faithfully are refused. So are duplicates, by their bytes or by their prepared
    pixels, unless the origin keeps them.

    Args:
        origin: A folder, or an origin that one of `listers` lists.
        settings: Section `prepare` of `params.yaml`.
        listers: See `list_origin`.
        buckets: Pack every image in its aspect-ratio bucket too.
        number: How many to read, drawn from the listing; None reads all.
        seed: Seed of that draw.

    Raises:
        ConfigError: `prepare.background` is no colour.
        DataError: the origin is not usable or has too few images; files were refused and
            `prepare.on_refusal` is `stop`; or none was left.
        MissingExtraError: the origin needs a package that is not installed.
    """
    _check_background(settings.background)
    listing = list_origin(origin, listers)
    if number is not None:
        chosen = draw_indices(len(listing.candidates), number, seed, origin)
        listing = replace(listing, candidates=tuple(listing.candidates[index] for index in chosen))
    accepted, refused = _read_all(listing, settings, buckets)
    _check_refused(origin, refused, len(accepted), settings)
    return ImageSet(
        images=np.stack([prepared.pixels for _, prepared in accepted]),
        records=tuple(record for record, _ in accepted),
        origin=origin,
        licence=listing.licence,
        attribution=listing.attribution,
        refused=tuple(refused),
        ignored=listing.ignored,
        bucketed=tuple(prepared.bucketed for _, prepared in accepted if prepared.bucketed is not None),
    )


def _read_all(
    listing: Listing, settings: PrepareSettings, buckets: bool
) -> tuple[list[tuple[ImageRecord, Prepared]], list[Refusal]]:
    """Return all images that can be used, and the refusal of each other one."""
    accepted: list[tuple[ImageRecord, Prepared]] = []
    refused: list[Refusal] = []
    seen: dict[str, str] = {}
    for candidate in listing.candidates:
        try:
            accepted.append(_read(candidate, settings, buckets, {} if listing.keep_repeats else seen))
        except DataError as error:
            refused.append(Refusal(candidate.origin, printable(str(error))))
    return accepted, refused


def _read(
    candidate: Candidate, settings: PrepareSettings, buckets: bool, seen: dict[str, str]
) -> tuple[ImageRecord, Prepared]:
    """Read and prepare an image; `seen` maps digests of earlier files and of their pixels to origins."""
    data, caption = candidate.read(), candidate.caption()
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 in seen:
        raise DataError(f"the same file as {seen[sha256]}. Remove one of them")
    picture = candidate.rasterize(data, settings.resolution) if candidate.rasterize else data
    prepared = prepare_image(picture, settings, buckets)
    pixels = hashlib.sha256(prepared.pixels.tobytes()).hexdigest()
    if pixels in seen:
        raise DataError(f"the same pixels as {seen[pixels]}, once prepared. Remove one of them")
    seen[sha256] = seen[pixels] = candidate.origin
    record = ImageRecord(
        id=candidate.id,
        sha256=sha256,
        width=prepared.width,
        height=prepared.height,
        origin=candidate.origin,
        caption=caption,
        label=candidate.label,
        codepoint=candidate.codepoint,
        keywords=candidate.keywords,
        attributes=candidate.attributes(),
    )
    return record, prepared


def _check_refused(origin: str, refused: list[Refusal], accepted: int, settings: PrepareSettings) -> None:
    total = len(refused) + accepted
    reasons = "".join(f"\n  {refusal.origin}: {refusal.reason}" for refusal in refused)
    if not accepted:
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
