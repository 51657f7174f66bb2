"""What a model knows of its low-rank adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from domainstudio.config import LoraSettings

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
"""Diffusers' names of a pipeline's text encoders. No pipeline reads adapters of the third."""

TEXT_MODULES = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The attention's projections in CLIP's text encoders."""


@dataclass(frozen=True)
class Adapters:
    """Settings of a model's adapters, and the source model that they change."""

    settings: LoraSettings
    """Rank, alpha and layers."""
    base_digest: str
    """SHA-256 of the source model's folder when they were attached; "" for a model without a folder."""

    @property
    def alpha(self) -> float:
        """Numerator of the updates' scale."""
        return float(self.settings.alpha or self.settings.rank)

    def modules(self, part: str) -> Sequence[str]:
        """Return the ends of the names of a part's adapted layers."""
        if part not in TEXT_ENCODERS:
            return self.settings.modules
        return TEXT_MODULES if self.settings.text_encoder and part != TEXT_ENCODERS[2] else ()
