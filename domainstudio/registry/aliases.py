"""Which version of a registered model to use: who has the alias, why, and how it is taken back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from domainstudio.config import GateSettings
from domainstudio.registry import audit
from domainstudio.registry.audit import Event
from domainstudio.registry.gate import Measurement, Verdict, decide
from domainstudio.tracking.server import TrackingError, connect

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

CHALLENGER = "challenger"
"""Alias of the newest version that has not become the one to use."""

MEASURED, JUDGED = "domainstudio.measured", "gate.judged"
"""Tags of a version: what was measured of it and how; the hash of what its verdict was made of."""

VERDICT, REASON, FIGURES = "gate", "gate.reason", "gate.figures"
"""Tags of a version: the gate's verdict, a line for people, and the figures."""

PENDING = "pending"
"""The verdict of a version that is being registered."""

PATIENCE = 120
"""Seconds in which a version gets its verdict, or else its registration was killed."""


@dataclass(frozen=True)
class Promotion:
    """What became of a version."""

    model: str
    version: str
    promoted: bool
    """Whether the version has the alias now."""
    reason: str
    """Why it has, or has not."""
    previous: str | None
    """The version that had the alias before this call; None: none."""
    changed: bool
    """Whether this call moved the alias."""


def judge(
    name: str,
    version: str,
    gate: GateSettings | None,
    alias: str = "champion",
    root: str | Path = ".",
    measure: Callable[[str], Measurement | None] | None = None,
) -> Promotion:
    """Let the gate decide whether a version takes the place of the one with the alias, and move the alias.

    A verdict stands: judged again is only what was measured anew, or could not be compared. What was rolled
    back is not judged at all. Verdict, reason and figures become tags of the version and `gate.json` of its
    run.

    Args:
        name: of the registered model.
        version: one that `register` has returned.
        gate: the rules; None promotes whatever is new.
        alias: the alias.
        root: the project's root.
        measure: measures the version of a number as the judged one was, or returns None; called where the
            two were measured in different ways and the verdict depends on it.

    Raises:
        TrackingError: MLflow cannot be reached or refused.
    """
    again: dict[str, Measurement | None] = {}
    with connect(root) as client:
        while True:
            _await_turn(client, name, version)
            candidate = client.get_model_version(name, version)
            aliases = _aliases(client, name)
            holder = aliases.get(alias)
            if (standing := _standing(candidate, holder, alias)) is not None:
                return standing
            # Of a registration that was killed after the alias had moved, the rival is the version before.
            rival = holder if holder != version else aliases.get(f"previous_{alias}")
            verdict = _compare(client, candidate, rival, gate, again)
            if verdict.outcome != "not comparable" or measure is None or rival is None or rival in again:
                return _enact(client, candidate, verdict, alias, holder, rival)
            again[rival] = measure(rival)  # that may take long: then look again who has the alias


def _compare(
    client: MlflowClient,
    candidate: ModelVersion,
    rival: str | None,
    gate: GateSettings | None,
    again: dict[str, Measurement | None],
) -> Verdict:
    """Return the gate's verdict on a version, by what was measured again of its rival where there is that."""
    if rival is None:
        return decide(_measured(candidate), None, gate)
    if (anew := again.get(rival)) is None:
        return decide(_measured(candidate), _measured(client.get_model_version(candidate.name, rival)), gate)
    verdict = decide(_measured(candidate), anew, gate)
    return replace(verdict, reason=f"{verdict.reason}; version {rival} measured again")


def _enact(
    client: MlflowClient,
    candidate: ModelVersion,
    verdict: Verdict,
    alias: str,
    holder: str | None,
    rival: str | None,
) -> Promotion:
    """Move the aliases as a verdict says, and write it down."""
    name, version = candidate.name, str(candidate.version)
    if verdict.promoted:
        _crown(client, name, version, alias, "promoted", verdict.reason)
        holder = version
    elif candidate.tags.get(REASON) != verdict.reason:
        if holder != version:
            challenge(client, name, version)
        audit.record(client, name, verdict.outcome, version, alias, verdict.reason)
    _note(client, candidate, verdict, rival)
    return Promotion(name, version, holder == version, verdict.reason, rival, changed=verdict.promoted)


def promote(
    name: str,
    version: str,
    reason: str,
    alias: str = "champion",
    root: str | Path = ".",
    by: str | None = None,
) -> Promotion:
    """Give the alias to a version by hand, whatever the gate said of it.

    Args:
        name: of the registered model.
        version: any of its versions.
        reason: why, for the audit trail.
        alias: the alias.
        root: the project's root.
        by: who decided; None: git's user.

    Raises:
        TrackingError: MLflow cannot be reached, or there is no such version.
    """
    with connect(root) as client:
        client.get_model_version(name, version)
        if (holder := _aliases(client, name).get(alias)) == version:
            return Promotion(name, version, True, f"it is {alias} already", holder, changed=False)
        _crown(client, name, version, alias, "promoted by hand", reason, by)
        return Promotion(name, version, True, reason, holder, changed=True)


def rollback(
    name: str, reason: str = "", alias: str = "champion", root: str | Path = ".", by: str | None = None
) -> Promotion:
    """Give the alias back to the version that had it before the present holder.

    A second call goes back one version more. The version that loses the alias is marked, so that registering
    the same result again does not promote it again.

    Returns:
        The version that has the alias now; `previous` is the one that lost it.

    Raises:
        TrackingError: no version has the alias, or none had it before.
    """
    with connect(root) as client:
        model = client.get_registered_model(name)
        if (current := _aliases(client, name).get(alias)) is None:
            raise TrackingError(f"{name} has no version with alias {alias!r}: there is nothing to roll back")
        *earlier, _ = audit.holders(audit.read(model.tags), alias, current)
        if not earlier:
            raise TrackingError(
                f"version {current} is the first of {name} with alias {alias!r}: there is nothing before it"
            )
        *before, version = earlier
        reason = f"rollback from version {current}. {reason}".strip()
        _set_or_delete(client, name, f"previous_{alias}", before[-1] if before else None)
        _move(client, name, version, alias, reason)
        client.set_model_version_tag(name, current, f"rolled_back_{alias}", _now())
        audit.record(client, name, "rolled back", version, alias, reason, by)
        return Promotion(name, version, True, reason, current, changed=True)


def verdict(client: MlflowClient, name: str, version: str) -> str:
    """Return what the gate said of a version, for people."""
    tags = client.get_model_version(name, version).tags
    return f"{tags.get(VERDICT, 'not asked')}: {tags.get(REASON, 'registered before there was one')}"


def challenge(client: MlflowClient, name: str, version: str) -> None:
    """Give a version the alias `challenger`, unless a newer one has it."""
    if int(_aliases(client, name).get(CHALLENGER, 0)) < int(version):
        client.set_registered_model_alias(name, CHALLENGER, version)


def history(name: str, root: str | Path = ".") -> list[Event]:
    """Return all that was decided of a model's versions, the oldest first.

    Raises:
        TrackingError: MLflow cannot be reached, or there is no such model.
    """
    with connect(root) as client:
        return audit.read(client.get_registered_model(name).tags)


def version_of(name: str, version: str, root: str | Path = ".") -> str:
    """Return the number of a version that is named by its number or by an alias.

    Raises:
        TrackingError: MLflow cannot be reached, or there is no such model, version or alias.
    """
    with connect(root) as client:
        if version.isdigit():
            return str(client.get_model_version(name, version).version)
        if (found := _aliases(client, name).get(version)) is None:
            raise TrackingError(f"{name} has no version with alias {version!r}: give a version's number")
        return found


def _crown(
    client: MlflowClient,
    name: str,
    version: str,
    alias: str,
    what: audit.What,
    reason: str,
    by: str | None = None,
) -> None:
    """Give a version the alias, and note who had it; where this was killed, doing it again completes it."""
    aliases = _aliases(client, name)
    if (holder := aliases.get(alias)) not in (None, version):
        client.set_registered_model_alias(name, f"previous_{alias}", holder)
    _move(client, name, version, alias, reason)
    if aliases.get(CHALLENGER) == version:
        client.delete_registered_model_alias(name, CHALLENGER)
    audit.record(client, name, what, version, alias, reason, by)


def _note(client: MlflowClient, version: ModelVersion, verdict: Verdict, rival: str | None) -> None:
    client.log_dict(version.run_id, {**verdict.to_json(), "against": rival}, "gate.json")
    tags = {
        FIGURES: json.dumps([asdict(check) for check in verdict.checks], ensure_ascii=False),
        REASON: verdict.reason,
        JUDGED: verdict.candidate.digest,
        VERDICT: verdict.outcome,  # the last: who finds it finds the others
    }
    for tag, value in tags.items():
        client.set_model_version_tag(version.name, version.version, tag, value)


def _standing(version: ModelVersion, holder: str | None, alias: str) -> Promotion | None:
    """Return how things are where a version is not to be judged; None where it is."""
    tags, number = version.tags, str(version.version)
    if tags.get(VERDICT) == PENDING:
        return None
    if holder == number:
        reason = tags.get(f"{alias}_reason", "")
    elif since := tags.get(f"rolled_back_{alias}"):
        reason = f"it was rolled back at {since}"
    elif tags.get(VERDICT) not in ("promoted", "refused") or tags.get(JUDGED) != _measured(version).digest:
        return None
    elif tags[VERDICT] == "promoted":
        reason = f"version {holder} took its place" if holder else f"somebody took {alias} away from it"
    else:
        reason = tags[REASON]
    return Promotion(version.name, number, holder == number, reason, holder, changed=False)


def _await_turn(client: MlflowClient, name: str, version: str) -> None:
    """Wait until the older versions are judged.

    Else two that are registered at the same time would both be compared with the same champion. The server
    numbers versions, so all agree whose turn it is; who was killed before its verdict is not waited for.
    """
    created, start = client.get_model_version(name, version).creation_timestamp, time.monotonic()
    while True:
        now = created + 1000 * (time.monotonic() - start)  # by the server's clock
        pending = client.search_model_versions(f"name = '{name}' and tags.`{VERDICT}` = '{PENDING}'")
        if not any(
            int(other.version) < int(version) and now - other.creation_timestamp < 1000 * PATIENCE
            for other in pending
        ):
            return
        time.sleep(0.2)


def _measured(version: ModelVersion) -> Measurement:
    text = version.tags.get(MEASURED)
    return Measurement.from_json(text) if text else Measurement({}, {})


def _aliases(client: MlflowClient, name: str) -> dict[str, str]:
    return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}


def _set_or_delete(client: MlflowClient, name: str, alias: str, version: str | None) -> None:
    if version is not None:
        client.set_registered_model_alias(name, alias, version)
    elif alias in _aliases(client, name):
        client.delete_registered_model_alias(name, alias)


def _move(client: MlflowClient, name: str, version: str, alias: str, reason: str) -> None:
    client.set_model_version_tag(name, version, f"{alias}_reason", reason)
    client.set_model_version_tag(name, version, f"{alias}_since", _now())
    client.set_registered_model_alias(name, alias, version)
    if f"rolled_back_{alias}" in client.get_model_version(name, version).tags:
        client.delete_model_version_tag(name, version, f"rolled_back_{alias}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
