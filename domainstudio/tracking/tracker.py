"""Training runs in MLflow: one run per adaptation and key, however often the training is restarted.

Nothing here can stop a training. What MLflow does not take is kept and sent again in order, and what is
never sent is in `training/<adaptation>/history.jsonl`, from where `stages.register` replays it.
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
from pathlib import Path
from typing import TYPE_CHECKING

from domainstudio.config import Section
from domainstudio.redaction import redact
from domainstudio.tracking import server
from domainstudio.tracking.runs import RunPlan, log_records, open_run, plan_for, times_of

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient
    from PIL.Image import Image

logger = logging.getLogger(__name__)

PATIENCE = 20
"""After a failure of s seconds nothing is tried for `PATIENCE * s` seconds: a server that hangs costs a
training at most 1/20 of its time."""

Operation = Callable[["MlflowClient", str], None]
"""Something to do for a run, given its id; safe to do twice."""


class RunTracker:
    """Sends history and pictures to one run of MLflow, and keeps what could not be sent."""

    def __init__(self, plan: RunPlan, root: str | Path = ".") -> None:
        self._plan = plan
        self._root = Path(root)
        self._client: MlflowClient | None = None
        self._run_id: str | None = None
        self._times: Mapping[int, int] = {}
        self._pending: deque[Operation] = deque()
        self._records: list[dict[str, float]] | None = None  # of the last one that is pending
        self._retry_at = 0.0
        self._warned = False
        self._flush()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None as long as MLflow has not been reached."""
        return self._run_id

    @property
    def pending(self) -> int:
        """Number of operations that MLflow has not taken yet."""
        return len(self._pending)

    def log_history(self, records: Sequence[Mapping[str, float]]) -> None:
        """Log records of `history.jsonl`; those that the run has already are not logged twice.

        Args:
            records: each has `step`, `timestamp` (ms since 1970) and any number of named values.
        """
        copies = [dict(record) for record in records]
        if self._pending and self._records is not None:  # sent together, not in a request for each
            self._records += copies
            self._flush()
            return
        self.submit(lambda client, run_id: log_records(client, run_id, copies, self._times))
        self._records = copies

    def log_image(self, image: Image, name: str) -> None:
        """Log a picture as the run's artifact `name`, such as `previews/step-000100.png`."""
        copy = image.copy()
        self.submit(lambda client, run_id: client.log_image(run_id, copy, artifact_file=name))

    def submit(self, operation: Operation) -> None:
        """Do something with the run, now or once MLflow answers again, after all that came before."""
        self._records = None
        self._pending.append(operation)
        self._flush()

    def close(self, status: str) -> None:
        """Try a last time to send everything, and set the run's status (FINISHED, FAILED or KILLED)."""
        self._pending.append(lambda client, run_id: client.set_terminated(run_id, status))
        self._retry_at = 0.0
        self._flush()
        if self._pending:
            logger.warning(
                "MLflow at %s lacks part of run %s: `python -m stages.register %s` sends it from "
                "training/%s/history.jsonl once MLflow answers",
                server.shown_uri(self._root),
                *[self._plan.name] * 3,
            )

    def _flush(self) -> None:
        if time.monotonic() < self._retry_at:
            return
        started = time.monotonic()
        try:
            with server.calling(server.IMPATIENT):
                if self._client is None:
                    self._client = server.client(self._root)
                if self._run_id is None:
                    run_id = open_run(self._client, self._plan, self._root)
                    self._times = times_of(self._client, run_id)
                    self._run_id = run_id
                while self._pending:
                    started = time.monotonic()  # what was sent before a failure is no part of it
                    self._do(self._client, self._run_id, self._pending[0])
                    self._pending.popleft()
        except Exception as error:
            self._retry_at = time.monotonic() + max(15.0, PATIENCE * (time.monotonic() - started))
            self._warn(error)

    def _do(self, client: MlflowClient, run_id: str, operation: Operation) -> None:
        try:
            operation(client, run_id)
        except Exception as error:
            if not server.is_refusal(error):
                raise
            # It would be refused each time, and hold up all that follows.
            logger.warning("MLflow refused a record of run %s, which is left out: %s", run_id, error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "MLflow at %s does not take run %s: training goes on, and the record is sent later. "
                "Check MLFLOW_TRACKING_URI and the server. %s: %s",
                server.shown_uri(self._root),
                self._plan.name,
                type(error).__name__,
                redact(str(error)).partition("\n")[0],
            )


class NullTracker:
    """Takes everything and sends nothing: of all processes of a training only the first has a tracker."""

    def log_history(self, records: Sequence[Mapping[str, float]]) -> None:
        """Do nothing."""

    def log_image(self, image: Image, name: str) -> None:
        """Do nothing."""


@contextmanager
def run_for(
    name: str,
    key: str,
    settings: Section,
    inputs: Mapping[str, str] | None = None,
    *,
    experiment: str = "domainstudio",
    device: str | None = None,
    root: str | Path = ".",
) -> Iterator[RunTracker | NullTracker]:
    """Track the training of an adaptation, in the run that it already has or else in a new one.

    Args:
        name: the adaptation's name, and the run's.
        key: hash of the adaptation's parameters and inputs.
        settings: the resolved adaptation, or the section `pretrain`; its values become parameters.
        inputs: hashes of the inputs by name, such as `source` and `shots`.
        experiment: name of MLflow's experiment (`registry.experiment`).
        device: what trains, such as `cpu` or `cuda`; None where that is not known yet.
        root: the project's root.

    Yields:
        A tracker, which never raises. At the end the run is FINISHED; FAILED after an exception; KILLED
        after SIGTERM or Ctrl-C. After SIGKILL it stays RUNNING until the training is started again.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        yield NullTracker()
        return
    plan = plan_for(name, key, settings, experiment, device=device, inputs=inputs, root=root)
    with tracked(plan, root) as tracker:
        yield tracker


@contextmanager
def tracked(plan: RunPlan, root: str | Path = ".") -> Iterator[RunTracker]:
    """Track what happens in this block in the run of a plan.

    Args:
        plan: what identifies and describes the run.
        root: the project's root.

    Yields:
        A tracker, as `run_for` does.
    """
    tracker = RunTracker(plan, root)
    status = "FINISHED"
    try:
        with _terminated_by_exception():
            yield tracker
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        raise
    finally:
        tracker.close(status)


@contextmanager
def _terminated_by_exception() -> Iterator[None]:
    """Let SIGTERM end a block as Ctrl-C does, unless somebody else has already taken care of it."""
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
