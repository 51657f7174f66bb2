"""The run of a trial in MLflow, nested under the sweep's. Whatever is logged twice is there once.

Ray's own MLflow callback (Ray 2.60) does not serve here: it opens a second run where a sweep goes on, and
logs nothing of the trials that were measured before.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from domainstudio.tracking.runs import find_run, log_evaluation, log_missing, open_run
from domainstudio.tracking.server import connect, experiment_id
from flows.sweep.order import Order, Record, folder


def log_measured(order: Order, record: Record) -> None:
    """Complete the run of a trial that was measured.

    Raises:
        TrackingError: MLflow cannot be reached, or refused.
    """
    place = {"node": record.node, "gpus": ",".join(record.gpus)}
    root = Path(order.root)
    with connect(root) as client:
        run_id = open_run(client, replace(order.run, tags={**order.run.tags, **place}), root)
        log_missing(client, run_id, record.history)
        log_evaluation(client, run_id, record.metrics, int(record.history[-1]["step"]))
        for name in ("grid.png", "record.json"):
            client.log_artifact(run_id, str(folder(order.key) / name))
        client.set_terminated(run_id, "FINISHED")


def log_failed(order: Order, reason: str) -> None:
    """Mark the run of a trial as FAILED, with the reason as its description.

    Raises:
        TrackingError: MLflow cannot be reached, or refused.
    """
    root = Path(order.root)
    with connect(root) as client:
        noted = {**order.run.tags, "mlflow.note.content": reason}
        client.set_terminated(open_run(client, replace(order.run, tags=noted), root), "FAILED")


def log_killed(order: Order) -> None:
    """Mark the run of a trial that was ended as KILLED, if it had begun.

    Raises:
        TrackingError: MLflow cannot be reached, or refused.
    """
    root = Path(order.root)
    with connect(root) as client:
        run_id = find_run(client, order.run, experiment_id(client, order.run.experiment, root))
        if run_id is not None:
            client.set_terminated(run_id, "KILLED")
