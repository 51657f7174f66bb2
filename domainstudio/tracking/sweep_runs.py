"""A sweep in MLflow: a run that holds its table, and a nested run for each trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainstudio.tracking.runs import (
    RunPlan,
    find_run,
    flatten,
    log_evaluation,
    log_missing,
    open_run,
    plan_for,
)
from domainstudio.tracking.server import connect, experiment_id

if TYPE_CHECKING:
    from domainstudio.config import Adaptation


def trial_plan(
    name: str,
    key: str,
    adaptation: Adaptation,
    values: Mapping[str, Any],
    inputs: Mapping[str, str],
    experiment: str,
    root: Path,
) -> RunPlan:
    """Describe the run of a trial. It has every value of the adaptation as parameter, and every swept one.

    Args:
        name: the run's.
        key: hash of the sweep and the trial.
        adaptation: with the swept values applied.
        values: what is swept, by dotted key.
        inputs: content hashes by name.
        experiment: MLflow's experiment (`registry.experiment`).
        root: the project's root.
    """
    plan = plan_for(name, key, adaptation, experiment, inputs=inputs, root=root)
    return replace(plan, kind="trial", params={**flatten(values), **plan.params})


def log_trial(
    plan: RunPlan,
    root: Path,
    *,
    history: Sequence[Mapping[str, float]],
    metrics: Mapping[str, Any],
    tags: Mapping[str, str],
    files: Sequence[Path],
) -> None:
    """Complete the run of a trial that was measured; doing it again changes nothing.

    Args:
        plan: of `trial_plan`.
        root: the project's root.
        history: the training's log; steps that the run has already are left out.
        metrics: the content of metrics.json.
        tags: further tags.
        files: artifacts.

    Raises:
        TrackingError: MLflow cannot be reached, or refused.
    """
    with connect(root) as client:
        run_id = open_run(client, replace(plan, tags={**plan.tags, **tags}), root)
        log_missing(client, run_id, history)
        log_evaluation(client, run_id, metrics, int(history[-1]["step"]))
        for path in files:
            client.log_artifact(run_id, str(path))
        client.set_terminated(run_id, "FINISHED")


def fail_trial(plan: RunPlan, root: Path, reason: str) -> None:
    """Mark the run of a trial as FAILED, with the reason as its description.

    Args:
        plan: of `trial_plan`.
        root: the project's root.
        reason: for people.

    Raises:
        TrackingError: MLflow cannot be reached, or refused.
    """
    with connect(root) as client:
        run_id = open_run(client, replace(plan, tags={**plan.tags, "mlflow.note.content": reason}), root)
        client.set_terminated(run_id, "FAILED")


def kill_trial(plan: RunPlan, root: Path) -> None:
    """Mark the run of a trial that was ended as KILLED, if it had begun.

    Args:
        plan: of `trial_plan`.
        root: the project's root.

    Raises:
        TrackingError: MLflow cannot be reached, or refused.
    """
    with connect(root) as client:
        run_id = find_run(client, plan, experiment_id(client, plan.experiment, root))
        if run_id is not None:
            client.set_terminated(run_id, "KILLED")
