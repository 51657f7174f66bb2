"""How timesteps of flow-matching models are drawn in training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from domainstudio.config.base import Section


class FlowSettings(Section):
    """Timesteps of models of flow matching, such as SD3; models of other kinds ignore them."""

    density: Literal["logit_normal", "uniform", "mode"] = "logit_normal"
    """How often each place among the noise levels is drawn: SD3's densities (arXiv 2403.03206)."""
    logit_mean: float = 0.0
    """Mean of `logit_normal`. Below 0 prefers much noise."""
    logit_std: float = Field(default=1.0, gt=0)
    """Standard deviation of `logit_normal`."""
    mode_scale: float = 1.29
    """Scale of `mode`; above 0 prefers the middle."""
    shift: Literal["scheduler", "resolution"] | Annotated[float, Field(gt=0)] = "scheduler"
    """Shift of the levels towards noise. `scheduler` takes the model's own static shift, as diffusers'
    training scripts do. `resolution` depends on the image's size, as in Flux's sampling."""
