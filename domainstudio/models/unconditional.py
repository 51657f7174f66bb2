"""Unconditional pixel-space models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from domainstudio.models.pixel import PixelDenoiser, new_parts

if TYPE_CHECKING:
    from domainstudio.config import NoiseSettings, UNetSettings
    from domainstudio.models.condition import Condition


class UnconditionalDenoiser(PixelDenoiser):
    """A UNet without conditions."""

    kind = "unconditional"
    conditional = False

    def condition(self, values: Sequence[str], size: tuple[int, int] | None = None) -> Condition:
        """Return an empty condition, whatever the values."""
        return {}

    @classmethod
    def new(cls, unet: UNetSettings, noise: NoiseSettings, resolution: int) -> UnconditionalDenoiser:
        """Make an untrained model, initialised from torch's global generator."""
        return cls(*new_parts(unet, noise, resolution))
