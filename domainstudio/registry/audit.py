"""The audit trail of a registered model: who moved an alias, when and why. It only grows.

MLflow keeps no history of aliases. Here every event is a tag of the registered model, under a name of its
own, so two processes never write the same tag.
"""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from secrets import token_hex
from typing import TYPE_CHECKING, Literal

from domainstudio import git

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

PREFIX = "audit."
FLOW_RUN_VARIABLE = "DOMAINSTUDIO_FLOW_RUN"
"""Environment variable: the flow run that a stage belongs to. It is recorded beside the user."""

Action = Literal["registered", "promoted", "refused", "not comparable", "promoted by hand", "rolled back"]


@dataclass(frozen=True)
class Event:
    """A decision about a version.

    Attributes:
        at: Time in UTC.
        what: The decision.
        version: The version's number.
        alias: The alias that the decision was about.
        aliases: The model's aliases afterwards, with the version of each.
        by: Who decided.
        why: The reason.
    """

    at: str
    what: Action
    version: str
    alias: str
    aliases: Mapping[str, str]
    by: str
    why: str


def record(
    client: MlflowClient, model: str, what: Action, version: str, alias: str, why: str, by: str | None = None
) -> None:
    """Add an event, after the change that it describes. `by` is the current user by default."""
    at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    aliases = {alias: str(holder) for alias, holder in client.get_registered_model(model).aliases.items()}
    event = Event(at, what, version, alias, aliases, by or current_user(), why)
    text = json.dumps(asdict(event), ensure_ascii=False)
    client.set_registered_model_tag(model, f"{PREFIX}{at}-{token_hex(4)}", text)


def read(tags: Mapping[str, str]) -> list[Event]:
    """Return the events among a registered model's tags, the oldest first."""
    return [Event(**json.loads(tags[name])) for name in sorted(tags) if name.startswith(PREFIX)]


def holders(events: Sequence[Event], alias: str, current: str) -> list[str]:
    """Return the versions that had an alias, in order, without those that were rolled back.

    Args:
        events: The oldest first.
        alias: The alias.
        current: Its present version. Somebody may have moved the alias without an event.
    """
    line: list[str] = []
    for event in events:
        if event.what == "rolled back" and event.alias == alias:
            del line[-1:]
        _append(line, event.aliases.get(alias))
    _append(line, current)
    return line


def _append(line: list[str], version: str | None) -> None:
    if version is not None and line[-1:] != [version]:
        line.append(version)


def table(events: Sequence[Event], alias: str) -> str:
    """Return a line per event, in columns; the column of the alias has its version afterwards."""
    rows = [("when (UTC)", "version", "what", alias, "by", "why")]
    rows += [
        (e.at[:19].replace("T", " "), e.version, e.what, e.aliases.get(alias, "none"), e.by, e.why)
        for e in events
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def current_user() -> str:
    """Return git's user, or else the system's, and the flow run if there is one."""
    try:
        user = git.user() or getpass.getuser()
    except (OSError, KeyError):
        user = os.environ.get("USER", "unknown")
    run = os.environ.get(FLOW_RUN_VARIABLE)
    return f"{user}, flow run {run}" if run else user
