"""From an origin to an image set: read every image, refuse what cannot be used, pack the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import ImageColor

from domainstudio.config import PrepareSettings
from domainstudio.data.image_set import ImageSet, Refusal, draw_indices
from domainstudio.data.origins import Lister, Listing, list_origin
from domainstudio.data.outcome import Outcome, read_candidate
from domainstudio.data.scratch import scratch_of
from domainstudio.errors import ConfigError, DataError

MANY = 256
"""Fewer images are read one by one: several processes would take longer to start."""


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
    pixels, unless the origin keeps them. `MANY` images are read by several processes into files that the set
    maps, so that they need not fit in memory. A start after one that was ended reads only the rest.

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
    if len(listing.candidates) < MANY:
        return _packed_in_memory(origin, listing, settings, buckets)
    with scratch_of(origin, settings, buckets) as scratch:
        rows = scratch.read(listing.candidates)
        kept, described = _judge(origin, listing, [outcome for _, outcome in rows], settings)
        kept_rows = [rows[index] for index in kept]
        squares = scratch.squares([slot for slot, _ in kept_rows])
        return ImageSet(squares, bucketed=scratch.bucketed(kept_rows), **described)


def _packed_in_memory(origin: str, listing: Listing, settings: PrepareSettings, buckets: bool) -> ImageSet:
    read = [read_candidate(candidate, settings, buckets) for candidate in listing.candidates]
    kept, described = _judge(origin, listing, [outcome for outcome, _ in read], settings)
    prepared = [found for index in kept if (found := read[index][1]) is not None]
    squares = np.stack([each.pixels for each in prepared])
    bucketed = tuple(each.bucketed for each in prepared if each.bucketed is not None)
    return ImageSet(squares, bucketed=bucketed, **described)


def _judge(
    origin: str, listing: Listing, outcomes: Sequence[Outcome], settings: PrepareSettings
) -> tuple[list[int], dict[str, Any]]:
    """Return the indices of the images to keep, and all of their set but the pixels.

    Raises:
        DataError: refusals stop the stage, or nothing is left.
    """
    kept: list[int] = []
    refused: list[Refusal] = []
    seen: dict[str, str] = {}
    for index, (candidate, outcome) in enumerate(zip(listing.candidates, outcomes, strict=True)):
        reason = outcome.refusal or (None if listing.keep_repeats else _repeated(outcome, seen))
        if reason is not None:
            refused.append(Refusal(candidate.origin, reason))
            continue
        seen[outcome.sha256] = seen[outcome.pixels] = candidate.origin
        kept.append(index)
    _check_refused(origin, refused, len(kept), settings)
    return kept, {
        "records": tuple(outcomes[index].record(listing.candidates[index]) for index in kept),
        "origin": origin,
        "licence": listing.licence,
        "attribution": listing.attribution,
        "refused": tuple(refused),
        "ignored": listing.ignored,
    }


def _repeated(outcome: Outcome, seen: Mapping[str, str]) -> str | None:
    """Return which earlier image this one repeats; `seen` maps digests of files and pixels to origins."""
    if outcome.sha256 in seen:
        return f"the same file as {seen[outcome.sha256]}. Remove one of them"
    if outcome.pixels in seen:
        return f"the same pixels as {seen[outcome.pixels]}, once prepared. Remove one of them"
    return None


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
