"""The gate's verdict on a registered version, carried out: the alias moves, or stays where it is."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from domainstudio.config import GateSettings
from domainstudio.registry import audit
from domainstudio.registry.aliases import Alias, Promotion, challenge, current_aliases, give
from domainstudio.registry.gate import Measurement, Verdict, decide
from domainstudio.registry.versions import FIGURES, JUDGED, MEASUREMENT, PENDING, REASON, VERDICT
from domainstudio.tracking.server import connect

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

PATIENCE = 120
"""Seconds after which a pending version counts as one whose registration was killed."""

Measure = Callable[[str], Measurement | None]
"""Measures a version again in the way of the judged one; None if that is not possible. Takes its number."""


def judge(alias: Alias, version: str, gate: GateSettings | None, measure: Measure | None = None) -> Promotion:
    """Let the gate decide whether a version gets the alias, and move the alias accordingly.

    A verdict is final. A version is judged again only if it was measured again, or could not be compared. A
    version that was rolled back is not judged at all. Verdict, reason and figures become tags of the version,
    and `gate.json` of its run.

    Args:
        alias: The alias.
        version: The version's number.
        gate: The rules; None promotes each new version.
        measure: Called for the alias's present version, if the verdict depends on a comparison and the two
            were measured under different conditions.

    Raises:
        TrackingError: MLflow cannot be reached or refused.
    """
    measured: dict[str, Measurement | None] = {}
    with connect(alias.root) as client:
        while True:
            _wait_for_older(client, alias.model, version)
            candidate = client.get_model_version(alias.model, version)
            aliases = current_aliases(client, alias.model)
            holder = aliases.get(alias.name)
            if (final := _final(candidate, holder, alias)) is not None:
                return final
            # If a registration was killed after it moved the alias, the version before is the rival.
            rival = holder if holder != version else aliases.get(alias.previous)
            verdict = _compare(client, candidate, rival, gate, measured)
            if verdict.outcome != "not comparable" or measure is None or rival is None or rival in measured:
                has_alias = _carry_out(client, candidate, verdict, alias, holder)
                _record(client, candidate, verdict, rival)
                return Promotion(
                    alias.model, version, has_alias, verdict.reason, rival, changed=verdict.promoted
                )
            measured[rival] = measure(rival)  # which may take long, so look again who has the alias


def describe(client: MlflowClient, model: str, version: str) -> str:
    """Return the verdict on a version and its reason, for people."""
    tags = client.get_model_version(model, version).tags
    return f"{tags.get(VERDICT, 'none')}: {tags.get(REASON, 'registered before there was a gate')}"


def _compare(
    client: MlflowClient,
    candidate: ModelVersion,
    rival: str | None,
    gate: GateSettings | None,
    measured: Mapping[str, Measurement | None],
) -> Verdict:
    """Return the gate's verdict, by the rival's new measurement if there is one."""
    own = _measurement(candidate)
    if rival is None:
        return decide(own, None, gate)
    if (again := measured.get(rival)) is None:
        return decide(own, _measurement(client.get_model_version(candidate.name, rival)), gate)
    verdict = decide(own, again, gate)
    return replace(verdict, reason=f"{verdict.reason}; version {rival} measured again")


def _carry_out(
    client: MlflowClient, candidate: ModelVersion, verdict: Verdict, alias: Alias, holder: str | None
) -> bool:
    """Move aliases as a verdict says; return whether the candidate has the alias now."""
    version = str(candidate.version)
    if verdict.promoted:
        give(client, alias, version, "promoted", verdict.reason)
    elif candidate.tags.get(REASON) != verdict.reason:
        if holder != version:
            challenge(client, alias.model, version)
        audit.record(client, alias.model, verdict.outcome, version, alias.name, verdict.reason)
    return verdict.promoted or holder == version


def _record(client: MlflowClient, version: ModelVersion, verdict: Verdict, rival: str | None) -> None:
    client.log_dict(version.run_id, {**verdict.to_json(), "against": rival}, "gate.json")
    tags = {
        FIGURES: json.dumps([asdict(check) for check in verdict.checks], ensure_ascii=False),
        REASON: verdict.reason,
        JUDGED: verdict.candidate.digest,
        VERDICT: verdict.outcome,  # set last, so where it is the others are too
    }
    for tag, value in tags.items():
        client.set_model_version_tag(version.name, version.version, tag, value)


def _final(version: ModelVersion, holder: str | None, alias: Alias) -> Promotion | None:
    """Return the present state of a version that is not judged (again); None if it has to be judged."""
    tags, number = version.tags, str(version.version)
    if tags.get(VERDICT) == PENDING:
        return None
    if holder == number:
        reason = tags.get(f"{alias.name}_reason", "")
    elif since := tags.get(alias.rolled_back):
        reason = f"it was rolled back at {since}"
    elif tags.get(VERDICT) not in ("promoted", "refused") or tags.get(JUDGED) != _measurement(version).digest:
        return None
    elif tags[VERDICT] == "promoted":
        reason = f"version {holder} took its place" if holder else f"somebody took {alias.name} away from it"
    else:
        reason = tags[REASON]
    return Promotion(version.name, number, holder == number, reason, holder, changed=False)


def _wait_for_older(client: MlflowClient, model: str, version: str) -> None:
    """Wait until the older versions are judged.

    Otherwise two versions that are registered at the same time would both be compared with the same champion.
    The server numbers the versions, so all processes agree on the order. A version whose process was killed
    before its verdict is not waited for.
    """
    created, start = client.get_model_version(model, version).creation_timestamp, time.monotonic()
    while True:
        now = created + 1000 * (time.monotonic() - start)  # by the server's clock
        pending = client.search_model_versions(f"name = '{model}' and tags.`{VERDICT}` = '{PENDING}'")
        if not any(
            int(other.version) < int(version) and now - other.creation_timestamp < 1000 * PATIENCE
            for other in pending
        ):
            return
        time.sleep(0.2)


def _measurement(version: ModelVersion) -> Measurement:
    text = version.tags.get(MEASUREMENT)
    return Measurement.from_json(text) if text else Measurement({}, {})
