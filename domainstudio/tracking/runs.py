"""Runs of MLflow: one per adaptation and key. How a run is described, found again and filled."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainstudio import git
from domainstudio.config import Section
from domainstudio.tracking import provenance, server

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

PARENT_RUN_VARIABLE = "DOMAINSTUDIO_PARENT_RUN_ID"
"""Environment variable: the run under which new runs are nested. MLflow's own MLFLOW_RUN_ID would apply to
whichever run a process starts first."""

METRICS_PER_REQUEST, PARAMS_PER_REQUEST = 1000, 100
"""MLflow's limits."""

METRIC_SECTIONS = ("samples", "references", "probe", "attributes", "paired", "clip")
"""Sections of metrics.json that are logged. `attributes` needs images with known ones, `paired` models with a
condition, `clip` needs CLIP."""


@dataclass(frozen=True)
class RunPlan:
    """What identifies and describes the run of one adaptation."""

    name: str
    """The adaptation's name, which is also the run's."""
    key: str
    """Hash of the parameters and inputs: same key, same run."""
    experiment: str
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    start_time: int | None = None
    """When the training began, in ms since 1970; None for now."""
    kind: str = "finetune"
    """What the run is of: `finetune`, `pipeline`, `sweep` or its `trial`."""

    @property
    def identity(self) -> dict[str, str]:
        """Tags by which the run is found again."""
        return {
            "domainstudio.kind": self.kind,
            "domainstudio.adaptation": self.name,
            "domainstudio.key": self.key,
        }


def plan_for(
    name: str,
    key: str,
    settings: Section,
    experiment: str,
    *,
    inputs: Mapping[str, str] | None = None,
    versions: Mapping[str, str] | None = None,
    root: str | Path = ".",
) -> RunPlan:
    """Describe the run of an adaptation by its parameters, its commit, its DVC stage and its packages.

    Args:
        name: The adaptation's name, and the run's.
        key: Hash of the adaptation's parameters and inputs.
        settings: The resolved adaptation, or the section `pretrain`. All values become parameters.
        experiment: Name of MLflow's experiment.
        inputs: Hashes of the inputs by name.
        versions: Packages that made the model; by default those of this process.
        root: The project's root.
    """
    named = ("method", "source", "target")
    tags = {
        **{name: str(getattr(settings, name)) for name in named if hasattr(settings, name)},
        **{f"input.{name}": digest for name, digest in (inputs or {}).items()},
        **{f"version.{name}": value for name, value in (versions or provenance.versions()).items()},
        **git_tags(root),
        **_stage_tags(),
    }
    return RunPlan(name, key, experiment, flatten(settings.model_dump(mode="json")), tags)


def git_tags(root: str | Path = ".") -> dict[str, str]:
    """Return the commit and whether code or settings differ from it; nothing outside a repository."""
    if (state := git.state(root)) is None:
        return {}
    dirty = str(state.dirty).lower()
    return {"git.commit": state.commit, "git.dirty": dirty, "mlflow.source.git.commit": state.commit}


def _stage_tags() -> dict[str, str]:
    tags: dict[str, str] = {}
    if stage := os.environ.get("DVC_STAGE"):
        tags |= {"DVC_STAGE": stage, "mlflow.source.name": f"dvc stage {stage}", "mlflow.source.type": "JOB"}
    if root := os.environ.get("DVC_ROOT"):
        tags["DVC_ROOT"] = Path(root).name
    return tags


def open_run(client: MlflowClient, plan: RunPlan, root: str | Path = ".") -> str:
    """Return the id of a plan's run, which gets the status RUNNING. It is created if it is missing.

    A killed run continues. The server is asked for the run each time before one is created, so a request
    that was answered too late does not lead to a second run.
    """
    from mlflow.entities import Param, RunTag
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

    experiment = server.experiment_id(client, plan.experiment, root)
    tags = {**plan.tags, **plan.identity}
    if parent := os.environ.get(PARENT_RUN_VARIABLE):
        tags[MLFLOW_PARENT_RUN_ID] = parent
    if (run_id := find_run(client, plan, experiment)) is None:
        run_id = str(client.create_run(experiment, plan.start_time, tags, plan.name).info.run_id)
    else:
        client.update_run(run_id, status="RUNNING")
    known = client.get_run(run_id).data.params
    params = [Param(name, value) for name, value in plan.params.items() if name not in known]
    client.log_batch(run_id, tags=[RunTag(*tag) for tag in tags.items()], synchronous=True)
    for start in range(0, len(params), PARAMS_PER_REQUEST):
        client.log_batch(run_id, params=params[start : start + PARAMS_PER_REQUEST], synchronous=True)
    return run_id


def find_run(client: MlflowClient, plan: RunPlan, experiment_id: str) -> str | None:
    """Return the id of the oldest run with the plan's identity, or None."""
    filters = " and ".join(f"tags.`{name}` = '{value}'" for name, value in plan.identity.items())
    runs = client.search_runs([experiment_id], filters, max_results=1, order_by=["attributes.start_time ASC"])
    return str(runs[0].info.run_id) if runs else None


def step_times(client: MlflowClient, run_id: str) -> dict[int, int]:
    """Return the time of each logged step of a run, in ms since 1970."""
    return {metric.step: metric.timestamp for metric in client.get_metric_history(run_id, "seconds")}


def log_records(
    client: MlflowClient, run_id: str, records: Sequence[Mapping[str, float]], times: Mapping[int, int]
) -> None:
    """Log records of `history.jsonl` with their own steps and times. Logging them again changes nothing.

    MLflow stores a value once per (name, timestamp, step, value). A training that lost its last states makes
    their steps again, at other times; steps that the run has with another time are left out.

    Args:
        client: MLflow.
        run_id: The run.
        records: Each has `step`, `timestamp` (ms since 1970) and any number of named values.
        times: The run's logged steps and their times (`step_times`).
    """
    from mlflow.entities import Metric

    metrics = [
        Metric(name, float(value), int(record["timestamp"]), int(record["step"]))
        for record in records
        if times.get(int(record["step"]), int(record["timestamp"])) == int(record["timestamp"])
        for name, value in record.items()
        if name not in ("step", "timestamp") and value is not None
    ]
    for start in range(0, len(metrics), METRICS_PER_REQUEST):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_REQUEST], synchronous=True)


def log_missing(client: MlflowClient, run_id: str, history: Sequence[Mapping[str, float]]) -> None:
    """Log those records of a training's history that its run lacks."""
    last = list(history[-1])[-1]  # logged last, so where it is complete, everything is
    if len(client.get_metric_history(run_id, last)) < len(history):
        log_records(client, run_id, history, step_times(client, run_id))


def log_evaluation(client: MlflowClient, run_id: str, metrics: Mapping[str, Any], step: int) -> None:
    """Log the numbers of metrics.json at a step. Values that the run has already are not logged again."""
    from mlflow.entities import Metric

    values = finite_numbers({name: metrics.get(name) or {} for name in METRIC_SECTIONS})
    known, now = client.get_run(run_id).data.metrics, int(time.time() * 1000)
    new = [Metric(name, value, now, step) for name, value in values.items() if known.get(name) != value]
    client.log_batch(run_id, metrics=new, synchronous=True)


def flatten(values: Mapping[str, Any]) -> dict[str, str]:
    """Return nested values as text by dotted name: `{"a": {"b": 1}}` becomes `{"a.b": "1"}`."""
    return {name: str(value) for name, value in _leaves(values)}


def finite_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return nested finite numbers by dotted name: `{"a": {"b": 0.1}}` becomes `{"a.b": 0.1}`."""
    return {
        name: float(value)
        for name, value in _leaves(values)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if name == "intervals":
            for key, (low, high) in value.items():
                yield from ((f"{prefix}{key}.low", low), (f"{prefix}{key}.high", high))
        elif isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
