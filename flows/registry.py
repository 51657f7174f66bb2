"""Promotion and rollback of registered models as flows, after a person's approval if wanted."""

from __future__ import annotations

from typing import Any

from prefect import flow, get_run_logger, runtime
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.states import Completed

from domainstudio import config
from domainstudio.registry import aliases
from domainstudio.registry.aliases import Alias
from flows import events
from flows.run import workspace

APPROVAL_SECONDS = 24 * 3600
"""How long a promotion waits for a person."""


class Approval(RunInput):
    """The form on the flow run's page."""

    approve: bool = False
    by: str = ""
    comment: str = ""


@flow(name="promote", persist_result=False)
def promote(
    adaptation: str,
    version: str = "challenger",
    reason: str = "",
    approval: bool = False,
    revision: str = "",
) -> Any:
    """Make a version of an adaptation's model the champion, whatever the gate's verdict is.

    Args:
        adaptation: A key of `adaptations` in params.yaml.
        version: Its number, or one of its aliases.
        reason: Why, for the audit trail.
        approval: Wait until a person approves on the flow run's page.
        revision: Branch, tag or commit of `DOMAINSTUDIO_REPOSITORY` whose params.yaml is read; by default the
            params.yaml of the worker's folder.
    """
    alias = _alias(adaptation, revision)
    if (earlier := _completed_earlier(alias)) is not None:
        return earlier
    version = aliases.version_number(alias, version)
    by = _this_run()
    if approval:
        get_run_logger().info(
            "waiting for approval: %s version %s becomes %s", alias.model, version, alias.name
        )
        answer = pause_flow_run(wait_for_input=Approval, timeout=APPROVAL_SECONDS)
        if not answer.approve:
            message = f"{answer.by or 'nobody'} did not approve. {answer.comment}".strip()
            return Completed(name="Declined", message=message)
        by = f"{answer.by or 'unnamed'}, {by}"
        reason = " ".join(filter(None, (reason, answer.comment)))
    return _finish(aliases.promote(alias, version, reason or "promoted by hand", by))


@flow(name="rollback", persist_result=False)
def rollback(adaptation: str, reason: str = "", revision: str = "") -> Any:
    """Give the champion's alias of an adaptation's model back to the version that had it before.

    Args:
        adaptation: A key of `adaptations` in params.yaml.
        reason: Why, for the audit trail.
        revision: Branch, tag or commit of `DOMAINSTUDIO_REPOSITORY` whose params.yaml is read; by default the
            params.yaml of the worker's folder.
    """
    alias = _alias(adaptation, revision)
    if (earlier := _completed_earlier(alias)) is not None:
        return earlier
    return _finish(aliases.rollback(alias, reason, _this_run()))


def _alias(adaptation: str, revision: str) -> Alias:
    if not revision:
        return Alias.of(adaptation, config.load())
    return Alias.of(adaptation, workspace.settings(workspace.repository_of(None), revision))


def _this_run() -> str:
    """Return the name of this flow run in the audit trail, with its id because names may repeat."""
    return f"Prefect flow run {runtime.flow_run.name} ({runtime.flow_run.id})"


def _completed_earlier(alias: Alias) -> Any:
    """Return the state of a restarted run that had done its work before its node was lost, or None.

    A resumed pause counts as a start too, so the audit trail decides.
    """
    if (runtime.flow_run.run_count or 1) == 1:
        return None
    for event in aliases.history(alias):
        if event.by.endswith(_this_run()):
            return Completed(
                message=f"{alias.model}: done already at {event.at}: {event.what} {event.version}"
            )
    return None


def _finish(done: aliases.Promotion) -> Any:
    events.emit(done)
    return Completed(message=f"{done.model}: version {done.version}, before {done.previous}. {done.reason}")
