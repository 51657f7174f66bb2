"""Aspect-ratio buckets: shapes of about as many pixels as a square, so that images are hardly cut."""

from __future__ import annotations

import math
from typing import TypeAlias

from PIL import Image

Size: TypeAlias = tuple[int, int]
"""Height and width, in pixels."""

STEPS = (8, 16, 32, 64)
"""Sides are multiples of the largest of these that is no more than an eighth of the resolution. 64 suits
Stable Diffusion: a latent has an eighth of the image's side, and its UNet halves that three times."""


def bucket_sizes(resolution: int) -> tuple[Size, ...]:
    """Return the buckets of a resolution, the tallest first; the square is one of them.

    They are chosen as in kohya's trainers: as many pixels as fit into resolution², never more, and no side
    longer than twice the other. At 1024 all of them are among the sizes that SDXL was trained on (arXiv
    2307.01952, appendix I).

    Args:
        resolution: side of the square, in pixels.
    """
    step = max((step for step in STEPS if 8 * step <= resolution), default=STEPS[0])
    sizes = {(resolution, resolution)}
    for long in range(resolution // step * step + step, 2 * resolution, step):
        short = resolution**2 // long // step * step
        if 2 * short >= long:
            sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes, reverse=True))


def nearest_bucket(size: Size, resolution: int) -> Size:
    """Return the bucket of the aspect ratio nearest to that of an image, by the ratio of both ratios."""
    wanted = math.log(size[1] / size[0])
    return min(bucket_sizes(resolution), key=lambda bucket: abs(math.log(bucket[1] / bucket[0]) - wanted))


def crop(image: Image.Image, size: Size) -> Image.Image:
    """Cut the largest centred part of the shape `size` out of an image, and resize it."""
    height, width = size
    if image.width * height > image.height * width:
        part = round(image.height * width / height), image.height
    else:
        part = image.width, round(image.width * height / width)
    left, top = (image.width - part[0]) // 2, (image.height - part[1]) // 2
    whole = image.crop((left, top, left + part[0], top + part[1]))
    return whole.resize((width, height), Image.Resampling.LANCZOS)
