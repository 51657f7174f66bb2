"""The MLflow run of a whole pipeline. Trainings are nested under it, and it keeps `dvc.lock`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from domainstudio.redaction import redact
from domainstudio.tracking.runs import RunPlan, open_run
from domainstudio.tracking.server import connect, tracking_uri


@dataclass(frozen=True)
class PipelineRun:
    """An open run."""

    run_id: str
    url: str | None
    """Its page; None if no server shows it."""


def start(plan: RunPlan, root: Path) -> PipelineRun:
    """Open the run of a pipeline or a sweep. The same plan opens the same run.

    Raises:
        TrackingError: MLflow cannot be reached, or refused.
    """
    with connect(root) as client:
        run_id = open_run(client, plan, root)
        experiment_id = client.get_run(run_id).info.experiment_id
    return PipelineRun(run_id, page(experiment_id, run_id, root))


def page(experiment_id: str, run_id: str, root: Path) -> str | None:
    """Return the address of a run's page, without user and password; None if no server shows it."""
    server = redact(tracking_uri(root), "")
    served = server.startswith(("http://", "https://"))
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}" if served else None


def finish(run: PipelineRun, files: Sequence[Path], status: str, root: Path) -> None:
    """Keep files as the run's artifacts, and close it.

    Args:
        run: The result of `start`.
        files: Files to keep; those that are missing are left out.
        status: FINISHED, FAILED or KILLED.
        root: The project's root.

    Raises:
        TrackingError: MLflow cannot be reached, or refused.
    """
    with connect(root) as client:
        for path in files:
            if path.is_file():
                client.log_artifact(run.run_id, str(path))
        client.set_terminated(run.run_id, status)
