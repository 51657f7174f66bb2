"""Tracks trainings in MLflow: one run per adaptation and key, however often the training is restarted.

Tracking never stops a training. Records that MLflow does not take are kept, and sent later in order.
`training/<adaptation>/history.jsonl` holds all records, so `stages.register` can send those that are missing.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from domainstudio.config import Section
from domainstudio.redaction import one_line
from domainstudio.tracking import server
from domainstudio.tracking.runs import RunPlan, log_records, open_run, plan_for, step_times

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient
    from PIL.Image import Image

logger = logging.getLogger(__name__)

PAUSE = 20
"""After a failure that took s seconds, the next try waits `PAUSE * s` seconds, and at least `MIN_PAUSE`. So a
server that hangs costs a training at most 1/20 of its time."""
MIN_PAUSE = 15.0

Operation = Callable[["MlflowClient", str], None]
"""A change of a run, given its id. It is safe to do it twice."""


class RunTracker:
    """Sends history and images to one run of MLflow, and keeps what could not be sent yet."""

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan
        self._client: MlflowClient | None = None
        self._run_id: str | None = None
        self._times: Mapping[int, int] = {}
        self._pending: deque[Operation] = deque()
        self._records: list[dict[str, float]] | None = None  # of the last pending operation
        self._retry_at = 0.0
        self._warned = False
        self._flush()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until MLflow has answered."""
        return self._run_id

    @property
    def pending(self) -> int:
        """Number of operations that MLflow has not taken yet."""
        return len(self._pending)

    def log_history(self, records: Sequence[Mapping[str, float]]) -> None:
        """Log records of `history.jsonl`. Records that the run has already are not logged twice.

        Args:
            records: Each has `step`, `timestamp` (ms since 1970) and any number of named values.
        """
        copies = [dict(record) for record in records]
        if self._pending and self._records is not None:  # one request for all, not one for each
            self._records += copies
            self._flush()
            return
        self.submit(lambda client, run_id: log_records(client, run_id, copies, self._times))
        self._records = copies

    def log_image(self, image: Image, name: str) -> None:
        """Log an image as the run's artifact `name`, such as `previews/step-000100.png`."""
        copy = image.copy()
        self.submit(lambda client, run_id: client.log_image(run_id, copy, artifact_file=name))

    def submit(self, operation: Operation) -> None:
        """Change the run now, or later if MLflow does not answer. Operations keep their order."""
        self._records = None
        self._pending.append(operation)
        self._flush()

    def close(self, status: str) -> None:
        """Try once more to send everything, and set the run's status (FINISHED, FAILED or KILLED)."""
        self._pending.append(lambda client, run_id: client.set_terminated(run_id, status))
        self._retry_at = 0.0
        self._flush()
        if self._pending:
            logger.warning(
                "MLflow at %s lacks part of run %s: `python -m stages.register %s` sends it from "
                "training/%s/history.jsonl once MLflow answers",
                server.shown_uri(),
                *[self._plan.name] * 3,
            )

    def _flush(self) -> None:
        if time.monotonic() < self._retry_at:
            return
        started = time.monotonic()
        try:
            with server.configured(server.IMPATIENT):
                client, run_id = self._connect()
                while self._pending:
                    started = time.monotonic()  # the time of the one that fails, not of those before
                    _try(self._pending[0], client, run_id)
                    self._pending.popleft()
        except Exception as error:
            self._retry_at = time.monotonic() + max(MIN_PAUSE, PAUSE * (time.monotonic() - started))
            self._warn(error)

    def _connect(self) -> tuple[MlflowClient, str]:
        """Return a client and the run's id; both are made at the first call that MLflow answers."""
        self._client = self._client or server.new_client()
        if self._run_id is None:
            run_id = open_run(self._client, self._plan)
            self._times = step_times(self._client, run_id)
            self._run_id = run_id
        return self._client, self._run_id

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "MLflow at %s does not take run %s: training goes on, and the record is sent later. "
                "Check MLFLOW_TRACKING_URI and the server. %s: %s",
                server.shown_uri(),
                self._plan.name,
                type(error).__name__,
                one_line(error),
            )


def _try(operation: Operation, client: MlflowClient, run_id: str) -> None:
    """Do an operation. One that MLflow refuses is left out: it would fail each time and block the rest.

    Raises:
        Exception: any other failure.
    """
    try:
        operation(client, run_id)
    except Exception as error:
        if not server.is_refusal(error):
            raise
        logger.warning("MLflow refused a record of run %s, which is left out: %s", run_id, error)


@contextmanager
def run_for(
    name: str,
    key: str,
    settings: Section,
    inputs: Mapping[str, str] | None = None,
    *,
    experiment: str = "domainstudio",
) -> Iterator[RunTracker | None]:
    """Track the training of an adaptation in its run, which is created if it is missing.

    Args:
        name: The adaptation's name, and the run's.
        key: Hash of the adaptation's parameters and inputs.
        settings: The resolved adaptation, or the section `pretrain`. Its values become parameters.
        inputs: Hashes of the inputs by name, such as `source` and `shots`.
        experiment: Name of MLflow's experiment (`registry.experiment`).

    Yields:
        A tracker, which never raises; None in all processes but the first. At the end the run is FINISHED;
        after an exception FAILED; after SIGTERM or Ctrl-C KILLED. After SIGKILL it stays RUNNING until the
        training is started again.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        yield None
        return
    with tracked(plan_for(name, key, settings, experiment, inputs=inputs)) as tracker:
        yield tracker


@contextmanager
def tracked(plan: RunPlan) -> Iterator[RunTracker]:
    """Track this block in the run of a plan, as `run_for` does."""
    tracker = RunTracker(plan)
    status = "FINISHED"
    try:
        with _sigterm_as_exception():
            yield tracker
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        raise
    finally:
        tracker.close(status)


@contextmanager
def _sigterm_as_exception() -> Iterator[None]:
    """Make SIGTERM end a block as Ctrl-C does, unless SIGTERM has a handler already."""
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if ours:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
