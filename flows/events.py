"""What the team hears of: Prefect events that automations turn into messages, runs or whatever they like."""

from __future__ import annotations

import json
from pathlib import Path

from prefect.events import emit_event

from domainstudio.registry.aliases import REASON, Promotion
from domainstudio.tracking.server import connect

REGISTERED, PROMOTED = "domainstudio.model.registered", "domainstudio.model.promoted"


def tell(done: Promotion) -> None:
    """Emit what became of a version: `registered` always, `promoted` where it got the alias by this call."""
    for event, happened in ((REGISTERED, True), (PROMOTED, done.promoted and done.changed)):
        if happened:
            emit_event(
                event,
                resource={
                    "prefect.resource.id": f"domainstudio.model.{done.model}",
                    "prefect.resource.name": done.model,
                },
                payload={"version": done.version, "previous": done.previous, "reason": done.reason},
            )


def tell_of_stage(root: Path, adaptation: str) -> None:
    """Emit what the stage `register` has made of an adaptation, as `registry/<adaptation>.json` names it.

    Raises:
        TrackingError: MLflow cannot be reached.
        OSError: the stage has not run.
    """
    from domainstudio.registry import versions

    entry = json.loads((root / "registry" / f"{adaptation}.json").read_text(encoding="utf-8"))
    model, alias = entry["model"], entry["alias"]
    with connect(root) as client:
        version = versions.find_version(client, model, entry["key"], entry["digest"])
        if version is None:
            return
        holder = client.get_registered_model(model).aliases.get(alias)
        number, reason = str(version.version), version.tags.get(REASON, "")
    has = str(holder) == number
    # Whether the stage moved the alias is not known here, but it ran: it did, or said again who has it.
    tell(Promotion(model, number, has, reason, holder and str(holder), changed=has))
