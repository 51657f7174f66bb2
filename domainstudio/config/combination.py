"""Combinations: how the frozen source model helps the adapted one to draw. They change no training."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError

from domainstudio.config.base import Section


class InterpolateSettings(Section):
    """One model whose weights lie between those of the source model and of the adapted one.

    It costs nothing when drawing, and is exported as a plain model.
    """

    mode: Literal["interpolate"]
    """`interpolate`: weights (1 - weight)·source + weight·adapted."""
    weight: float = Field(ge=0, le=1)
    """0 is the source model, 1 the adapted one."""

    @property
    def title(self) -> str:
        """The combination in words."""
        return f"weights interpolated to {self.weight:g}"


class GuideSettings(Section):
    """Both models predict, and the prediction leads away from the source (Domain Guidance, arXiv 2504.01521).

    Each step costs two forward passes.
    """

    mode: Literal["guide"]
    """`guide`: source + weight·(adapted - source), for the models' outputs."""
    weight: float = Field(ge=0)
    """0 is the source model, 1 the adapted one; above 1 samples lie further in the domain, and vary less."""

    @property
    def title(self) -> str:
        """The combination in words."""
        return f"guided away from the source with weight {self.weight:g}"


class SwitchSettings(Section):
    """One model draws at high noise, where the composition is decided, and the other one at low noise.

    It costs nothing: each step asks one model.
    """

    mode: Literal["switch"]
    """`switch`: one model above a noise level, the other one below it."""
    at: float = Field(ge=0, le=1)
    """The noise level, as a fraction of the schedule's timesteps: 0.8 is t = 800 of 1,000."""
    source: Literal["above", "below"] = "above"
    """Where the source model draws. Sampling begins at high noise, so `above` makes it draw first."""

    @property
    def title(self) -> str:
        """The combination in words."""
        return f"source model {self.source} noise level {self.at:g}"


Combination: TypeAlias = Annotated[
    InterpolateSettings | GuideSettings | SwitchSettings, Field(discriminator="mode")
]


def combination_of(values: Any) -> Combination:
    """Return the combination that JSON values describe, as manifests and records keep it.

    Raises:
        ValueError: they describe none.
    """
    try:
        found: Combination = TypeAdapter(Combination).validate_python(values)
    except ValidationError as error:
        raise ValueError(f"combine {values!r} is no combination of two models") from error
    return found
