"""Prefect events about registered models. Automations turn them into messages or runs."""

from __future__ import annotations

from pathlib import Path

from prefect.events import emit_event

from domainstudio.registry.aliases import Promotion

REGISTERED, PROMOTED = "domainstudio.model.registered", "domainstudio.model.promoted"


def emit(promotion: Promotion) -> None:
    """Emit `registered` for a version, and `promoted` if it was given the alias."""
    model = promotion.model
    resource = {"prefect.resource.id": f"domainstudio.model.{model}", "prefect.resource.name": model}
    payload = {name: getattr(promotion, name) for name in ("version", "previous", "reason")}
    promoted = promotion.promoted and promotion.changed
    for event in (REGISTERED, PROMOTED) if promoted else (REGISTERED,):
        emit_event(event, resource=resource, payload=payload)


def emit_registered(root: Path, adaptation: str) -> None:
    """Emit the events of the result that the stage `register` has registered.

    Raises:
        TrackingError: MLflow cannot be reached.
        OSError: the stage has not run.
    """
    from domainstudio.registry.registration import last_promotion

    if (promotion := last_promotion(adaptation, root)) is not None:
        emit(promotion)
