"""Pictures inside the report: data URIs, crisp where pixels are few, small where they are many."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from domainstudio.data.pictures import grid

CRISP_BELOW = 104
"""Pictures of at most this many pixels a side are kept whole and enlarged by whole factors; larger ones
are photographs, whose reduced copies are stored as JPEG."""

THUMBNAIL = 176
"""Longest side of a reduced picture, in pixels."""


@dataclass(frozen=True)
class Picture:
    """An embedded picture with its size on the page, in CSS pixels."""

    uri: str
    width: int
    height: int
    crisp: bool


def picture(
    image: Image.Image, *, side: int = 96, limit: int = THUMBNAIL, crisp: bool | None = None
) -> Picture:
    """Embed an image.

    Args:
        image: any RGB image.
        side: width on the page in CSS pixels; a crisp picture gets the largest whole multiple of its width
            that fits, and at least its own.
        limit: longest stored side of a picture that is not crisp, in pixels.
        crisp: keep every pixel; by default for images of at most `CRISP_BELOW` pixels.
    """
    crisp = max(image.size) <= CRISP_BELOW if crisp is None else crisp
    if crisp:
        scale = max(1, side // image.width)
        return Picture(_png(image), image.width * scale, image.height * scale, crisp=True)
    reduced = image.copy()
    reduced.thumbnail((limit, limit), Image.Resampling.LANCZOS)
    height = max(1, round(side * image.height / image.width))
    return Picture(_jpeg(reduced), side, height, crisp=False)


def sheet(images: Sequence[Image.Image], columns: int, *, side: int) -> Picture:
    """Embed many images of one size as one grid.

    Args:
        images: RGB images of one size, at least one.
        columns: images per row.
        side: width of the grid on the page, in CSS pixels.
    """
    crisp = max(images[0].size) <= CRISP_BELOW
    if not crisp:
        images = [reduced(image, CRISP_BELOW) for image in images]
    stacked = np.stack([np.asarray(image).transpose(2, 0, 1) for image in images])
    return picture(grid(stacked, columns).convert("RGB"), side=side, limit=10_000, crisp=crisp)


def reduced(image: Image.Image, limit: int) -> Image.Image:
    """A copy whose longest side has at most `limit` pixels."""
    copy = image.copy()
    copy.thumbnail((limit, limit), Image.Resampling.LANCZOS)
    return copy


def strip(items: Sequence[tuple[int, Callable[[], Image.Image]]], number: int) -> list[tuple[int, Picture]]:
    """At most `number` pictures, evenly spaced over the items, the first and the last among them.

    Args:
        items: a label and a function that reads the image, so that those left out are never read.
        number: how many to keep, at least 2.
    """
    return [(items[i][0], _preview(items[i][1]())) for i in evenly(len(items), number)]


def evenly(length: int, number: int) -> list[int]:
    """At most `number` (at least 2) positions from `0 .. length - 1`, both ends included."""
    if length <= number:
        return list(range(length))
    return [round(i * (length - 1) / (number - 1)) for i in range(number)]


def common_side(pictures: Iterable[Picture | None], default: int = 96) -> int:
    """Width of the widest picture, in CSS pixels: the width of a column."""
    return max((item.width for item in pictures if item is not None), default=default)


def _preview(image: Image.Image) -> Picture:
    return picture(image, side=288, limit=420, crisp=image.width <= 320)


def _png(image: Image.Image) -> str:
    # A palette is smaller and loses nothing where there are few colours, as in line art.
    if (colours := image.getcolors(256)) is not None:
        indexed = image.quantize(len(colours), dither=Image.Dither.NONE)
        if indexed.convert("RGB").tobytes() == image.tobytes():
            image = indexed
    return _uri(image, "PNG", optimize=True)


def _jpeg(image: Image.Image) -> str:
    return _uri(image, "JPEG", quality=82, optimize=True)


def _uri(image: Image.Image, kind: str, **options: object) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
