"""The pipeline at a git revision, on any node: clone, pull, run, push, publish."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, runtime
from prefect.artifacts import create_link_artifact
from prefect.client.schemas.objects import State
from prefect.states import Failed

from domainstudio import config
from domainstudio.project import REPORT, REPORTS
from domainstudio.tracking.runs import RunPlan
from flows.parent_run import ParentRun, parent_run
from flows.run import graph, inputs, workspace
from flows.run.commands import Commands
from flows.run.pipeline import RETRIES, RETRY_DELAY_SECONDS, adapt
from flows.run.workspace import WORKSPACES_VARIABLE, Workspace, WorkspaceError
from flows.server import unimportant

ATTEMPTS = 5
"""How often a flow run is started, if its node is lost each time, before it fails."""
KEPT = ("dvc.lock", "params.yaml")
"""Files that MLflow's run of the pipeline keeps, beside the reports."""


class NotStoredError(WorkspaceError):
    """The DVC remote or the repository did not accept the results."""


@flow(name="adapt-revision", persist_result=False)
def adapt_revision(
    adaptations: list[str] | None = None,
    revision: str = "main",
    force: bool = False,
    repository: str | None = None,
    gpus: int | None = None,
    retries: int = RETRIES,
    retry_delay: float = RETRY_DELAY_SECONDS,
) -> Any:
    """Bring adaptations up to date on any node, in a fresh clone that is removed when its results are stored.

    What is up to date already comes from the DVC remote, and a training that was cut off goes on from its
    mirrored checkpoint. Results go to the remote, to a branch `runs/<flow run>` and to MLflow.

    Args:
        adaptations: Keys of `adaptations`, or addresses of stages; everything if none is given.
        revision: Branch, tag or commit.
        force: Run the stages even if nothing changed.
        repository: URL or folder to clone; by default `DOMAINSTUDIO_REPOSITORY`.
        gpus: Stages' GPU slots on this machine.
        retries: Further attempts at a stage that failed, unless it refused its settings.
        retry_delay: Seconds before each.
    """
    if (count := runtime.flow_run.run_count or 1) > ATTEMPTS:
        return Failed(message=f"given up: started {count - 1} times, and each time its node was lost")
    with _folder() as folder:
        where = workspace.checkout(workspace.repository_of(repository), revision, folder)
        get_run_logger().info("%s is commit %s", revision, where.commit)
        options = {"force": force, "gpus": gpus, "retries": retries, "retry_delay": retry_delay}
        with contextlib.chdir(where.root):
            return _run(where, adaptations or [], options)


def _run(where: Workspace, adaptations: list[str], options: Mapping[str, Any]) -> State[Any]:
    known, experiment = graph.read(), config.load().registry.experiment
    selected = graph.select(known, adaptations).values()
    stages = workspace.needed(selected, known)
    commands, log = Commands(where.root), get_run_logger().info
    workspace.share_cache(where)
    if stored := workspace.has_remote(where):
        workspace.pull(commands, log, stages)
    else:
        get_run_logger().warning("DVC has no default remote: everything is made here, and kept nowhere else")
    inputs.check(selected, where.root)
    name, key = runtime.flow_run.name or where.commit[:12], str(runtime.flow_run.id or where.commit)
    tags = {"git.commit": where.commit, "prefect.flow_run": key}
    plan = RunPlan(name, key, experiment, tags=tags, kind="pipeline")
    pages = _reports(selected)
    kept = [where.root / name for name in (*map(Path, KEPT), *pages)]
    with parent_run(plan, where.root, kept, "adapt-mlflow") as run:
        state: State[Any] = adapt(adaptations, pull=stored, **options, return_state=True)
        if run:
            run.status = "FINISHED" if state.is_completed() else "FAILED"
            _link_reports(run, where.root, pages)
        # Stored even if a stage failed: what the others made is not lost.
        if stored:
            with _storing(where):
                workspace.push(commands, log, stages)
    with _storing(where):
        message = f"Results of flow run {name}: {', '.join(adaptations) or 'all'}"
        branch = workspace.publish(where, name, message)
    message = f"{state.message}; " + (f"results are on branch {branch}" if branch else "no result changed")
    return State(type=state.type, name=state.name, message=message)


def _reports(stages: Collection[graph.Stage]) -> list[Path]:
    """Return the pages that stages write: the whole one, if it is among them, stands for the others."""
    if any(stage.address == "report" for stage in stages):
        return [REPORT]
    return [REPORTS / f"{stage.key}.html" for stage in stages if stage.group == "adaptation_report"]


def _link_reports(run: ParentRun, root: Path, pages: Sequence[Path]) -> None:
    for page in pages:
        if run.url and (root / page).is_file():
            with unimportant("link to the report"):
                report, about = (
                    f"{run.url}/artifacts/{page.name}",
                    "" if page == REPORT else f" of {page.stem}",
                )
                key = "adapt-report" + ("" if page == REPORT else f"-{page.stem.replace('_', '-')}")
                create_link_artifact(report, key=key, description=f"The report{about}, in MLflow")


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    base = os.environ.get(WORKSPACES_VARIABLE)
    if base:
        Path(base).mkdir(parents=True, exist_ok=True)
    folder, kept = Path(tempfile.mkdtemp(prefix="domainstudio-", dir=base)), False
    try:
        yield folder
    except NotStoredError:
        kept = True
        raise
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _storing(where: Workspace) -> Iterator[None]:
    """Turn an error of this block into one that keeps the clone: only the clone has the results."""
    try:
        yield
    except Exception as error:
        raise NotStoredError(
            f"{error}\nThe results are kept in {where.root} on {platform.node()}: run `dvc push` there, "
            "commit and push `dvc.lock`, and remove the folder"
        ) from error
