"""Try settings of an adaptation side by side, on a Ray cluster: `python -m flows.sweep <key of sweeps>`.

Trials are trained, sampled and measured as the pipeline's stages do it, each with its share of a GPU. What
was measured is kept in `.cache/sweeps`: the same trial is not trained twice.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, cast

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed, Failed

from domainstudio import config
from domainstudio.errors import DomainStudioError
from domainstudio.sweep import search
from domainstudio.sweep.search import Candidate, Outcome
from domainstudio.tracking import sweep_runs
from domainstudio.tracking.runs import RunPlan
from domainstudio.tracking.server import tracking_uri
from flows import cli
from flows.parent_run import parent_run
from flows.server import Progress, cancel_requested, unimportant
from flows.sweep import cluster, leaderboard, shipping, worker
from flows.sweep.layout import Planned, SweepPlan, lay_out
from flows.sweep.params_file import write_overrides

_POLL_SECONDS = 1.0
_CANCEL_POLL_SECONDS = 5.0


class _Sweep:
    """A sweep under way.

    Args:
        plan: what to do.
        tracked: whether MLflow has a run for it.
    """

    def __init__(self, plan: SweepPlan, tracked: bool) -> None:
        self._plan = plan
        self._tracked = tracked
        self._waiting: dict[str, list[Planned]] = {}
        self._outcomes: dict[int, Outcome] = {}
        self._progress = Progress(len(plan.trials), "sweep-progress", "trials")
        self.cancelled = False

    def take_kept(self) -> None:
        """Take the results of trials that were measured before; the others wait."""
        for planned in self._plan.trials:
            if (record := worker.read(planned.order.key)) is None:
                self._waiting.setdefault(planned.order.key, []).append(planned)
            else:
                self._measured(planned, record, "kept")

    def run(self, address: str | None, gpus: int | None) -> None:
        """Run the trials that wait on a cluster; those that are the same under other names once."""
        if not (orders := [same[0].order for same in self._waiting.values()]):
            return
        log, settings = get_run_logger(), self._plan.sweep
        with cluster.connected(address, gpus) as described:
            log.info("%s; trials to run: %d", described, len(orders))
            if missing := cluster.shortage(settings):
                log.warning(missing)
            environment = {
                "MLFLOW_TRACKING_URI": tracking_uri(self._plan.root),
                **cluster.environment(os.environ),
            }
            running = cluster.Running(orders, settings, environment, self._archives(orders))
            try:
                self._watch(running)
            finally:  # KeyboardInterrupt and Prefect's TerminationSignal for SIGTERM arrive in this thread
                running.cancel()

    def _archives(self, orders: Sequence[worker.Order]) -> dict[str, dict[str, Any]]:
        if not self._plan.sweep.send_inputs:
            return {}
        import ray

        digest, sent = cache(shipping.digest), cache(lambda path: ray.put(shipping.pack(path)))
        return {
            order.key: {
                f"{path} {digest(path)}": sent(path)
                for path in shipping.paths(order.settings, order.adaptation).values()
            }
            for order in orders
        }

    def _watch(self, running: cluster.Running) -> None:
        looked = time.monotonic()
        while len(running) and not self.cancelled:
            for result in running.ended():
                self._ended(result)
            time.sleep(_POLL_SECONDS)
            if time.monotonic() - looked > _CANCEL_POLL_SECONDS:
                looked = time.monotonic()
                self.cancelled = cancel_requested()
        if self.cancelled:
            get_run_logger().warning("The run was cancelled: ending its trials")

    def _ended(self, result: cluster.Result) -> None:
        if result.record is not None:
            worker.write(result.record, result.grid)
        for planned in self._waiting.pop(result.order.key):
            if result.record is not None:
                self._measured(planned, result.record, "trained")
            else:
                self._failed(planned, str(result.error))

    def _measured(self, planned: Planned, record: worker.Record, status: Literal["trained", "kept"]) -> None:
        order, metric = planned.order, self._plan.sweep.objective.metric
        scores = search.scores(record.metrics)
        seconds = round(record.seconds, 1)
        outcome = Outcome(planned.trial, status, order.key, scores, seconds, record.place)
        figure = f"{scores[metric]:.4g}" if metric in scores else "not defined"
        self._add(outcome, f"{metric} {figure}, {seconds:.0f} s on {record.place}")
        kept = worker.folder(order.key)
        self._log(
            partial(
                sweep_runs.log_trial,
                order.plan,
                self._plan.root,
                history=record.history,
                metrics=record.metrics,
                tags={"node": record.node, "gpus": ",".join(record.gpus)},
                files=[kept / "grid.png", kept / "record.json"],
            )
        )

    def _failed(self, planned: Planned, reason: str) -> None:
        self._add(Outcome(planned.trial, "failed", planned.order.key, error=reason), reason)
        self._log(partial(sweep_runs.fail_trial, planned.order.plan, self._plan.root, reason))

    def _add(self, outcome: Outcome, told: str) -> None:
        self._outcomes[outcome.trial.number] = outcome
        done, total = len(self._outcomes), len(self._plan.trials)
        logger = get_run_logger()
        log = logger.warning if outcome.status == "failed" else logger.info
        log("%d of %d: %s %s: %s", done, total, outcome.status, outcome.trial.title, told)
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
        for planned in self._plan.trials:
            if planned.trial.number not in self._outcomes:
                outcome = Outcome(planned.trial, "not run", planned.order.key)
                self._outcomes[planned.trial.number] = outcome
                self._log(partial(sweep_runs.kill_trial, planned.order.plan, self._plan.root))
        return [self._outcomes[planned.trial.number] for planned in self._plan.trials]


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
    with parent_run(_run_plan(plan), plan.root, plan.tables, "sweep-mlflow") as run:
        state = _Sweep(plan, tracked=run is not None)
        try:
            state.take_kept()
            state.run(address, gpus)
        finally:
            outcomes = state.close()
            ranked = search.rank(outcomes, plan.sweep.objective)
            _write_tables(plan, outcomes, ranked)
    chosen = search.best(ranked)
    text = _told(plan, outcomes, chosen)
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


def _told(plan: SweepPlan, outcomes: Sequence[Outcome], chosen: Candidate | None) -> str:
    counts = Counter(outcome.status for outcome in outcomes)
    metrics = plan.sweep.objective.metrics
    text = ", ".join(f"{number} {status}" for status, number in counts.items())
    text = f"{plan.name}: {text} ({plan.tables[1]})"
    if chosen is None:
        return f"{text}; no setting was measured that keeps all bounds"
    values = ", ".join(f"{key} {value}" for key, value in chosen.values.items())
    return f"{text}; the best: {values}: {', '.join(f'{m} {chosen.mean(m):.4g}' for m in metrics)}"


def _run_plan(plan: SweepPlan) -> RunPlan:
    objective = plan.sweep.objective
    bounds = [f"{name} <= {bound:g}" for name, bound in objective.at_most.items()]
    bounds += [f"{name} >= {bound:g}" for name, bound in objective.at_least.items()]
    tags = {
        "sweep": plan.name,
        "adaptation": plan.sweep.adaptation,
        "objective": f"{objective.direction} {objective.metric}",
        "bounds": ", ".join(bounds),
    }
    experiment = plan.trials[0].order.settings.registry.experiment
    return RunPlan(plan.name, plan.key, experiment, tags=tags, kind="sweep")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the flow as the command line says; the exit status is 0 only if there is a best setting."""
    options = _parser().parse_args(arguments)
    return cli.run(lambda: _run(options), "every trial was ended")


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("flows.sweep", __doc__)
    parser.add_argument("name", metavar="sweep", help="key of `sweeps` in params.yaml")
    parser.add_argument("--params", nargs="+", default=["params.yaml"], help="and files that add to it")
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
    # What is misspelt or missing is told at once, not after a server has started.
    plan = lay_out(options.name, config.load(*options.params), Path.cwd())
    if options.dry_run:
        for planned in plan.trials:
            kept = "kept" if worker.read(planned.order.key) else "to run"
            print(f"{planned.order.plan.name}  {kept:6}  {planned.trial.title}")
        return 0
    cli.start_server()
    parameters = {name: getattr(options, name) for name in ("name", "params", "address", "gpus", "write")}
    return cli.show_end(sweep(**parameters, return_state=True))
