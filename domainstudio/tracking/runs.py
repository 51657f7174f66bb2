"""One run of MLflow per adaptation and key: what describes it, how it is found again, how it is filled."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainstudio import git
from domainstudio.config import Section
from domainstudio.tracking import provenance, server

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

PARENT_RUN_VARIABLE = "DOMAINSTUDIO_PARENT_RUN_ID"
"""Run under which new runs are nested. MLflow's own MLFLOW_RUN_ID would be taken by whichever part of the
process starts a run first."""

METRICS_PER_BATCH = 1000
"""MLflow's limit of one request."""


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
            "domainstudio.training.recipe": self.name,
            "domainstudio.key": self.key,
        }


def plan_for(
    name: str,
    key: str,
    settings: Section,
    experiment: str,
    *,
    device: str | None = None,
    inputs: Mapping[str, str] | None = None,
    versions: Mapping[str, str] | None = None,
    root: str | Path = ".",
) -> RunPlan:
    """Describe the run of an adaptation: parameters, origin in git and DVC, versions.

    Args:
        name: the adaptation's name, and the run's.
        key: hash of the adaptation's parameters and inputs.
        settings: the resolved adaptation, or the section `pretrain`; all its values become parameters.
        experiment: name of MLflow's experiment.
        device: what trains, if that is known.
        inputs: hashes of the inputs by name.
        versions: packages that made the model, if not those of this process.
        root: the project's root.
    """
    named = ("method", "source", "target")
    tags = {
        **{name: str(getattr(settings, name)) for name in named if hasattr(settings, name)},
        **{f"input.{name}": digest for name, digest in (inputs or {}).items()},
        **{f"version.{name}": value for name, value in (versions or provenance.versions()).items()},
        **git_tags(root),
    }
    if device:
        tags["device"] = device
    if stage := os.environ.get("DVC_STAGE"):
        tags |= {"DVC_STAGE": stage, "mlflow.source.name": f"dvc stage {stage}", "mlflow.source.type": "JOB"}
    if dvc_root := os.environ.get("DVC_ROOT"):
        tags["DVC_ROOT"] = Path(dvc_root).name
    return RunPlan(name, key, experiment, flatten(settings.model_dump(mode="json")), tags)


def open_run(client: MlflowClient, plan: RunPlan, root: str | Path = ".") -> str:
    """Find the run of a plan, whatever its state, or create it; return its id, with status RUNNING.

    A run that was killed goes on. Creating asks the server first each time, so that a request which was
    answered too late does not lead to a second run.
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
    client.log_batch(
        run_id,
        params=params[:100],
        tags=[RunTag(name, value) for name, value in tags.items()],
        synchronous=True,
    )
    for start in range(100, len(params), 100):
        client.log_batch(run_id, params=params[start : start + 100], synchronous=True)
    return run_id


def find_run(client: MlflowClient, plan: RunPlan, experiment_id: str) -> str | None:
    """Return the id of the oldest run with the plan's identity, or None."""
    filters = " and ".join(f"tags.`{name}` = '{value}'" for name, value in plan.identity.items())
    runs = client.search_runs([experiment_id], filters, max_results=1, order_by=["attributes.start_time ASC"])
    return str(runs[0].info.run_id) if runs else None


def times_of(client: MlflowClient, run_id: str) -> dict[int, int]:
    """Return when each step that a run has was made, in ms since 1970."""
    return {metric.step: metric.timestamp for metric in client.get_metric_history(run_id, "seconds")}


def log_records(
    client: MlflowClient, run_id: str, records: Sequence[Mapping[str, float]], times: Mapping[int, int]
) -> None:
    """Log records of `history.jsonl` with their own steps and times, so that a repetition changes nothing.

    MLflow's key of a stored value is (name, timestamp, step, value): the same again is the same row. Steps
    that the run has from another time are left out: a training whose last states were lost made them twice.

    Args:
        client: of MLflow.
        run_id: the run.
        records: each has `step`, `timestamp` (ms since 1970) and any number of named values.
        times: of the steps that the run has (`times_of`).
    """
    from mlflow.entities import Metric

    metrics = [
        Metric(name, float(value), int(record["timestamp"]), int(record["step"]))
        for record in records
        if times.get(int(record["step"]), int(record["timestamp"])) == int(record["timestamp"])
        for name, value in record.items()
        if name not in ("step", "timestamp") and value is not None
    ]
    for start in range(0, len(metrics), METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_BATCH], synchronous=True)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested values as text by dotted name: `{"a": {"b": 1}}` becomes `{"a.b": "1"}`."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat


def git_tags(root: str | Path = ".") -> dict[str, str]:
    """Return the commit, and whether code or settings differ from it; nothing outside a repository."""
    if (state := git.state(root)) is None:
        return {}
    return {
        "git.commit": state.commit,
        "git.dirty": str(state.dirty).lower(),
        "mlflow.source.git.commit": state.commit,
    }
