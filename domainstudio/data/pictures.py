"""Pictures of image batches: grids, contact sheets, PNG files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from domainstudio.errors import DataError
from domainstudio.storage.files import output_file

SHEET_IMAGES = 600
"""A contact sheet shows at most this many images."""

SHEET_TILE = 64
"""Side of the largest tile of a contact sheet, in pixels."""


def grid(images: np.ndarray, columns: int, pad: int = 1) -> Image.Image:
    """Lay images out row by row on a white canvas.

    Args:
        images: uint8 RGB images, with shape (N, 3, H, W), N at least 1.
        columns: Images per row; fewer where N is smaller.
        pad: White pixels between neighbours and around the whole.

    Returns:
        An RGB picture of `rows * (H + pad) + pad` by `columns * (W + pad) + pad` pixels.

    Raises:
        ValueError: the shape or type of `images` is another, or `columns` is less than 1.
    """
    _check(images)
    if columns < 1:
        raise ValueError(f"a grid needs at least 1 column, got {columns}")
    number, _, height, width = images.shape
    columns = min(columns, number)
    rows = math.ceil(number / columns)
    canvas = np.full((rows * (height + pad) + pad, columns * (width + pad) + pad, 3), 255, dtype=np.uint8)
    for index, image in enumerate(images):
        top = pad + (index // columns) * (height + pad)
        left = pad + (index % columns) * (width + pad)
        canvas[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return Image.fromarray(canvas)


def save_png(images: np.ndarray, paths: Sequence[str | Path]) -> None:
    """Write each image to its own PNG file, whole or not at all; folders are made as needed.

    Args:
        images: uint8 RGB images, with shape (N, 3, H, W).
        paths: N file names.

    Raises:
        ValueError: the shape or type of `images` is another, or there are not N paths.
    """
    _check(images)
    if len(paths) != len(images):
        raise ValueError(f"{len(images)} images need as many paths, got {len(paths)}")
    for image, path in zip(images, map(Path, paths), strict=True):
        write_png(Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))), path)


def write_png(image: Image.Image, path: str | Path) -> None:
    """Write a PNG file, whole or not at all; its folder is made as needed."""
    with output_file(path) as partial:
        image.save(partial, format="PNG")


def load_png(path: Path) -> np.ndarray:
    """Read an image that `save_png` wrote, as uint8 RGB with shape (3, H, W), and verify its checksums.

    Raises:
        FileNotFoundError: it is not there.
        DataError: it is damaged.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.verify()  # every CRC; `load` passes over those of the pixels
        with Image.open(path, formats=("PNG",)) as image:
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except FileNotFoundError:
        raise
    except Exception as error:  # from SyntaxError to struct.error
        raise DataError(f"{path} is damaged ({error})") from error


def contact_sheet(images: np.ndarray | Sequence[np.ndarray]) -> Image.Image:
    """Show a whole image set, wider than high: the first 600 images, none larger than 64 pixels.

    Args:
        images: uint8 RGB images, with shape (N, 3, H, W), N at least 1; or N of several shapes (3, H, W),
            which are shown whole, on white.

    Returns:
        An RGB picture.
    """
    shown = images[:SHEET_IMAGES]
    side = min(SHEET_TILE, max(max(image.shape[1:]) for image in shown))
    tiles = np.stack([_tile(image, side) for image in shown])
    return grid(tiles, columns=math.ceil(math.sqrt(1.6 * len(shown))))


def _tile(image: np.ndarray, side: int) -> np.ndarray:
    """Return a whole image in a white square of `side` pixels, shrunk where it is larger."""
    tile = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    tile.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=None)
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(tile, ((side - tile.width) // 2, (side - tile.height) // 2))
    return np.asarray(canvas).transpose(2, 0, 1)


def _check(images: np.ndarray) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != np.uint8 or len(images) == 0:
        raise ValueError(f"expected uint8 images of shape (N, 3, H, W), got {images.dtype} {images.shape}")
