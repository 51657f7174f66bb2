"""A flow run at its Prefect server: its progress, its cancellation, and requests that may fail."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast
from uuid import UUID

from prefect import get_run_logger, runtime
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.context import TaskRunContext
from prefect.states import Pending, Running
from prefect.utilities.engine import emit_task_run_state_change_event


class Progress:
    """The progress artifact; a server that is away for a moment costs a redraw, never the run.

    Args:
        total: How much there is to do.
        key: The artifact's.
        noun: What is done, in the plural.
    """

    def __init__(self, total: int, key: str, noun: str) -> None:
        self._total, self._key, self._noun = total, key, noun
        self._shown: tuple[int, list[str]] | None = None
        self._artifact: UUID | None = None

    def show(self, done: int, running: list[str]) -> None:
        """Show how many are done and which are running, if that is new."""
        if (done, running) == self._shown:
            return
        percent = 100.0 * done / self._total if self._total else 100.0
        now = f"; now: {', '.join(running)}" if running else ""
        text = f"{done} of {self._total} {self._noun} done{now}"
        with unimportant("progress"):
            if self._artifact is None:
                created = create_progress_artifact(percent, key=self._key, description=text)
                self._artifact = cast(UUID, created)
            else:
                update_progress_artifact(self._artifact, percent, description=text)
            self._shown = (done, running)


class TaskWait:
    """The wait of this task for something, which is not its run time: it is shown as `Waiting` meanwhile."""

    def __init__(self) -> None:
        self._began: State[Any] | None = None

    def begin(self) -> None:
        """Show that the task waits."""
        self._began = _enter(Pending(name="Waiting", message="It waits for a GPU"))

    def end(self) -> float | None:
        """Show that it runs, if it waited; return the seconds that it has waited, else None."""
        if self._began is None:
            return None
        return (_enter(Running()).timestamp - self._began.timestamp).total_seconds()


def _enter(state: State[Any]) -> State[Any]:
    """Put this task into a state, as Prefect's engine does: it adds up the run time, and tells the server."""
    if (context := TaskRunContext.get()) is None or (before := context.task_run.state) is None:
        return state
    task = context.task_run
    if before.is_running():
        task.total_run_time += state.timestamp - before.timestamp
    task.state = state
    state.state_details.task_run_id, state.state_details.flow_run_id = task.id, task.flow_run_id
    with unimportant("state of a task"):
        emit_task_run_state_change_event(task, before, state)
    return state


def cancel_requested() -> bool:
    """Tell whether somebody cancelled this flow run at the server."""
    with unimportant("cancellation"):
        state = get_client(sync_client=True).read_flow_run(UUID(runtime.flow_run.id)).state
        return state is not None and (state.is_cancelling() or state.is_cancelled())
    return False


@contextlib.contextmanager
def unimportant(what: str) -> Iterator[None]:
    """Turn an error of this block into a warning that names `what`."""
    try:
        yield
    except Exception as error:
        get_run_logger().warning("Prefect's server gave an error or no answer (%s): %s", what, error)
