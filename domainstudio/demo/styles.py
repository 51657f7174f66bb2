"""Copies of images in simple styles, from which a text-to-image model learns what words for styles do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from domainstudio.config import Style

    Colours = NDArray[np.float32]

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in brightness (ITU-R BT.601)."""


def with_styles(
    images: NDArray[np.uint8], texts: Sequence[Sequence[str]], styles: Sequence[Style]
) -> tuple[NDArray[np.uint8], list[Sequence[str]]]:
    """Return images and their texts, with as many copies in styles as of the images as they are.

    Args:
        images: with shape (N, 3, H, W).
        texts: of each image; several are variants. In a style, `a house` becomes `a house in grey style`.
        styles: keys of `STYLES`; without any nothing is added.
    """
    copies = [in_style(images, style) for style in styles]
    prompts = [[f"{text} in {style} style" for text in each] for style in styles for each in texts]
    as_they_are = max(len(styles), 1)
    return np.concatenate([images] * as_they_are + copies), [*texts] * as_they_are + prompts


def in_style(images: NDArray[np.uint8], style: Style) -> NDArray[np.uint8]:
    """Return images, with shape (N, 3, H, W), in one of `STYLES`."""
    colours = STYLES[style](images.astype(np.float32) / np.float32(255))
    return np.round(colours * 255).astype(np.uint8)


def _brightness(colours: Colours) -> Colours:
    brightness: Colours = np.einsum("nchw,c->nhw", colours, _LUMA)[:, None]
    return brightness


def _two_tones(dark: Sequence[float], light: Sequence[float]) -> Callable[[Colours], Colours]:
    """Return a style of the mixtures of two colours, (red, green, blue) each, by brightness."""
    first, second = (np.array(tone, np.float32).reshape(3, 1, 1) for tone in (dark, light))
    return lambda colours: first + (second - first) * _brightness(colours)


def _stencil(colours: Colours) -> Colours:
    return np.repeat(_brightness(colours) > 0.75, 3, axis=1).astype(np.float32)


STYLES: Mapping[Style, Callable[[Colours], Colours]] = {
    "grey": _two_tones((0, 0, 0), (1, 1, 1)),
    "sepia": _two_tones((0.25, 0.12, 0.02), (1, 0.95, 0.8)),
    "blueprint": _two_tones((1, 1, 1), (0.1, 0.25, 0.6)),
    "negative": lambda colours: 1 - colours,
    "pastel": lambda colours: 0.65 + 0.35 * colours,
    "stencil": _stencil,
}
"""What each style does to colours in [0, 1] with shape (N, 3, H, W)."""
