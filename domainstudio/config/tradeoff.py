"""The stage `tradeoff`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from domainstudio.config.base import MANY, Section
from domainstudio.config.combination import (
    Combination,
    GuideSettings,
    InterpolateSettings,
    SwitchSettings,
)
from domainstudio.config.sampling import SampleSettings

Fraction = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]


class TradeoffSettings(Section):
    """The stage `tradeoff`: nearness to the domain against variety, as the source model helps to draw.

    Each value is drawn and measured beside the adapted model alone. Without values the stage does nothing.
    """

    number: int = Field(default=200, ge=2, le=MANY)
    """Samples of each value."""
    steps: int | None = Field(default=None, ge=1)
    """Denoising steps; `null` takes those of `sample`."""
    switch_above: tuple[Fraction, ...] = ()
    """Noise levels above which the source model draws, such as [0.9, 0.8, 0.6]."""
    switch_below: tuple[Fraction, ...] = ()
    """Noise levels below which the source model draws."""
    guide: tuple[Weight, ...] = ()
    """Weights of guidance away from the source, such as [0.75, 1.5]."""
    interpolate: tuple[Fraction, ...] = ()
    """Weights of interpolation, from 0, the source model, to 1, the adapted one."""

    @property
    def combinations(self) -> tuple[Combination, ...]:
        """Every combination to measure."""
        above = (SwitchSettings(mode="switch", at=at) for at in self.switch_above)
        below = (SwitchSettings(mode="switch", at=at, source="below") for at in self.switch_below)
        guided = (GuideSettings(mode="guide", weight=weight) for weight in self.guide)
        between = (InterpolateSettings(mode="interpolate", weight=weight) for weight in self.interpolate)
        return (*above, *below, *guided, *between)

    def sampling(self, usual: SampleSettings) -> SampleSettings:
        """Return how samples are drawn here: as usual, but for their number and steps."""
        return usual.model_copy(update={"number": self.number, "steps": self.steps or usual.steps})
