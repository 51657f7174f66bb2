"""`params.yaml` as a whole: read, checked, and every adaptation resolved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from domainstudio.config.adaptation import Adaptation, AdaptationSettings
from domainstudio.config.base import (
    KeyedError,
    Name,
    Problem,
    Section,
    SettingsError,
    merged,
    replaced,
    validated,
)
from domainstudio.config.choosing import ChooseSettings
from domainstudio.config.data import NO_IMAGES, PrepareSettings, SourceImages, SourceSettings, TargetSettings
from domainstudio.config.document import Document, Key
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
        known: dict[str, Mapping[str, Any]] = {
            "source": self.sources,
            "target": self.targets,
            "method": self.methods,
        }
        for name, adaptation in self.adaptations.items():
            for key, names in known.items():
                self._check_known(("adaptations", name, key), getattr(adaptation, key), f"{key}s", names)
            if adaptation.source not in self.source_images:
                raise KeyedError(
                    ("adaptations", name, "source"),
                    f"source_images has no {adaptation.source!r}: name real images of its domain, or, if you "
                    f"have none, `{adaptation.source}: {{images: {NO_IMAGES}}}`",
                )
        for name in self.registry.models:
            self._check_known(("registry", "models", name), name, "adaptations", self.adaptations)
        for name, sweep in self.sweeps.items():
            place = ("sweeps", name, "adaptation")
            self._check_known(place, sweep.adaptation, "adaptations", self.adaptations)
        return self

    def _check_known(self, key: Sequence[str], value: str, section: str, known: Mapping[str, Any]) -> None:
        if value not in known:
            raise KeyedError(
                key,
                f"is {value!r}, but {section} has only {sorted(known)}. Add it to {section}, or correct the "
                "name",
            )

    @cached_property
    def resolved(self) -> dict[str, Adaptation]:
        """Every adaptation with its overrides applied.

        Raises:
            SettingsError: some cannot be.
        """
        found: dict[str, Adaptation] = {}
        wrong: list[Problem] = []
        for name, item in self.adaptations.items():
            try:
                found[name] = self._resolve(name, item)
            except SettingsError as error:
                wrong += error.problems
        if wrong:
            raise SettingsError("adaptations", wrong)
        return found

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
        where = f"adaptations.{name}"
        try:
            adaptation = validated(Adaptation, values, where)
        except SettingsError as error:
            wrong = [replace(each, key=_written(each.key, name, item)) for each in error.problems]
            raise SettingsError(where, wrong) from error
        if adaptation.takes_source_images and not self.source_images[item.source].given:
            key = ("adaptations", name, "prior", "images")
            message = (
                f"is source, and source_images says that {item.source} has none: name some, or set generated"
            )
            raise SettingsError(where, [Problem(key, message)])
        return adaptation


def _written(key: Key, name: str, item: AdaptationSettings) -> Key:
    """Return the key of params.yaml that a resolved adaptation has a value from."""
    first, *rest = key or ("",)
    own = {"training": item.finetune, "weights": item.weights}.get(first)
    if own is None:
        return ("adaptations", name, *key)
    inside: Any = own
    for part in rest:
        inside = inside.get(part) if isinstance(inside, Mapping) else None
    section = "finetune" if first == "training" else "weights"
    if inside is not None or (rest and rest[0] in own and not isinstance(own[rest[0]], Mapping)):
        return ("adaptations", name, section, *rest)
    return ("finetune", *rest) if first == "training" else ("methods", item.method, *rest)


def load(path: str | Path = "params.yaml", *overlays: str | Path) -> Settings:
    """Read and check `params.yaml`, adaptations and their overrides included.

    Args:
        path: the file.
        overlays: files whose keys are added to those of the sections, or replace them.

    Raises:
        ConfigError: a file is missing, is not YAML, or a key is missing, unknown or out of range. The message
            names file, line, key and value.
    """
    documents = [Document.read(each) for each in (path, *overlays)]
    values = dict(documents[0].values)
    for document in documents[1:]:
        for name, section in document.values.items():
            both = isinstance(section, Mapping) and isinstance(values.get(name), Mapping)
            values[name] = {**values[name], **section} if both else section
    where = " and ".join(map(str, (path, *overlays)))
    try:
        settings = validated(Settings, values, where)
        _ = settings.resolved
    except SettingsError as error:
        raise SettingsError(where, [each.located(documents) for each in error.problems]) from error
    return settings
