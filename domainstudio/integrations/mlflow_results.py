"""What the later stages found out, logged into the run that the training has made."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from domainstudio.config import Adaptation
from domainstudio.errors import CheckpointError, DataError
from domainstudio.integrations.mlflow_lineage import lineage, log_inputs
from domainstudio.integrations.mlflow_runs import RunPlan, find_run, log_records, open_run, plan_for
from domainstudio.integrations.mlflow_store import experiment_id

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
    seed: int
    """Seed of the first sample."""
    sampling_steps: int
    """Denoising steps of the samples."""
    readme: str
    root: Path

    @property
    def folder(self) -> Path:
        """The model folder."""
        return self.root / "models/adapted" / self.adaptation.name

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
        try:
            drawn = int(samples["images"][0]["seed"]), int(samples["steps"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(
                f"samples/adapted/{name}/manifest.json lacks {error}. Run `dvc repro sample@{name}`"
            ) from error
        readme = root / "models/adapted" / name / "README.md"
        text = readme.read_text(encoding="utf-8") if readme.is_file() else f"# {name}\n"
        history = list(_read_history(root / "training" / name / "history.jsonl", name))
        return cls(adaptation, key, steps, inputs, versions, history, metrics, *drawn, text, root)


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
    # The value that a replay would send last: if the run has it for each step, it has all.
    last = list(result.history[-1])[-1]
    if len(client.get_metric_history(run_id, last)) < len(result.history):
        log_records(client, run_id, result.history)
    if client.get_run(run_id).info.status != "FINISHED":
        client.set_terminated(run_id, "FINISHED", times[-1])
    return run_id


def log_results(client: MlflowClient, run_id: str, result: Result) -> None:
    """Log metrics, lineage, pictures and files of an adaptation; doing it again changes nothing."""
    from mlflow.entities import Metric, RunTag

    measured = {part: result.metrics.get(part) or {} for part in ("samples", "references")}
    known = client.get_run(run_id).data.metrics
    now = int(time.time() * 1000)
    new = [
        Metric(name, value, now, result.steps)
        for name, value in flat_numbers(measured).items()
        if known.get(name) != value
    ]
    tags = [RunTag("features", str(result.metrics.get("features", "unknown")))]
    client.log_batch(run_id, metrics=new, tags=tags, synchronous=True)
    log_inputs(client, run_id, lineage(result.adaptation, result.root / "dvc.lock"))
    for path, folder in _files(result):
        if path.is_dir():
            client.log_artifacts(run_id, str(path), folder)
        elif path.is_file():
            client.log_artifact(run_id, str(path), folder)


def flat_numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return nested finite numbers by dotted name: `{"a": {"b": 0.1}}` becomes `{"a.b": 0.1}`."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flat_numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            flat[f"{prefix}{name}"] = float(value)
    return flat


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
