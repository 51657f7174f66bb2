"""The Prefect flow: one task per stage of `dvc.yaml`, side by side where DVC's graph allows it.

DVC alone decides what has to run. Prefect starts it, queues for GPUs, watches and shows it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
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

from domainstudio.registry.audit import FLOW_RUN_VARIABLE
from domainstudio.tracking.runs import PARENT_RUN_VARIABLE
from flows import events
from flows.run import gpus as gpu_slots
from flows.run import graph
from flows.run.commands import Commands, Outcome, StageFailedError, StoppedError
from flows.run.summary import Row, markdown, picture
from flows.server import Progress, cancel_requested, unimportant

RETRIES = 1
RETRY_DELAY_SECONDS = 10.0
_POLL_SECONDS = 1.0
_CANCEL_POLL_SECONDS = 5.0


class _Run:
    """What the tasks of one flow run share."""

    def __init__(self, root: Path, slots: gpu_slots.GpuSlots, *, force: bool, pull: bool) -> None:
        self.root = root
        self.commands = Commands(root)
        self.slots = slots
        self.force, self.pull = force, pull
        self.told = {FLOW_RUN_VARIABLE: runtime.flow_run.name or ""}
        self.unchanged: frozenset[str] = frozenset()
        self.running: set[str] = set()
        self.outcomes: dict[str, Outcome] = {}
        self.failures: dict[str, StageFailedError] = {}

    def task(self, stage: graph.Stage, retries: int, retry_delay: float) -> Task[[], State[Any]]:
        """Return the Prefect task of a stage, named by its address."""

        def body() -> State[Any]:
            return self._repro(stage)

        def worth_retrying(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
            failure = self.failures.get(stage.address)
            return not self.commands.stopping and (failure is None or failure.retryable)

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
        if stage.address in self.unchanged:
            self.outcomes[stage.address] = Outcome(cached=True, seconds=0.0)
            return _cached()
        logger = get_run_logger()
        commands = self.commands
        try:
            slots = self.slots.hold(stage.gpus, lambda: commands.stopping)
            with slots as devices, self._shown(stage.address):
                outcome = commands.repro(
                    stage.address,
                    logger.info,
                    force=self.force,
                    pull=self.pull,
                    devices={**self.told, **devices},
                )
        except StoppedError as error:
            return Cancelled(message=str(error))
        except StageFailedError as error:
            self.failures[stage.address] = error
            # A returned state is retried like an exception, and shows no traceback of this file.
            return Failed(message=str(error))
        self.failures.pop(stage.address, None)
        self.outcomes[stage.address] = outcome
        if outcome.cached:
            return _cached()
        return Completed(message=f"ran {outcome.seconds:.1f} s")

    @contextlib.contextmanager
    def _shown(self, address: str) -> Iterator[None]:
        self.running.add(address)
        try:
            yield
        finally:
            self.running.discard(address)

    def row(self, address: str, state: State[Any] | None) -> Row:
        """Return the summary's line of a stage."""
        if outcome := self.outcomes.get(address):
            return Row(address, "cached" if outcome.cached else "run", outcome.seconds)
        if failure := self.failures.get(address):
            return Row(address, "failed", failure.seconds)
        if state is not None and state.is_cancelled():
            return Row(address, "cancelled")
        return Row(address, "failed" if state is not None and state.is_crashed() else "not run")


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
    if (runtime.flow_run.run_count or 1) > 1:
        with unimportant("tasks of the earlier start"):
            _close_lost()
    root = Path.cwd()
    known = graph.read()
    stages = graph.select(known, adaptations or ())
    slots = gpu_slots.from_server(gpus)
    for stage in stages.values():
        slots.check(stage.address, stage.gpus)
    run = _Run(root, slots, force=force, pull=pull)
    if not force:
        run.unchanged = graph.unchanged(known)
    futures: dict[str, PrefectFuture[State[Any]]] = {}
    try:
        for stage in stages.values():
            task = run.task(stage, retries, retry_delay)
            futures[stage.address] = task.submit(
                return_state=False, wait_for=[futures[name] for name in stage.upstream]
            )
        cancelled = _watch(run, futures)
    except BaseException:
        # KeyboardInterrupt, and Prefect's TerminationSignal for SIGTERM, arrive in this thread.
        run.commands.stop()
        raise
    for future in futures.values():
        future.wait()  # it is done: this keeps its own end, where the server's may be of a moment ago
    states = {address: future.state for address, future in futures.items()}
    _close_unstarted(stages, run, futures, states)
    return _finish(run, states, cancelled)


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


def _close_lost() -> None:
    """End the tasks of an earlier start that was lost with its node: they are shown as running for ever."""
    client = get_client(sync_client=True)
    here = FlowRunFilter(id=FlowRunFilterId(any_=[UUID(runtime.flow_run.id)]))
    for task in client.read_task_runs(flow_run_filter=here):
        if task.state is None or not task.state.is_final():
            client.set_task_run_state(task.id, Crashed(message="Its node was lost"), force=True)


def _close_unstarted(
    stages: Mapping[str, graph.Stage],
    run: _Run,
    futures: Mapping[str, PrefectFuture[State[Any]]],
    states: Mapping[str, State[Any]],
) -> None:
    """End the tasks that wait for ever as `NotReady`: it looks as if something were still to come."""
    client = get_client(sync_client=True)
    for address in (address for address, state in states.items() if state.is_pending()):
        missing = ", ".join(name for name in stages[address].upstream if name not in run.outcomes)
        state: State[Any] = Cancelled(name="NotRun", message=f"It needs {missing}")
        with unimportant("tasks that were not run"):
            client.set_task_run_state(futures[address].task_run_id, state, force=True)


def _finish(run: _Run, states: Mapping[str, State[Any]], cancelled: bool) -> State[Any]:
    rows = [run.row(address, state) for address, state in states.items()]
    with unimportant("summary"):
        # Under a run of the pipeline in MLflow, this is a workspace.
        text = markdown(run.root, rows, temporary=PARENT_RUN_VARIABLE in os.environ)
        create_markdown_artifact(text, key="adapt-summary", description="Metrics and stages")
    for stage, _, name in (row.address.partition("@") for row in rows if row.state == "run"):
        if stage == "sample":
            with unimportant("samples"):
                _show_samples(run.root, name)
        elif stage == "register":
            with unimportant("new model"):
                events.emit_registered(run.root, name)
    counts = Counter(row.state for row in rows)
    text = ", ".join(f"{number} {state}" for state, number in counts.items()) or "no stages"
    if cancelled:
        return Cancelled(message=f"Cancelled: {text}")
    if failed := [row.address for row in rows if row.state == "failed"]:
        details = "\n".join(str(run.failures[name]) for name in failed if name in run.failures)
        return Failed(message=f"{', '.join(failed)} failed ({text})\n{details}")
    return Completed(message=text)


def _show_samples(root: Path, adaptation: str) -> None:
    address = picture(root / "samples" / "adapted" / adaptation / "grid.png")
    key = f"samples-{adaptation.replace('_', '-')}"
    # An image artifact would print the address beside the picture, all of it.
    create_markdown_artifact(f"![{adaptation}]({address})", key=key, description=f"Samples of {adaptation}")
