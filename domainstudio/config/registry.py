"""The stage `register` and its gate."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from domainstudio.config.base import Name, Section, Text

ModelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)]
"""A name of a registered model that is safe in MLflow's URIs and searches."""


class ToleranceSettings(Section):
    """How much worse than the champion's a figure may be, as a share of the champion's. `null`: no limit."""

    frechet_distance_infinity: float | None = Field(default=0.05, ge=0)
    """For the extrapolated Fréchet distance, which measures nearness to the domain."""
    frechet_distance: float | None = Field(default=0.05, ge=0)
    """For the Fréchet distance as it is, where one of the models lacks the extrapolated one."""
    kid: float | None = Field(default=None, ge=0)
    """For the kernel distance. Near 0 its own spread is larger than any share of it."""
    intra_distance_in_domain: float | None = Field(default=0.05, ge=0)
    """For the intra distance of the samples in the domain, which measures diversity."""
    intra_distance: float | None = Field(default=0.05, ge=0)
    """For the intra distance of all samples, where one of the models lacks the other."""
    attributes_kept: float | None = Field(default=None, ge=0)
    """For the share of attributes that samples keep, in domains whose attributes are known."""
    top_1: float | None = Field(default=None, ge=0)
    """For the share of samples that keep their subject, in models that draw subjects."""


class GateSettings(Section):
    """When a new version takes the champion's place. Both must have been measured in the same way."""

    max_memorized_share: float = Field(default=0.05, ge=0, le=1)
    """Largest share of samples that are copies of training images, whatever the champion's is. For
    comparison: 2% of the real images of the demo's domain are as near to a training image."""
    min_in_domain_share: float = Field(default=0.5, ge=0, le=1)
    """Smallest share of samples in the target domain, by a probe that also knows the source's domain and
    garbage (docs/figures.md), for the first champion as for later ones. It counts where it was measured."""
    min_precision: float = Field(default=0.0, ge=0, le=1)
    """Smallest precision. By default none: it can be 0 for good models too (docs/registry.md)."""
    min_samples: int = Field(default=100, ge=1)
    """Fewest samples that figures may come from: of a dozen, they say little."""
    tolerance: ToleranceSettings = ToleranceSettings()
    """How much worse each figure may be."""
    margin: float = Field(default=0.05, ge=0)
    """At least one figure with a tolerance must be better by this share of the champion's."""


class RegistrySettings(Section):
    """The stage `register`: how models reach MLflow's registry."""

    experiment: Text = "domainstudio"
    """MLflow experiment of the runs."""
    models: dict[Name, ModelName] = Field(default_factory=dict)
    """What is registered, and under which name: the registered model of each adaptation. `dvc repro`
    registers these from a committed `params.yaml`. An adaptation that is not named here, uncommitted settings
    and `dvc exp run` are trials, which register nothing (docs/registry.md)."""
    alias: str = Field(default="champion", pattern=r"^[A-Za-z0-9_-]+$", max_length=64)
    """Alias of the version to use. The version before it gets `previous_<alias>`. A newer version that the
    gate refused gets `challenger`."""
    gate: GateSettings | None = GateSettings()
    """When a new version gets the alias; `null` gives it to the newest."""
