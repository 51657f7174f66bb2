"""The Prefect flow: one task per stage of `dvc.yaml`, side by side where DVC's graph allows it.

DVC alone decides what has to run. Prefect starts it, queues for GPUs, watches and shows it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from prefect import flow, get_run_logger, runtime
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State, TaskRun
from prefect.futures import PrefectFuture, wait
from prefect.states import Cancelled, Completed, Crashed, Failed
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.tasks import Task

from domainstudio.project import ADAPTED_SAMPLES
from domainstudio.registry.audit import FLOW_RUN_VARIABLE
from domainstudio.tracking.runs import PARENT_RUN_VARIABLE
from flows import events
from flows.run import gpus as gpu_slots
from flows.run import graph
from flows.run.commands import Commands, Outcome, StageFailedError, StoppedError
from flows.run.summary import Row, markdown, picture
from flows.server import Progress, TaskWait, cancel_requested, unimportant

RETRIES = 1
RETRY_DELAY_SECONDS = 10.0
_POLL_SECONDS = 1.0
_CANCEL_POLL_SECONDS = 5.0


class _Run:
    """One run of the flow: what its tasks share, and what became of them."""

    def __init__(
        self,
        stages: Mapping[str, graph.Stage],
        unchanged: Collection[str],
        slots: gpu_slots.GpuSlots,
        *,
        force: bool,
        pull: bool,
    ) -> None:
        self.stages = stages
        self.root = Path.cwd()
        self.commands = Commands(self.root)
        self.running: set[str] = set()
        self.results: dict[str, Outcome | StageFailedError] = {}
        self._unchanged, self._slots, self._force, self._pull = unchanged, slots, force, pull
        self._variables = {FLOW_RUN_VARIABLE: runtime.flow_run.name or ""}

    def task(self, stage: graph.Stage, retries: int, retry_delay: float) -> Task[[], State[Any]]:
        """Return the Prefect task of a stage, named by its address."""

        def body() -> State[Any]:
            return self._repro(stage)

        def worth_retrying(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
            result = self.results.get(stage.address)
            refused = isinstance(result, StageFailedError) and not result.retryable
            return not self.commands.stopping and not refused

        return Task(
            fn=body,
            name=stage.address,
            task_run_name=stage.address,
            description=stage.description,
            cache_policy=NO_CACHE,
            persist_result=False,
            retries=retries,
            retry_delay_seconds=retry_delay,
            retry_condition_fn=worth_retrying,
        )

    def _repro(self, stage: graph.Stage) -> State[Any]:
        address, commands = stage.address, self.commands
        if address in self._unchanged:
            self.results[address] = Outcome(cached=True, seconds=0.0)
            return _cached()
        log = get_run_logger().info
        waiting = TaskWait()

        def waits(whom: str) -> None:
            log(f"{address} waits for {'a GPU' if stage.gpus == 1 else f'{stage.gpus} GPUs'}, held by {whom}")
            waiting.begin()

        holder = " of ".join(filter(None, (address, self._variables[FLOW_RUN_VARIABLE])))
        slots = self._slots.hold(stage.gpus, lambda: commands.stopping, holder, waits)
        try:
            with slots as devices, self._shown(address):
                if seconds := waiting.end():
                    log(f"{address} waited {seconds:.0f} s, and starts now")
                variables = {**self._variables, **devices}
                result = commands.repro(address, log, force=self._force, pull=self._pull, variables=variables)
        except StoppedError as error:
            return Cancelled(message=str(error))
        except StageFailedError as error:
            self.results[address] = error
            # A returned state is retried like an exception, and shows no traceback of this file.
            return Failed(message=str(error))
        self.results[address] = result
        return _cached() if result.cached else Completed(message=f"ran {result.seconds:.1f} s")

    @contextlib.contextmanager
    def _shown(self, address: str) -> Iterator[None]:
        self.running.add(address)
        try:
            yield
        finally:
            self.running.discard(address)

    def row(self, address: str, state: State[Any]) -> Row:
        """Return the summary's line of a stage, whose task ended in a state."""
        result = self.results.get(address)
        if isinstance(result, Outcome):
            return Row(address, "cached" if result.cached else "run", result.seconds)
        if isinstance(result, StageFailedError):
            return Row(address, "failed", result.seconds)
        if state.is_cancelled():
            return Row(address, "cancelled")
        return Row(address, "failed" if state.is_crashed() else "not run")


def _cached() -> State[Any]:
    return Completed(name="Cached", message="its outputs are up to date")


@flow(name="adapt", task_runner=cast(Any, ThreadPoolTaskRunner()), persist_result=False)
def adapt(
    adaptations: list[str] | None = None,
    force: bool = False,
    pull: bool = False,
    gpus: int | None = None,
    retries: int = RETRIES,
    retry_delay: float = RETRY_DELAY_SECONDS,
) -> State[Any]:
    """Bring the pipeline up to date, as `dvc repro` would, stages side by side.

    Args:
        adaptations: Keys of `adaptations`, or addresses of stages, to run with all that they need; all
            stages if none is given.
        force: Run the stages even if nothing changed.
        pull: Take from the DVC remote what was made before, here or elsewhere.
        gpus: Stages' GPU slots on this machine; also the limit `gpu` of a Prefect server that has none.
        retries: Further attempts at a stage that failed, unless it refused its settings.
        retry_delay: Seconds before each.
    """
    with unimportant("tasks of an earlier start"):
        _close_lost()
    known = graph.read()
    stages = graph.select(known, adaptations or ())
    slots = gpu_slots.from_server(gpus)
    for stage in stages.values():
        slots.check(stage.address, stage.gpus)
    unchanged = frozenset() if force else graph.unchanged(known, stages)
    run = _Run(stages, unchanged, slots, force=force, pull=pull)
    futures: dict[str, PrefectFuture[State[Any]]] = {}
    try:
        for address, stage in stages.items():
            needed = [futures[name] for name in stage.upstream]
            task = run.task(stage, retries, retry_delay)
            futures[address] = task.submit(return_state=False, wait_for=needed)
        cancelled = _watch(run, futures)
    except BaseException:
        # KeyboardInterrupt, and Prefect's TerminationSignal for SIGTERM, arrive in this thread.
        run.commands.stop()
        raise
    return _finish(run, futures, cancelled)


def _watch(run: _Run, futures: Mapping[str, PrefectFuture[State[Any]]]) -> bool:
    """Wait for all tasks, showing the progress; return whether the run was cancelled at the server."""
    progress, cancelled, looked = Progress(len(futures), "adapt-progress", "stages"), False, time.monotonic()
    while True:
        done, pending = wait(list(futures.values()), timeout=_POLL_SECONDS)
        progress.show(len(done), sorted(run.running))
        if not pending:
            return cancelled
        if not cancelled and time.monotonic() - looked > _CANCEL_POLL_SECONDS:
            looked = time.monotonic()
            if cancelled := cancel_requested():
                get_run_logger().warning("The run was cancelled: ending its stages")
                run.commands.stop()


def _finish(run: _Run, futures: Mapping[str, PrefectFuture[State[Any]]], cancelled: bool) -> State[Any]:
    """Close the tasks that did not start, show what the run made, and return how it ended."""
    for future in futures.values():
        future.wait()  # it is done; this takes its own final state, because the server's may lag behind
    states = {address: future.state for address, future in futures.items()}
    for address, state in states.items():
        if state.is_pending():
            with unimportant("tasks that were not run"):
                _close_unstarted(run, address, futures[address].task_run_id)
    rows = [run.row(address, state) for address, state in states.items()]
    _show(run.root, rows)
    counts = Counter(row.state for row in rows)
    text = ", ".join(f"{number} {state}" for state, number in counts.items()) or "no stages"
    if cancelled:
        return Cancelled(message=f"Cancelled: {text}")
    if failed := [row.address for row in rows if row.state == "failed"]:
        details = "\n".join(str(run.results[name]) for name in failed if name in run.results)
        return Failed(message=f"{', '.join(failed)} failed ({text})\n{details}")
    return Completed(message=text)


def _close_lost() -> None:
    """End the tasks of an earlier start that was lost with its node. They would be shown as running."""
    if (runtime.flow_run.run_count or 1) == 1:
        return
    client = get_client(sync_client=True)
    here = FlowRunFilter(id=FlowRunFilterId(any_=[UUID(runtime.flow_run.id)]))
    for task in client.read_task_runs(flow_run_filter=here):
        if task.state is None or not task.state.is_final():
            client.set_task_run_state(task.id, Crashed(message="Its node was lost"), force=True)


def _close_unstarted(run: _Run, address: str, task_run: UUID) -> None:
    """End a task that will never start. It would be shown as `NotReady`."""
    done = [name for name, result in run.results.items() if isinstance(result, Outcome)]
    missing = ", ".join(name for name in run.stages[address].upstream if name not in done)
    state: State[Any] = Cancelled(name="NotRun", message=f"It needs {missing}")
    get_client(sync_client=True).set_task_run_state(task_run, state, force=True)


def _show(root: Path, rows: Sequence[Row]) -> None:
    """Show metrics, samples and stages at the server, and emit events for what was registered."""
    with unimportant("summary"):
        # Below a parent run in MLflow, the folder is a clone that is removed.
        text = markdown(root, rows, temporary=PARENT_RUN_VARIABLE in os.environ)
        create_markdown_artifact(text, key="adapt-summary", description="Metrics and stages")
    for stage, _, name in (row.address.partition("@") for row in rows if row.state == "run"):
        if stage == "sample":
            with unimportant("samples"):
                _show_samples(root, name)
        elif stage == "register":
            with unimportant("new model"):
                events.emit_registered(root, name)


def _show_samples(root: Path, adaptation: str) -> None:
    url = picture(root / ADAPTED_SAMPLES / adaptation / "grid.png")
    key = f"samples-{adaptation.replace('_', '-')}"
    # An image artifact would print the whole data URL beside the picture.
    create_markdown_artifact(f"![{adaptation}]({url})", key=key, description=f"Samples of {adaptation}")
