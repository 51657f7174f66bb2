"""Who moved an alias of a registered model, when and why: a record that is only ever added to.

MLflow keeps no history of aliases. Here every move is a tag of the registered model under a name of its own,
so that two processes never write the same one.
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
"""The flow run that a stage belongs to; it is noted beside the user."""

What = Literal["registered", "promoted", "refused", "not comparable", "promoted by hand", "rolled back"]


@dataclass(frozen=True)
class Event:
    """Something that was decided of a version.

    Attributes:
        at: When, in UTC.
        what: What was decided.
        version: Of which version.
        alias: Which alias it was about.
        aliases: The model's aliases afterwards.
        by: Who decided.
        why: The reason.
    """

    at: str
    what: What
    version: str
    alias: str
    aliases: Mapping[str, str]
    by: str
    why: str


def record(
    client: MlflowClient, name: str, what: What, version: str, alias: str, why: str, by: str | None = None
) -> None:
    """Add an event, after what it tells of has happened."""
    at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    aliases = {alias: str(holder) for alias, holder in client.get_registered_model(name).aliases.items()}
    event = Event(at, what, version, alias, aliases, by or who(), why)
    client.set_registered_model_tag(
        name, f"{PREFIX}{at}-{token_hex(4)}", json.dumps(asdict(event), ensure_ascii=False)
    )


def read(tags: Mapping[str, str]) -> list[Event]:
    """Return the events among a registered model's tags, the oldest first."""
    return [Event(**json.loads(tags[name])) for name in sorted(tags) if name.startswith(PREFIX)]


def holders(events: Sequence[Event], alias: str, holder: str | None = None) -> list[str]:
    """Return the versions that had an alias, each before the next, without those that were rolled back.

    Args:
        events: the oldest first.
        alias: the alias.
        holder: who has it now, which somebody may have changed past this record.
    """
    line: list[str] = []

    def follow(version: str | None) -> None:
        if version is not None and line[-1:] != [version]:
            line.append(version)

    for event in events:
        if event.what == "rolled back" and event.alias == alias:
            del line[-1:]
        follow(event.aliases.get(alias))
    follow(holder)
    return line


def who() -> str:
    """Return git's user or the system's, and the flow run where there is one."""
    try:
        user = git.user() or getpass.getuser()
    except (OSError, KeyError):
        user = os.environ.get("USER", "unknown")
    run = os.environ.get(FLOW_RUN_VARIABLE)
    return f"{user}, flow run {run}" if run else user
