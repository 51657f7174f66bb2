"""The stage `sample`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from domainstudio.config.base import Section


class SampleSettings(Section):
    """The stage `sample`."""

    number: int = Field(ge=1)
    """Images per model; image i is drawn from the noise of seed `seed + i`, in every model."""
    seed: int = Field(default=0, ge=0)
    """Seed of the first image."""
    scheduler: Literal["ddpm", "ddim", "dpm-solver++"] = "ddim"
    """The sampler."""
    steps: int = Field(default=30, ge=1)
    """Denoising steps."""
    guidance_scale: float = Field(default=1.0, ge=0)
    """Scale of classifier-free guidance, for text-to-image and class-conditional models; 1 is without."""
    negative: str = ""
    """Negative prompt or class of the guidance; "" is the unconditional prediction."""
    batch_size: int = Field(default=50, ge=1)
    """Images per forward pass."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast type while sampling."""
