"""What the later stages found out, logged into the run that the training has made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from domainstudio.config import Adaptation
from domainstudio.errors import CheckpointError, DataError
from domainstudio.models.kinds import Kind, has_adapters, kind_of
from domainstudio.registry.gate import Measurement
from domainstudio.registry.lineage import lineage, locked_stages, log_inputs
from domainstudio.tracking.runs import RunPlan, find_run, log_evaluation, log_missing, open_run, plan_for
from domainstudio.tracking.server import experiment_id

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


@dataclass(frozen=True)
class Result:
    """An adaptation's files, as the stages have written them."""

    adaptation: Adaptation
    """As it was when the model was trained."""
    key: str
    steps: int
    inputs: Mapping[str, str]
    versions: Mapping[str, str]
    history: Sequence[Mapping[str, float]]
    metrics: Mapping[str, Any]
    samples: Mapping[str, Any]
    """The samples' manifest."""
    shots: Mapping[str, Any]
    """The training images' manifest."""
    domain: Mapping[str, Any]
    """The whole target domain's manifest."""
    measurement: Measurement
    """What the gate compares."""
    readme: str
    root: Path

    @property
    def seed(self) -> int:
        """Seed of the first sample."""
        return int(self.samples["images"][0]["seed"])

    @property
    def sampling_steps(self) -> int:
        """Denoising steps of the samples."""
        return int(self.samples["steps"])

    @property
    def guidance_scale(self) -> float:
        """Guidance of the samples."""
        return float(self.samples.get("guidance_scale", 1))

    @property
    def example(self) -> str:
        """Prompt or class of the first sample; "" where the model is told nothing."""
        return str(self.samples["images"][0].get("prompt") or "")

    @property
    def folder(self) -> Path:
        """The model folder: a pipeline or adapters."""
        return self.root / "models/adapted" / self.adaptation.name

    @property
    def kind(self) -> Kind:
        """What the model is told."""
        return kind_of(self.folder)

    @property
    def lora(self) -> bool:
        """Whether the model folder holds adapters."""
        return has_adapters(self.folder)

    @property
    def tags(self) -> dict[str, str]:
        """What was made of what, and how it was measured, as tags of its run and of its version."""
        named = {name: str(getattr(self.adaptation, name)) for name in ("source", "target", "method")}
        conditions = self.measurement.conditions
        drawn = ("number of samples", "seeds", "scheduler", "denoising steps", "guidance")
        return {
            **named,
            "kind": self.kind,
            "lora": str(self.lora).lower(),
            **{f"input.{name}": digest for name, digest in self.inputs.items()},
            "input.domain": str(self.domain["digest"]),
            "licence": str(self.shots.get("licence") or "not stated"),
            "attribution": str(self.shots.get("attribution") or "not stated"),
            "sampling": ", ".join(f"{name} {conditions[name]}" for name in drawn),
            "features": str(self.metrics["features"]),
            "features.digest": str(self.metrics["features_digest"]),
        }

    @classmethod
    def load(cls, name: str, root: str | Path = ".") -> Result:
        """Read the result of one adaptation.

        Raises:
            CheckpointError: the model or its provenance is missing or damaged.
            DataError: the training log, the samples or the metrics are missing or damaged.
        """
        root = Path(root)
        record = _read_json(
            root / "models/adapted" / name / "provenance.json", CheckpointError, f"finetune@{name}"
        )
        try:
            adaptation = Adaptation.model_validate(record["params"])
            key, steps, inputs, versions = (record[k] for k in ("key", "steps", "inputs", "versions"))
        except (KeyError, TypeError, ValidationError) as error:
            raise CheckpointError(
                f"models/adapted/{name}/provenance.json is of another format: {error}. Run `dvc repro "
                f"finetune@{name}`"
            ) from error
        metrics = _read_json(root / "evaluation" / name / "metrics.json", DataError, f"evaluate@{name}")
        samples = _read_json(root / "samples/adapted" / name / "manifest.json", DataError, f"sample@{name}")
        nearest = _read_json(root / "evaluation" / name / "nearest.json", DataError, f"evaluate@{name}")
        target = adaptation.target
        shots, domain = (
            _read_json(
                root / "data/targets" / target / part / "manifest.json", DataError, f"prepare_target@{target}"
            )
            for part in ("shots", "domain")
        )
        try:
            measurement = Measurement.of(
                metrics, samples, shots["digest"], domain["digest"], nearest["threshold"]
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(
                f"evaluation/{name}, samples/adapted/{name} or data/targets/{target} lacks {error}. Run "
                f"`dvc repro evaluate@{name}`"
            ) from error
        readme = root / "models/adapted" / name / "README.md"
        text = readme.read_text(encoding="utf-8") if readme.is_file() else f"# {name}\n"
        history = list(_read_history(root / "training" / name / "history.jsonl", name))
        return cls(
            *(adaptation, key, steps, inputs, versions, history),
            *(metrics, samples, shots, domain, measurement),
            readme=text,
            root=root,
        )


def ensure_run(client: MlflowClient, result: Result, experiment: str) -> str:
    """Return the id of the training's run, complete and FINISHED.

    Where MLflow does not know it (the model came from DVC's cache, or the server was down), it is made of the
    training log, with the training's own times, and tagged `replayed`.
    """
    plan = plan_for(
        result.adaptation.name,
        result.key,
        result.adaptation,
        experiment,
        inputs=result.inputs,
        versions=result.versions,
        root=result.root,
    )
    times = [int(record["timestamp"]) for record in result.history]
    if (run_id := find_run(client, plan, experiment_id(client, experiment, result.root))) is None:
        plan = RunPlan(
            plan.name, plan.key, experiment, plan.params, {**plan.tags, "replayed": "true"}, times[0]
        )
        run_id = open_run(client, plan, result.root)
    log_missing(client, run_id, result.history)
    if client.get_run(run_id).info.status != "FINISHED":
        client.set_terminated(run_id, "FINISHED", times[-1])
    return run_id


def log_results(client: MlflowClient, run_id: str, result: Result) -> None:
    """Log metrics, lineage, pictures and files of an adaptation; doing it again changes nothing."""
    from mlflow.entities import RunTag

    log_evaluation(client, run_id, result.metrics, result.steps)
    client.log_batch(run_id, tags=[RunTag(*tag) for tag in result.tags.items()], synchronous=True)
    client.log_dict(run_id, _origin(client, run_id, result), "lineage.json")
    log_inputs(client, run_id, lineage(result.adaptation, result.root / "dvc.lock"))
    for path, folder in _files(result):
        if path.is_dir():
            client.log_artifacts(run_id, str(path), folder)
        elif path.is_file():
            client.log_artifact(run_id, str(path), folder)


def _origin(client: MlflowClient, run_id: str, result: Result) -> dict[str, Any]:
    """Return all that decided the model and its figures, in one file."""
    git = {name: value for name, value in client.get_run(run_id).data.tags.items() if name.startswith("git.")}
    return {
        "format": 1,
        "adaptation": result.adaptation.model_dump(mode="json"),
        "key": result.key,
        "versions": dict(result.versions),
        **result.tags,
        **git,
        "conditions": dict(result.measurement.conditions),
        "metrics": result.metrics.get("samples"),
        "dvc": locked_stages(f"evaluate@{result.adaptation.name}", result.root / "dvc.lock"),
    }


def _files(result: Result) -> list[tuple[Path, str | None]]:
    """List what is copied to the run, with the folder there."""
    root, name, target = result.root, result.adaptation.name, result.adaptation.target
    return [
        (root / "samples/adapted" / name / "grid.png", "samples"),
        (root / "training" / name / "previews", "previews"),
        (root / "training" / name / "losses.csv", "training"),
        (root / "evaluation" / name / "metrics.json", "evaluation"),
        (root / "evaluation" / name / "nearest.json", "evaluation"),
        (root / "data/targets" / target / "shots/contact_sheet.png", "data/shots"),
        (root / "data/targets" / target / "domain/contact_sheet.png", "data/domain"),
        (root / "params.yaml", "pipeline"),
        (root / "dvc.lock", "pipeline"),
    ]


def _read_json(path: Path, kind: type[CheckpointError | DataError], stage: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise kind(f"{path} cannot be read: {error}. Run `dvc repro {stage}`") from error
    if not isinstance(content, dict):
        raise kind(f"{path} must hold a mapping. Run `dvc repro {stage}`")
    return content


def _read_history(path: Path, name: str) -> Iterator[dict[str, float]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}. Run `dvc repro finetune@{name}`") from error
    if not records or any("step" not in record or "timestamp" not in record for record in records):
        raise DataError(f"{path} has no steps with timestamps. Run `dvc repro finetune@{name}`")
    yield from records
