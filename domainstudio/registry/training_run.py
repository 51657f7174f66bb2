"""Completes the MLflow run of a training with the results of the later stages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainstudio.project import ADAPTED_SAMPLES, EVALUATION, TARGETS, TRAINING
from domainstudio.registry.lineage import lineage, locked_stages, log_inputs
from domainstudio.registry.results import Result
from domainstudio.tracking.runs import find_run, log_evaluation, log_missing, open_run, plan_for
from domainstudio.tracking.server import experiment_id

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


def ensure_run(client: MlflowClient, result: Result, experiment: str) -> str:
    """Return the id of the training's run, complete and FINISHED.

    MLflow may not know the run, because the model came from DVC's cache or the server was down. Then the run
    is created from the training log, with the times of the training, and tagged `replayed`.
    """
    plan = plan_for(
        result.adaptation.name,
        result.record.key,
        result.adaptation,
        experiment,
        inputs=result.record.inputs,
        versions=result.record.versions,
        root=result.root,
    )
    first, last = (int(result.history[index]["timestamp"]) for index in (0, -1))
    if (run_id := find_run(client, plan, experiment_id(client, experiment, result.root))) is None:
        plan = replace(plan, tags={**plan.tags, "replayed": "true"}, start_time=first)
        run_id = open_run(client, plan, result.root)
    log_missing(client, run_id, result.history)
    if client.get_run(run_id).info.status != "FINISHED":
        client.set_terminated(run_id, "FINISHED", last)
    return run_id


def log_results(client: MlflowClient, run_id: str, result: Result) -> None:
    """Log metrics, lineage, images and files of a result. Logging them again changes nothing."""
    from mlflow.entities import RunTag

    log_evaluation(client, run_id, result.metrics, result.record.steps)
    client.log_batch(run_id, tags=[RunTag(*tag) for tag in result.tags.items()], synchronous=True)
    client.log_dict(run_id, _origin(client, run_id, result), "lineage.json")
    log_inputs(client, run_id, lineage(result.adaptation, result.root / "dvc.lock"))
    for path, folder in _files(result):
        if path.is_dir():
            client.log_artifacts(run_id, str(path), folder)
        elif path.is_file():
            client.log_artifact(run_id, str(path), folder)


def _origin(client: MlflowClient, run_id: str, result: Result) -> dict[str, Any]:
    """Return everything that decided the model and its figures."""
    git = {name: value for name, value in client.get_run(run_id).data.tags.items() if name.startswith("git.")}
    return {
        "format": 1,
        "adaptation": result.adaptation.model_dump(mode="json"),
        "key": result.record.key,
        "versions": result.record.versions,
        **result.tags,
        **git,
        "conditions": dict(result.measurement.conditions),
        "metrics": result.metrics.get("samples"),
        "dvc": locked_stages(f"evaluate@{result.adaptation.name}", result.root / "dvc.lock"),
    }


def _files(result: Result) -> Iterator[tuple[Path, str]]:
    """Yield the files and folders that become artifacts, with their folder in the run."""
    name, target = result.adaptation.name, TARGETS / result.adaptation.target
    folders = {
        "samples": [ADAPTED_SAMPLES / name / "grid.png"],
        "previews": [TRAINING / name / "previews"],
        "training": [TRAINING / name / "losses.csv"],
        "evaluation": [EVALUATION / name / "metrics.json", EVALUATION / name / "nearest.json"],
        "data/shots": [target / "shots/contact_sheet.png"],
        "data/domain": [target / "domain/contact_sheet.png"],
        "pipeline": [Path("params.yaml"), Path("dvc.lock")],
    }
    for folder, paths in folders.items():
        for path in paths:
            yield result.root / path, folder
