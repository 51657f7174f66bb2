"""The stage `register` and its gate."""

from __future__ import annotations

from pydantic import Field

from domainstudio.config.base import Section


class ToleranceSettings(Section):
    """How much worse than the champion's a figure may be, as a share of the champion's; `null`: no rule."""

    frechet_distance: float = Field(default=0.05, ge=0)
    """Of the Fréchet distance: nearness to the domain."""
    kid: float | None = Field(default=None, ge=0)
    """Of the kernel distance. Near 0 its own spread is larger than any share of it."""
    intra_distance: float = Field(default=0.05, ge=0)
    """Of the intra distance: diversity."""
    top_1: float | None = Field(default=None, ge=0)
    """Of the share of samples that keep their subject, of models that are told subjects."""


class GateSettings(Section):
    """What a new version must show to take the champion's place, measured in the same way."""

    max_memorized_share: float = Field(default=0.05, ge=0, le=1)
    """Largest share of samples that are copies of training images, whatever the champion's is. Of real images
    of the demo's domain 2% are as near to a training image."""
    tolerance: ToleranceSettings = ToleranceSettings()
    """How much worse each figure may be."""
    margin: float = Field(default=0.05, ge=0)
    """At least one figure with a tolerance must be better by this share of the champion's."""


class RegistrySettings(Section):
    """The stage `register`."""

    experiment: str = "domainstudio"
    """MLflow experiment of the runs."""
    model_prefix: str = "domainstudio-"
    """A model is registered as this prefix and the adaptation's name."""
    alias: str = "champion"
    """Alias of the version to use. The one before it has `previous_<alias>`, a newer one that did not take
    its place `challenger`."""
    gate: GateSettings | None = GateSettings()
    """What a new version must show to get the alias; `null` gives it to the newest."""
