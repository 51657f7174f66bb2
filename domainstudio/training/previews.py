"""Previews: a few samples in the midst of training, always from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from domainstudio.sampling import draw

if TYPE_CHECKING:
    from PIL import Image

    from domainstudio.config import SampleSettings
    from domainstudio.models.denoiser import Denoiser


def previewer(
    settings: SampleSettings, conditions: Sequence[str] | None = None, number: int = 16
) -> Callable[[Denoiser], Image.Image]:
    """Return a function that draws a grid of a model's samples, from the sampling stage's own noise.

    Args:
        settings: seeds and sampler.
        conditions: prompts or classes, repeated or cut to `number`.
        number: how many samples.
    """
    prompts = [conditions[i % len(conditions)] for i in range(number)] if conditions else None

    def preview(denoiser: Denoiser) -> Image.Image:
        from domainstudio.data.pictures import grid

        seeds = range(settings.seed, settings.seed + number)
        return grid(draw(denoiser, seeds, prompts, settings), columns=8)

    return preview
