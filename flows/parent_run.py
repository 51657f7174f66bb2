"""A flow run's own run in MLflow: trainings are nested under it, and it keeps files in the end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prefect import get_run_logger
from prefect.artifacts import create_link_artifact

from domainstudio.errors import DomainStudioError
from domainstudio.tracking import pipeline_run
from domainstudio.tracking.runs import PARENT_RUN_VARIABLE, RunPlan
from flows.run.commands import DELAYS, patiently
from flows.server import unimportant


@dataclass
class ParentRun:
    """An open run."""

    url: str | None
    """Its page; None if no server shows it."""
    status: str = "FINISHED"
    """How it ends: FINISHED or FAILED. An exception makes it FAILED, a signal KILLED."""


@contextlib.contextmanager
def parent_run(plan: RunPlan, root: Path, files: Sequence[Path], link: str) -> Iterator[ParentRun | None]:
    """Nest the trainings of this block under a run of MLflow. The same plan opens the same run.

    Args:
        plan: Describes the run.
        root: The project's root.
        files: What the run keeps in the end, as far as it exists then.
        link: Key of the artifact in Prefect that leads to its page.

    Yields:
        The run, or None if MLflow does not answer: the block is worth running without it.
    """
    logger = get_run_logger()
    try:
        run = patiently(partial(pipeline_run.start, plan, root), logger.info, "MLflow's run")
    except DomainStudioError as error:
        logger.warning("The run is not shown in MLflow: %s", error)
        yield None
        return
    if run.url:
        with unimportant("link to MLflow"):
            create_link_artifact(run.url, key=link, description="The run in MLflow")
    parent = ParentRun(run.url)
    outer = os.environ.get(PARENT_RUN_VARIABLE)
    os.environ[PARENT_RUN_VARIABLE] = run.run_id
    try:
        yield parent
    except BaseException as error:
        parent.status = "FAILED" if isinstance(error, Exception) else "KILLED"
        raise
    finally:
        os.environ.pop(PARENT_RUN_VARIABLE)
        if outer is not None:
            os.environ[PARENT_RUN_VARIABLE] = outer
        delays = () if parent.status == "KILLED" else DELAYS  # what is being ended has no time
        finish = partial(pipeline_run.finish, run, files, parent.status, root)
        try:
            patiently(finish, logger.info, "MLflow's run", delays)
        except DomainStudioError as error:
            logger.warning("MLflow did not take the run's files: %s", error)
