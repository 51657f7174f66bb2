"""Previews: a few samples in the midst of training, always from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from domainstudio.sampling import draw

if TYPE_CHECKING:
    from PIL import Image

    from domainstudio.config import SampleSettings
    from domainstudio.models.denoiser import Denoiser


PIXELS = 2**20
"""Pixels of a preview: 16 samples of 256 pixels, or four of 512."""

FEWEST, MOST = 4, 16
"""Samples of a preview."""


def previewer(
    settings: SampleSettings, conditions: Sequence[str] | None = None, number: int | None = None
) -> Callable[[Denoiser], Image.Image]:
    """Return a function that draws a grid of a model's samples, from the sampling stage's own noise.

    Args:
        settings: seeds and sampler.
        conditions: prompts or classes, repeated or cut to the number.
        number: how many samples; by default as many as `PIXELS` hold, from `FEWEST` to `MOST`.
    """

    def preview(denoiser: Denoiser) -> Image.Image:
        from domainstudio.data.pictures import grid

        height, width = denoiser.resolution
        drawn = number or max(FEWEST, min(MOST, PIXELS // (height * width)))
        prompts = [conditions[i % len(conditions)] for i in range(drawn)] if conditions else None
        seeds = range(settings.seed, settings.seed + drawn)
        return grid(draw(denoiser, seeds, prompts, settings), columns=8)

    return preview
