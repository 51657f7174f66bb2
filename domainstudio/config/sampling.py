"""The stage `sample`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from domainstudio.config.base import MANY, Section, Seed


class SampleSettings(Section):
    """The stage `sample`: how images are drawn from a model."""

    number: int = Field(ge=1, le=MANY)
    """Images per model. In every model image i starts from the noise of seed `seed + i`."""
    seed: Seed = 0
    """Seed of the first image."""
    scheduler: Literal["ddpm", "ddim", "dpm-solver++"] = "ddim"
    """The sampler."""
    steps: int = Field(default=30, ge=1)
    """Denoising steps."""
    guidance_scale: float = Field(default=1.0, ge=0)
    """Scale of classifier-free guidance in text-to-image and class-conditional models; 1 means none."""
    negative: str = ""
    """Prompt or class that guidance leads away from; "" stands for none."""
    batch_size: int = Field(default=50, ge=1)
    """Images per forward pass."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast type while sampling; weights are read in it too. With `no`, a training under
    `frozen_precision` draws previews in that."""
