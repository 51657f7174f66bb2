"""Registers an adaptation's result: logs it to MLflow, makes a version of it, and lets the gate judge it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from domainstudio.config import Settings
from domainstudio.project import REGISTRY
from domainstudio.registry import card, judging, versions
from domainstudio.registry.aliases import Alias, Promotion, current_aliases
from domainstudio.registry.artifacts import Defaults, Entry
from domainstudio.registry.results import Result
from domainstudio.registry.tags import MEASUREMENT, REASON
from domainstudio.registry.training_run import ensure_run, log_results
from domainstudio.storage.files import write_json
from domainstudio.tracking.server import connect

if TYPE_CHECKING:
    from domainstudio.registry.measurement import Measurement


def register(adaptation: str, settings: Settings) -> Promotion:
    """Register the result of an adaptation and let the gate judge it, as params.yaml says.

    Registering the same result again makes no second version. A champion that was measured under other
    conditions is sampled and measured again. Writes `registry/<adaptation>.json`.

    Raises:
        CheckpointError: the model or its provenance is missing or damaged.
        DataError: another output of the stages is missing or damaged.
        TrackingError: MLflow cannot be reached or refused.
    """
    result, alias = Result.load(adaptation), Alias.of(adaptation, settings)
    with connect() as client:
        run_id = ensure_run(client, result, settings.registry.experiment)
        log_results(client, run_id, result)
        commit = client.get_run(run_id).data.tags.get("git.commit")
    registered = versions.register(_entry(result, alias, run_id, commit))
    status = "registered" if registered.created else "is this result already"
    print(f"{alias.model}: version {registered.version} {status}")

    def measure(rival: str) -> Measurement | None:
        from domainstudio.registry.reevaluation import reevaluate

        return reevaluate(alias.model, rival, result, settings.sample, settings.evaluate)

    promotion = judging.judge(alias, registered.version, settings.registry.gate, measure)
    _write_card(result, promotion, alias, run_id)
    # Neither the run's id nor the version, because both differ from database to database.
    identity = {"model": alias.model, "alias": alias.name, "key": result.record.key}
    write_json(_path(adaptation), {"format": 1, **identity, "digest": registered.digest})
    return promotion


def last_promotion(adaptation: str, root: Path) -> Promotion | None:
    """Return what became of an adaptation's last registered result, or None if MLflow does not know it.

    Raises:
        TrackingError: MLflow cannot be reached.
        OSError: the adaptation was never registered.
    """
    entry = json.loads((root / _path(adaptation)).read_text(encoding="utf-8"))
    model = entry["model"]
    with connect(root) as client:
        version = versions.find_version(client, model, entry["key"], entry["digest"])
        if version is None:
            return None
        holder = current_aliases(client, model).get(entry["alias"])
        number, reason = str(version.version), version.tags.get(REASON, "")
    # Whether the registration moved the alias is not recorded: it did so, or found it there.
    return Promotion(model, number, holder == number, reason, holder, changed=holder == number)


def _path(adaptation: str) -> Path:
    return REGISTRY / f"{adaptation}.json"


def _entry(result: Result, alias: Alias, run_id: str, commit: str | None) -> Entry:
    first = result.samples["images"][0]
    return Entry(
        name=alias.model,
        folder=result.folder,
        key=result.record.key,
        run_id=run_id,
        summary=card.summary(result.adaptation, alias.name),
        tags={
            **result.tags,
            **({"git.commit": commit} if commit else {}),
            **card.headline(result.metrics),
            MEASUREMENT: result.measurement.to_json(),
        },
        step=result.record.steps,
        defaults=Defaults(
            seed=int(first["seed"]),
            steps=int(result.samples["steps"]),
            guidance_scale=result.guidance_scale,
            template=result.adaptation.prompts.target,
            example=result.example,
        ),
    )


def _write_card(result: Result, promotion: Promotion, alias: Alias, run_id: str) -> None:
    """Make the card, with the gate's verdict, the version's description and a file of its run."""
    model, version = promotion.model, promotion.version
    uri = f"models:/{model}" + (f"@{alias.name}" if promotion.promoted else f"/{version}")
    with connect() as client:
        text = card.version_card(result, uri, judging.describe(client, model, version), run_id)
        client.log_text(run_id, text, "model_card.md")
        client.update_model_version(model, version, versions.shorten(text))
