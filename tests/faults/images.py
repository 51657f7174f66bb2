"""Damaged image files of every format that is read."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
from PIL import Image

from domainstudio.config import PrepareSettings
from domainstudio.data.reading import prepare_image
from tests.faults.cases import WrongError
from tests.faults.damage import damaged

SETTINGS = PrepareSettings(resolution=8, min_size=8)
FORMATS: dict[tuple[str, str], tuple[dict[str, object], ...]] = {
    ("PNG", "RGB"): ({}, {"compress_level": 0}),
    ("PNG", "RGBA"): ({},),
    ("PNG", "P"): ({}, {"bits": 4}),
    ("PNG", "I;16"): ({},),
    ("JPEG", "RGB"): ({}, {"progressive": True}, {"quality": 100, "subsampling": 0}),
    ("JPEG", "L"): ({},),
    ("JPEG", "CMYK"): ({},),
    ("WEBP", "RGB"): ({}, {"lossless": True}),
    ("WEBP", "RGBA"): ({},),
    ("GIF", "P"): ({},),
    ("BMP", "RGB"): ({},),
    ("TIFF", "RGB"): ({}, {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}),
    ("TIFF", "L"): ({"compression": "packbits"}, {"compression": "jpeg"}),
}
"""What files are saved with, by format and mode."""


class DamagedImages:
    """A damaged image is refused, or has the same pixels; a format without checksums cannot tell."""

    name, weight = "images", 4.0

    def __init__(self, folder: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (24, 32, 4), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((40, 30), Image.Resampling.BICUBIC)
        self.files = [
            (kind, self._saved(picture, kind, mode, option))
            for (kind, mode), options in FORMATS.items()
            for option in options
        ]
        self.whole = [prepare_image(data, SETTINGS).pixels for _, data in self.files]

    @staticmethod
    def _saved(picture: Image.Image, kind: str, mode: str, options: dict[str, object]) -> bytes:
        buffer = io.BytesIO()
        if mode == "I;16":
            image = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
        else:
            image = picture.convert(mode) if mode != "P" else picture.convert("RGB").quantize(16)
        exif = Image.Exif()
        exif[0x0112] = 6
        extra = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}
        image.save(buffer, kind, **{**extra, **options})
        return buffer.getvalue()

    def case(self, rng: random.Random) -> str:
        index = rng.randrange(len(self.files))
        kind, data = self.files[index]
        found = prepare_image(damaged(data, rng), SETTINGS).pixels
        if np.array_equal(found, self.whole[index]):
            return "unharmed"
        if kind == "PNG":
            raise WrongError("other pixels of a PNG")
        return "not shown by the format"
