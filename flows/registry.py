"""Promotion and rollback of registered models as flows: on a CPU, and after a person's approval if wanted."""

from __future__ import annotations

from typing import Any

from prefect import flow, get_run_logger, runtime
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.states import Completed

from domainstudio import config
from domainstudio.registry import aliases
from flows import events

APPROVAL_SECONDS = 24 * 3600
"""How long a promotion waits for a person."""


class Approval(RunInput):
    """What Prefect's page asks a person."""

    approve: bool = False
    by: str = ""
    comment: str = ""


@flow(name="promote", persist_result=False)
def promote(adaptation: str, version: str = "challenger", reason: str = "", approval: bool = False) -> Any:
    """Make a version of an adaptation's model the champion, whatever the gate said of it.

    Args:
        adaptation: A key of `adaptations` in params.yaml.
        version: Its number, or one of its aliases.
        reason: Why, for the audit trail.
        approval: Wait until a person approves on the flow run's page.
    """
    model, alias = _model(adaptation)
    if (before := _done_before(model)) is not None:
        return before
    version = aliases.version_of(model, version)
    by = _this_run()
    if approval:
        get_run_logger().info("waiting for approval: %s version %s becomes %s", model, version, alias)
        answer = pause_flow_run(wait_for_input=Approval, timeout=APPROVAL_SECONDS)
        if not answer.approve:
            message = f"{answer.by or 'nobody'} did not approve. {answer.comment}".strip()
            return Completed(name="Declined", message=message)
        by = f"{answer.by or 'unnamed'}, {by}"
        reason = " ".join(filter(None, (reason, answer.comment)))
    done = aliases.promote(model, version, reason or "promoted by hand", alias, by=by)
    events.tell(done)
    return _state(done)


@flow(name="rollback", persist_result=False)
def rollback(adaptation: str, reason: str = "") -> Any:
    """Give the champion's alias of an adaptation's model back to the version that had it before.

    Args:
        adaptation: A key of `adaptations` in params.yaml.
        reason: Why, for the audit trail.
    """
    model, alias = _model(adaptation)
    if (before := _done_before(model)) is not None:
        return before
    done = aliases.rollback(model, reason, alias, by=_this_run())
    events.tell(done)
    return _state(done)


def _model(adaptation: str) -> tuple[str, str]:
    settings = config.load()
    return settings.registry.model_prefix + settings.adaptation(adaptation).name, settings.registry.alias


def _this_run() -> str:
    """Return what the audit trail calls this flow run; names alone may repeat."""
    return f"Prefect flow run {runtime.flow_run.name} ({runtime.flow_run.id})"


def _done_before(model: str) -> Any:
    """Return the state of a run that had done its work when its node was lost; None where it has to work.

    A resumed pause counts as a start too, so the audit trail decides.
    """
    if (runtime.flow_run.run_count or 1) == 1:
        return None
    for event in aliases.history(model):
        if event.by.endswith(_this_run()):
            return Completed(message=f"{model}: done already at {event.at}: {event.what} {event.version}")
    return None


def _state(done: aliases.Promotion) -> Any:
    return Completed(message=f"{done.model}: version {done.version}, before {done.previous}. {done.reason}")
