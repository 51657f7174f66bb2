"""From the bytes of one image file to prepared pixels; what cannot be read faithfully is refused."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageOps, UnidentifiedImageError

from domainstudio.config import PrepareSettings
from domainstudio.data.buckets import Size, crop, nearest_bucket
from domainstudio.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Decoders that may read a file. Pillow has others, which start programs (EPS) or which nobody needs."""

MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded: a few bytes can claim gigabytes of pixels."""

MAX_ASPECT = 10_000
"""Longer or higher images are refused likewise: they take many times the memory of their pixels."""


@dataclass(frozen=True)
class Prepared:
    """One prepared image.

    Attributes:
        pixels: uint8 RGB in 0 … 255, with shape (3, R, R), R the resolution.
        width: Pixels of the upright original.
        height: The same.
        bucketed: The same image in its aspect-ratio bucket, uint8 with shape (3, H, W), if asked for.
    """

    pixels: np.ndarray
    width: int
    height: int
    bucketed: np.ndarray | None = None


def prepare_image(data: bytes, settings: PrepareSettings, buckets: bool = False) -> Prepared:
    """Decode an image, put it upright on the background, crop or pad it to a square, and resize it.

    Transparency is composited before the resize, so that invisible colours do not bleed into the edges.

    Args:
        data: The file's bytes.
        settings: Section `prepare` of `params.yaml`.
        buckets: Make the image in its aspect-ratio bucket too.

    Raises:
        DataError: the file is no image, is damaged, animated, too small, or too large. The message is the
            reason alone; the caller names the file.
    """
    with _refusing():
        image = flatten(decode(data, settings.min_size), settings.background)
    (width, height), side = image.size, settings.resolution
    square = _fit(image, (side, side), settings)
    bucketed = _fit(image, nearest_bucket((height, width), side), settings) if buckets else None
    return Prepared(square, width, height, bucketed)


def decode(data: bytes, min_size: int = 1) -> Image.Image:
    """Decode a still image and turn it upright, as its EXIF orientation says.

    What its header says is checked before, and so are the checksums of a PNG: Pillow passes over those of
    its pixels. The other formats have none that cover the pixels.

    Args:
        data: The file's bytes.
        min_size: Pixels that the shorter side must have.

    Raises:
        DataError: it is animated, too small, too large or too long.
        Exception: any that Pillow's decoder raises for damaged bytes.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS says it, as an error
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_header(image, min_size)
        if image.format == "PNG":
            Image.open(io.BytesIO(data), formats=("PNG",)).verify()
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return image


def flatten(image: Image.Image, background: str) -> Image.Image:
    """Convert any mode to 8-bit sRGB without transparency.

    16-bit grey is scaled by 255/65535 (Pillow's own conversion clips it); an embedded colour profile is
    applied; transparency shows `background`.

    Args:
        image: A decoded image of any mode.
        background: Colour as `#rrggbb`.

    Raises:
        DataError: the pixels are floating point, or integers of more than 16 bits, whose white is unknown.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image = _scale_deep_grey(image)
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    colour = _to_srgb(image)
    if alpha is None:
        return colour
    canvas = Image.new("RGBA", image.size, ImageColor.getrgb(background))
    canvas.alpha_composite(Image.merge("RGBA", (*colour.split(), alpha)))
    return canvas.convert("RGB")


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn whatever a decoder raises into a reason to refuse the file."""
    try:
        yield
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"not a readable image (of {', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"too large: more than {MAX_PIXELS:,} pixels. Shrink it") from error
    except Exception as error:  # decoders raise all sorts on damaged files, from SyntaxError to struct.error
        raise DataError(f"damaged, truncated or of an unknown kind ({error})") from error


def _check_header(image: Image.Image, min_size: int) -> None:
    width, height = image.size
    if min(width, height) < min_size:
        raise DataError(f"too small: {width}×{height}, prepare.min_size is {min_size}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DataError(f"too long: {width}×{height}, at most {MAX_ASPECT:,} to 1. Cut it")
    if width * height > MAX_PIXELS:
        raise DataError(f"too large: {width}×{height}, at most {MAX_PIXELS:,} pixels. Shrink it")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # MPO: a photograph whose first frame is the picture
        raise DataError(f"animated or multi-page ({frames} frames). Save the frame you mean as PNG")


def _scale_deep_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise DataError(f"its pixels (mode {image.mode}) have no known white. Save it with 8 or 16 bits")
    grey = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey = grey.convert("LA")
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _to_srgb(image: Image.Image) -> Image.Image:
    """Drop transparency and convert to RGB, through the embedded profile where it fits the pixels."""
    base = image.mode if image.mode in ("L", "CMYK") else "RGB"
    # By way of RGBA, because a palette's transparent entries are lost with a warning otherwise.
    via = "RGBA" if image.mode in ("P", "PA", "La", "LA", "RGBa") else base
    plain = image if image.mode == base else image.convert(via).convert(base)
    converted = None
    if profile := image.info.get("icc_profile"):
        with suppress(OSError, ImageCms.PyCMSError):  # viewers too take pixels under a broken profile as sRGB
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            fits = source.profile.xcolor_space.strip() == ("GRAY" if base == "L" else base)
            if fits and "sRGB" not in (source.profile.profile_description or ""):
                target = ImageCms.createProfile("sRGB")
                converted = ImageCms.profileToProfile(plain, source, target, outputMode="RGB")
    return converted or (plain if base == "RGB" else plain.convert("RGB"))


def _fit(image: Image.Image, size: Size, settings: PrepareSettings) -> np.ndarray:
    fitted = _pad(image, size, settings.background) if settings.crop == "pad" else crop(image, size)
    return np.asarray(fitted).transpose(2, 0, 1).copy()


def _pad(image: Image.Image, size: Size, background: str) -> Image.Image:
    # Resize before padding: a long, thin image padded at full size could fill the memory.
    scale = min(size[0] / image.height, size[1] / image.width)
    width, height = (max(1, round(side * scale)) for side in image.size)
    canvas = Image.new("RGB", size[::-1], ImageColor.getrgb(background))
    inner = image.resize((width, height), Image.Resampling.LANCZOS)
    canvas.paste(inner, ((size[1] - width) // 2, (size[0] - height) // 2))
    return canvas
