"""Try settings of an adaptation side by side, on a Ray cluster: `python -m flows.sweep <key of sweeps>`.

Trials are trained, sampled and measured as the pipeline's stages do it, each with its share of a GPU. What
was measured is kept in `.cache/sweeps`: the same trial is not trained twice.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed, Failed

from domainstudio import config
from domainstudio.errors import DomainStudioError
from flows import cli
from flows.parent_run import parent_run
from flows.server import Progress, cancel_requested, unimportant
from flows.sweep import cluster, leaderboard, ranking, runs
from flows.sweep.layout import SweepPlan, lay_out
from flows.sweep.order import Order, Record, read
from flows.sweep.params_file import write_overrides
from flows.sweep.ranking import Candidate, Outcome, Status
from flows.sweep.search import described

_POLL_SECONDS, _CANCEL_POLLS = 1.0, 5
"""How often ended trials are looked for, and every how many times the server is asked for a cancellation."""


class _Sweep:
    """A sweep under way.

    Args:
        plan: what to do.
        tracked: whether MLflow has a run for it.
    """

    def __init__(self, plan: SweepPlan, tracked: bool) -> None:
        self._plan = plan
        self._tracked = tracked
        self._outcomes: dict[int, Outcome] = {}
        self._progress = Progress(len(plan.orders), "sweep-progress", "trials")
        self.cancelled = False

    def run(self, address: str | None, gpus: int | None) -> None:
        """Take what was measured before, and run the others on a cluster; equal ones under two names once."""
        waiting: dict[str, list[Order]] = {}
        for order in self._plan.orders:
            if (record := read(order.key)) is None:
                waiting.setdefault(order.key, []).append(order)
            else:
                self._measured(order, record, "kept")
        if not waiting:
            return
        log, settings = get_run_logger(), self._plan.sweep
        with cluster.connected(address, gpus) as place:
            log.info("%s; trials to run: %d", place, len(waiting))
            if missing := cluster.shortage(settings):
                log.warning(missing)
            first = [same[0] for same in waiting.values()]
            running = cluster.Running(first, settings, self._plan.root)
            try:
                self._watch(running, waiting)
            finally:  # KeyboardInterrupt and Prefect's TerminationSignal for SIGTERM arrive in this thread
                running.cancel()

    def _watch(self, running: cluster.Running, waiting: dict[str, list[Order]]) -> None:
        for poll in itertools.count(1):
            for order, record, reason in running.ended():
                for same in waiting[order.key]:
                    if record is None:
                        self._failed(same, reason)
                    else:
                        self._measured(same, record, "trained")
            if not len(running):
                return
            time.sleep(_POLL_SECONDS)
            if poll % _CANCEL_POLLS == 0 and cancel_requested():
                self.cancelled = True
                get_run_logger().warning("The run was cancelled: ending its trials")
                return

    def _failed(self, order: Order, reason: str) -> None:
        self._add(Outcome(order.trial, "failed", order.key, error=reason), reason)
        self._log(partial(runs.log_failed, order, reason))

    def _measured(self, order: Order, record: Record, status: Status) -> None:
        metric, scores = self._plan.sweep.objective.metric, ranking.scores(record.metrics)
        outcome = Outcome(order.trial, status, order.key, scores, round(record.seconds, 1), record.place)
        figure = f"{scores[metric]:.4g}" if metric in scores else "not defined"
        self._add(outcome, f"{metric} {figure}, {record.seconds:.0f} s on {record.place}")
        self._log(partial(runs.log_measured, order, record))

    def _add(self, outcome: Outcome, text: str) -> None:
        self._outcomes[outcome.trial.number] = outcome
        done, total = len(self._outcomes), len(self._plan.orders)
        logger = get_run_logger()
        log = logger.warning if outcome.status == "failed" else logger.info
        log("%d of %d: %s %s: %s", done, total, outcome.status, outcome.trial.title, text)
        self._progress.show(done, [])

    def _log(self, action: Callable[[], None]) -> None:
        """Log to MLflow, where it has the sweep; what it does not take is missing there only."""
        if not self._tracked:
            return
        try:
            action()
        except DomainStudioError as error:
            get_run_logger().warning("Not in MLflow: run the sweep again to add it. %s", error)

    def close(self) -> list[Outcome]:
        """Return the outcomes of all trials; those that did not end are `not run`."""
        for order in self._plan.orders:
            if order.trial.number not in self._outcomes:
                self._outcomes[order.trial.number] = Outcome(order.trial, "not run", order.key)
                self._log(partial(runs.log_killed, order))
        return [self._outcomes[order.trial.number] for order in self._plan.orders]


@flow(name="sweep", persist_result=False)
def sweep(
    name: str,
    params: list[str] | None = None,
    address: str | None = None,
    gpus: int | None = None,
    write: bool = False,
) -> State[Any]:
    """Try settings of an adaptation side by side, on a Ray cluster, and name the best.

    Args:
        name: A key of `sweeps`.
        params: params.yaml, and files that add to it.
        address: Of a Ray cluster, such as `auto` or `ray://host:10001`; by default `RAY_ADDRESS`, else one is
            started on this machine.
        gpus: GPUs of a cluster that is started here; by default the machine's.
        write: Write the best setting into params.yaml, as overrides of the adaptation.
    """
    try:
        return _sweep(name, params or ["params.yaml"], address, gpus, write)
    except DomainStudioError as error:
        return Failed(message=str(error))


def _sweep(name: str, files: list[str], address: str | None, gpus: int | None, write: bool) -> State[Any]:
    plan = lay_out(name, config.load(*files), Path.cwd())
    with parent_run(plan.run, plan.root, plan.tables, "sweep-mlflow") as run:
        state = _Sweep(plan, tracked=run is not None)
        try:
            state.run(address, gpus)
        finally:
            outcomes = state.close()
            ranked = ranking.rank(outcomes, plan.sweep.objective)
            _write_tables(plan, outcomes, ranked)
    chosen = ranking.best(ranked)
    text = _summary(plan, outcomes, chosen)
    if state.cancelled:
        return Cancelled(message=f"Cancelled: {text}")
    if chosen is None:
        return Failed(message=text)
    if write:
        changes = write_overrides(files, plan.sweep.adaptation, chosen.values)
        text = "\n".join([text, *(changes or [f"{files[0]} has these values already"])])
    return Completed(message=text)


def _write_tables(plan: SweepPlan, outcomes: Sequence[Outcome], ranked: Sequence[Candidate]) -> None:
    """Write the tables of a sweep and show one in Prefect."""
    table = leaderboard.rows(ranked, plan.sweep.objective)
    all_trials, ranking = plan.tables
    plan.folder.mkdir(parents=True, exist_ok=True)
    all_trials.write_text(leaderboard.to_csv(outcomes), encoding="utf-8")
    ranking.write_text(leaderboard.markdown(table), encoding="utf-8")
    with unimportant("table"):
        create_table_artifact(cast(Any, table), key="sweep-results", description=f"Sweep {plan.name}")


def _summary(plan: SweepPlan, outcomes: Sequence[Outcome], chosen: Candidate | None) -> str:
    counts = Counter(outcome.status for outcome in outcomes)
    metrics = plan.sweep.objective.metrics
    text = ", ".join(f"{number} {status}" for status, number in counts.items())
    text = f"{plan.name}: {text} ({plan.tables[1]})"
    if chosen is None:
        return f"{text}; no setting was measured that keeps all bounds"
    figures = ", ".join(f"{metric} {chosen.mean(metric):.4g}" for metric in metrics)
    return f"{text}; the best: {described(chosen.values)}: {figures}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the flow as the command line says; the exit status is 0 only if there is a best setting."""
    options = _parser().parse_args(arguments)
    return cli.run(lambda: _run(options), "every trial was ended")


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("flows.sweep", __doc__)
    parser.add_argument("name", metavar="sweep", help="key of `sweeps` in params.yaml")
    parser.add_argument("--params", nargs="+", default=["params.yaml"], help="settings; later files win")
    parser.add_argument(
        "--address", help="Ray cluster (default: RAY_ADDRESS, or one is started on this machine)"
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs of a cluster that is started here")
    parser.add_argument(
        "--write", action="store_true", help="write the best setting into params.yaml, as overrides"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the trials, and run none")
    return parser


def _run(options: argparse.Namespace) -> int:
    # An error is found at once, not after a server has started.
    plan = lay_out(options.name, config.load(*options.params), Path.cwd())
    if options.dry_run:
        for order in plan.orders:
            print(f"{order.run.name}  {'kept' if read(order.key) else 'to run':6}  {order.trial.title}")
        return 0
    cli.start_server()
    parameters = {name: getattr(options, name) for name in ("name", "params", "address", "gpus", "write")}
    return cli.show_end(sweep(**parameters, return_state=True))
