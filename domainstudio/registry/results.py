"""The result of an adaptation: everything that the stages before `register` have written of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from domainstudio.config import Adaptation, combination_of
from domainstudio.errors import CheckpointError, DataError
from domainstudio.models import has_adapters, kind_of
from domainstudio.models.stored import Together
from domainstudio.models.wording import Wording
from domainstudio.project import (
    ADAPTED_MODELS,
    ADAPTED_SAMPLES,
    EVALUATION,
    SOURCE_MODELS,
    TARGETS,
    TRAINING,
)
from domainstudio.registry.gate import Measurement
from domainstudio.tracking.provenance import Provenance


@dataclass(frozen=True)
class Result:
    """An adaptation's outputs."""

    record: Provenance
    adaptation: Adaptation
    """The adaptation as it was when the model was trained."""
    history: Sequence[Mapping[str, float]]
    metrics: Mapping[str, Any]
    samples: Mapping[str, Any]
    """The samples' manifest."""
    shots: Mapping[str, Any]
    """The training images' manifest."""
    domain: Mapping[str, Any]
    """The whole target domain's manifest."""
    measurement: Measurement
    """The figures that the gate compares."""

    @classmethod
    def load(cls, name: str) -> Result:
        """Read the result of one adaptation.

        Raises:
            CheckpointError: the model or its provenance is missing or damaged.
            DataError: the training log, the samples or the metrics are missing or damaged.
        """
        record, adaptation = _read_record(name)
        target = TARGETS / adaptation.target
        paths = {
            "metrics": (EVALUATION / name / "metrics.json", f"evaluate@{name}"),
            "nearest": (EVALUATION / name / "nearest.json", f"evaluate@{name}"),
            "samples": (ADAPTED_SAMPLES / name / "manifest.json", f"sample@{name}"),
            "shots": (target / "shots/manifest.json", f"prepare_target@{target.name}"),
            "domain": (target / "domain/manifest.json", f"prepare_target@{target.name}"),
        }
        read = {key: _read_json(path, stage) for key, (path, stage) in paths.items()}
        try:
            hashes = read["shots"]["digest"], read["domain"]["digest"]
            threshold = read.pop("nearest")["threshold"]
            measurement = Measurement.of(read["metrics"], read["samples"], *hashes, threshold)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(
                f"{EVALUATION / name}, {ADAPTED_SAMPLES / name} or {target} lacks {error}. Run `dvc repro "
                f"evaluate@{name}`"
            ) from error
        return cls(record, adaptation, _read_history(name), **read, measurement=measurement)

    @property
    def folder(self) -> Path:
        """The model folder: a pipeline or adapters."""
        return ADAPTED_MODELS / self.adaptation.name

    @cached_property
    def together(self) -> Together | None:
        """How the source model took part when the samples were drawn.

        Raises:
            DataError: the samples' manifest names an unknown way.
        """
        if (values := self.samples.get("combine")) is None:
            return None
        try:
            combination = combination_of(values)
        except ValueError as error:
            path, name = ADAPTED_SAMPLES / self.adaptation.name, self.adaptation.name
            raise DataError(f"{path}/manifest.json: {error}. Run `dvc repro sample@{name}`") from error
        return Together(
            combination, SOURCE_MODELS / self.adaptation.source, Wording.of(self.adaptation.prompts)
        )

    @property
    def kind(self) -> str:
        """Whether the model takes prompts, classes or nothing."""
        return kind_of(self.folder)

    @property
    def lora(self) -> bool:
        """Whether the model folder holds adapters."""
        return has_adapters(self.folder)

    @property
    def readme(self) -> str:
        """The model's own card."""
        path = self.folder / "README.md"
        return path.read_text(encoding="utf-8") if path.is_file() else f"# {self.adaptation.name}\n"

    @property
    def candidates(self) -> list[dict[str, float]]:
        """The figures of each candidate that the model was chosen among, at the time of its step.

        Raises:
            DataError: the record of the choice is missing or damaged.
        """
        name = self.adaptation.name
        if self.record.chosen is None:
            return []
        content = _read_json(TRAINING / name / "selection/selection.json", f"finetune@{name}")
        times = {int(record["step"]): record["timestamp"] for record in self.history}
        keys = ("fidelity", "diversity", "copies", "in_domain")
        return [
            {
                "step": each["step"],
                "timestamp": times[each["step"]],
                **{f"candidate.{key}": each[key]["value"] for key in keys},
            }
            for each in content["candidates"]
        ]

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the samples."""
        return float(self.samples.get("guidance_scale", 1))

    @property
    def example(self) -> str:
        """Prompt or class of the first sample; "" if the model takes neither."""
        return str(self.samples["images"][0].get("prompt") or "")

    @property
    def tags(self) -> dict[str, str]:
        """Tags of the run and the version: origin of the model, licence, and how it was measured."""
        named = {name: str(getattr(self.adaptation, name)) for name in ("source", "target", "method")}
        conditions = self.measurement.conditions
        drawn = ("number of samples", "seeds", "scheduler", "denoising steps", "guidance")
        return {
            **named,
            "kind": self.kind,
            "lora": str(self.lora).lower(),
            **({"combine": self.together.combination.title} if self.together else {}),
            **{f"chosen.{name}": str(value) for name, value in (self.record.chosen or {}).items()},
            **{f"input.{name}": digest for name, digest in self.record.inputs.items()},
            "input.domain": str(self.domain["digest"]),
            "licence": str(self.shots.get("licence") or "not stated"),
            "attribution": str(self.shots.get("attribution") or "not stated"),
            "sampling": ", ".join(f"{name} {conditions[name]}" for name in drawn),
            "features": str(self.metrics["features"]),
            "features.digest": str(self.metrics["features_digest"]),
        }


def _read_record(name: str) -> tuple[Provenance, Adaptation]:
    path, stage = ADAPTED_MODELS / name / "provenance.json", f"finetune@{name}"
    content = _read_json(path, stage, CheckpointError)
    try:
        record = Provenance.model_validate(content)
        return record, record.settings
    except ValidationError as error:
        raise CheckpointError(f"{path} has another format: {error}. Run `dvc repro {stage}`") from error


def _read_json(path: Path, stage: str, kind: type[CheckpointError | DataError] = DataError) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise kind(f"{path} cannot be read: {error}. Run `dvc repro {stage}`") from error
    if not isinstance(content, dict):
        raise kind(f"{path} must hold a mapping. Run `dvc repro {stage}`")
    return content


def _read_history(name: str) -> list[dict[str, float]]:
    path = TRAINING / name / "history.jsonl"
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}. Run `dvc repro finetune@{name}`") from error
    if not records or any("step" not in record or "timestamp" not in record for record in records):
        raise DataError(f"{path} has no steps with timestamps. Run `dvc repro finetune@{name}`")
    return records
