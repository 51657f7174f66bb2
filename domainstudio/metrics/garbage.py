"""Garbage: images in no domain, so that a probe between two domains can tell them from both."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]

NUMBER = 100
"""Images of each kind."""

PATCHES = 4
"""Patches a side of an image whose patches are shuffled."""

COARSE = 6
"""Squares a side of coarse noise."""


def garbage(real: Images, seed: int) -> Images:
    """Return images as failed models draw them, `NUMBER` of each kind, the same for the same arguments.

    Noise in every pixel, noise in coarse squares, and real images whose patches are shuffled.

    Args:
        real: uint8 images with shape (N, 3, H, W), N ≥ 1.
        seed: Seed of all draws.

    Returns:
        uint8 with shape (3 · `NUMBER`, 3, H, W).
    """
    generator = np.random.default_rng(seed)
    height, width = real.shape[2:]
    fine = generator.integers(0, 256, (NUMBER, 3, height, width), dtype=np.uint8)
    squares = generator.integers(0, 256, (NUMBER, 3, COARSE, COARSE), dtype=np.uint8)
    rows, columns = (np.arange(side) * COARSE // side for side in (height, width))
    coarse = squares[:, :, rows[:, None], columns[None]]
    chosen = real[generator.integers(0, len(real), NUMBER)]
    return np.concatenate([fine, coarse, np.stack([_shuffled(image, generator) for image in chosen])])


def _shuffled(image: Images, generator: np.random.Generator) -> Images:
    """Shuffle the patches of an image with shape (3, H, W); what a side leaves over stays."""
    height, width = (side // PATCHES for side in image.shape[1:])
    places = [(row * height, column * width) for row in range(PATCHES) for column in range(PATCHES)]
    found = image.copy()
    for (y, x), index in zip(places, generator.permutation(len(places)), strict=True):
        top, left = places[index]
        found[:, y : y + height, x : x + width] = image[:, top : top + height, left : left + width]
    return found
