"""`params.yaml` as a whole: read, checked, and every adaptation resolved."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, model_validator

from domainstudio.config.adaptation import Adaptation, AdaptationSettings
from domainstudio.config.base import Name, Section, merged, replaced, validated
from domainstudio.config.choosing import ChooseSettings
from domainstudio.config.data import NO_IMAGES, PrepareSettings, SourceImages, SourceSettings, TargetSettings
from domainstudio.config.evaluation import EvaluateSettings
from domainstudio.config.method import Method
from domainstudio.config.pretraining import (
    PretrainClassSettings,
    PretrainFlowSettings,
    PretrainLatentSettings,
    PretrainSettings,
    PretrainTextSettings,
)
from domainstudio.config.registry import RegistrySettings
from domainstudio.config.sampling import SampleSettings
from domainstudio.config.sweep import SweepSettings
from domainstudio.config.tradeoff import TradeoffSettings
from domainstudio.config.training import LaunchSettings, TrainingSettings
from domainstudio.errors import ConfigError


class Settings(Section):
    """The whole of `params.yaml`."""

    prepare: PrepareSettings
    """How images become image sets."""
    pretrain: PretrainSettings
    """The demo's own source model of pixels."""
    pretrain_latent: PretrainLatentSettings
    """The demo's own source model of latents."""
    pretrain_text: PretrainTextSettings
    """The demo's own text-to-image source model."""
    pretrain_flow: PretrainFlowSettings
    """The demo's own flow-matching source model."""
    pretrain_class: PretrainClassSettings
    """The demo's own class-conditional source model."""
    sources: dict[Name, SourceSettings]
    """Pretrained models by name."""
    source_images: dict[Name, SourceImages] = Field(default_factory=dict)
    """Real images of a source's domain, by the source's name, or that there are none. Metrics use them, and
    prior preservation can."""
    targets: dict[Name, TargetSettings]
    """Target domains by name."""
    methods: dict[Name, Method]
    """Loss weights, and what is trained, by name."""
    finetune: TrainingSettings
    """Defaults of every adaptation's training."""
    choose: ChooseSettings = ChooseSettings()
    """Which state along training becomes the model."""
    adaptations: dict[Name, AdaptationSettings]
    """Adaptations by name; each makes one adapted model."""
    sample: SampleSettings
    """How images are drawn from a model."""
    evaluate: EvaluateSettings
    """How samples are measured."""
    registry: RegistrySettings
    """How models reach the registry."""
    tradeoff: TradeoffSettings = TradeoffSettings()
    """How the source model's part in drawing is varied."""
    launch: LaunchSettings = LaunchSettings()
    """How many processes share a stage."""
    sweeps: dict[Name, SweepSettings] = Field(default_factory=dict)
    """Settings to try side by side, by name of the sweep."""

    @model_validator(mode="after")
    def _references(self) -> Self:
        for name, adaptation in self.adaptations.items():
            for key, known in (("source", self.sources), ("target", self.targets), ("method", self.methods)):
                if (value := getattr(adaptation, key)) not in known:
                    raise ValueError(
                        f"adaptations.{name}.{key} is {value!r}, but {key}s has only {sorted(known)}. "
                        f"Add it to {key}s, or correct the name"
                    )
            if adaptation.source not in self.source_images:
                raise ValueError(
                    f"source_images has no {adaptation.source!r}: name real images of its domain, or, if you "
                    f"have none, `{adaptation.source}: {{images: {NO_IMAGES}}}`"
                )
        if unknown := sorted(set(self.registry.models) - set(self.adaptations)):
            raise ValueError(
                f"registry.models names {', '.join(unknown)}, but adaptations has only "
                f"{sorted(self.adaptations)}. Remove it from registry.models, or correct the name"
            )
        return self

    @cached_property
    def resolved(self) -> dict[str, Adaptation]:
        """Every adaptation with its overrides applied."""
        return {name: self._resolve(name, item) for name, item in self.adaptations.items()}

    def adaptation(self, name: str) -> Adaptation:
        """Return one adaptation with its overrides applied.

        Raises:
            ConfigError: `name` is not a key of `adaptations`.
        """
        if name not in self.resolved:
            raise ConfigError(f"adaptations has no {name!r}; there are {sorted(self.resolved)}")
        return self.resolved[name]

    def overridden(self, name: str, values: Mapping[str, Any]) -> Adaptation:
        """Return one adaptation with further overrides applied.

        Args:
            name: a key of `adaptations`.
            values: by dotted key of the adaptation, such as `method` or `weights.image`.

        Raises:
            ConfigError: a name, key or value is not possible.
        """
        self.adaptation(name)
        item = self.adaptations[name].model_dump(exclude_unset=True)
        for key, value in values.items():
            item = replaced(item, key.split("."), value)
        whole = self.model_dump(exclude_unset=True, exclude={"sweeps"})
        whole |= {"adaptations": {name: item}, "registry": {}}  # which may name others
        where = f"adaptations.{name} with {', '.join(f'{key} {value}' for key, value in values.items())}"
        return validated(Settings, whole, where).adaptation(name)

    def _resolve(self, name: str, item: AdaptationSettings) -> Adaptation:
        values = dict(item) | {
            "name": name,
            "training": {**self.finetune.model_dump(), **item.finetune},
            "weights": merged(self.methods[item.method].model_dump(), item.weights),
        }
        del values["finetune"]
        adaptation = validated(Adaptation, values, f"adaptations.{name}")
        if adaptation.takes_source_images and not self.source_images[item.source].given:
            raise ConfigError(
                f"adaptations.{name}.prior.images is source, and source_images says that {item.source} has "
                "none: name some, or set generated"
            )
        return adaptation


def load(path: str | Path = "params.yaml", *overlays: str | Path) -> Settings:
    """Read and check `params.yaml`, adaptations and their overrides included.

    Args:
        path: the file.
        overlays: files whose keys are added to those of the sections, or replace them.

    Raises:
        ConfigError: a file is missing, is not YAML, or a key is missing, unknown or out of range.
    """
    values = _read(Path(path))
    for overlay in overlays:
        for name, section in _read(Path(overlay)).items():
            values[name] = {**values.get(name, {}), **section} if isinstance(section, Mapping) else section
    settings = validated(Settings, values, " and ".join(map(str, (path, *overlays))))
    _ = settings.resolved
    return settings


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist: run from the project's root, or name the file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} must hold a mapping of sections, got {type(values).__name__}")
    return dict(values)
