"""Registers an adaptation's result: logs it to MLflow, makes a version of it, and lets the gate judge it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from domainstudio.config import Adaptation, Settings
from domainstudio.project import ADAPTED_SAMPLES, EVALUATION, TARGETS, TRAINING
from domainstudio.registry import card, judging, releases, versions
from domainstudio.registry.aliases import Alias, Promotion, current_aliases
from domainstudio.registry.lineage import log_inputs, origin
from domainstudio.registry.results import Result
from domainstudio.registry.tags import find_version
from domainstudio.registry.versions import MEASUREMENT, REASON, Entry
from domainstudio.tracking.runs import find_run, log_evaluation, log_missing, log_records, open_run, plan_for
from domainstudio.tracking.server import connect, experiment_id

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from domainstudio.registry.gate import Measurement


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
    run_id, commit = _log_run(result, settings)
    registered = versions.register(_entry(result, alias, run_id, commit))
    status = "registered" if registered.created else "is this result already"
    print(f"{alias.model}: version {registered.version} {status}")

    def measure(rival: str) -> Measurement | None:
        from domainstudio.registry.reevaluation import reevaluate

        return reevaluate(alias.model, rival, result, settings.sample, settings.evaluate)

    promotion = judging.judge(alias, registered.version, settings.registry.gate, measure)
    _write_card(result, promotion, alias, run_id)
    # Neither the run's id nor the version, because both differ from database to database.
    identity = {"model": alias.model, "alias": alias.name, **_identity(result)}
    releases.write(adaptation, {**identity, "digest": registered.digest})
    return promotion


def try_out(adaptation: str, settings: Settings) -> None:
    """Log the result of a trial to its run, and register nothing. Writes `registry/<adaptation>.json`.

    Raises:
        CheckpointError, DataError, TrackingError: as `register`.
    """
    result = Result.load(adaptation)
    _log_run(result, settings)
    entry, identity = releases.read(adaptation) or {}, _identity(result)
    if any(entry.get(name) != value for name, value in identity.items()):  # else it was released before
        releases.write(adaptation, {"model": None, **identity})


def last_promotion(adaptation: str, root: Path) -> Promotion | None:
    """Return what became of an adaptation's last registered result, or None if there is none.

    Raises:
        TrackingError: MLflow cannot be reached.
    """
    if (entry := releases.read(adaptation, root)) is None or (model := entry["model"]) is None:
        return None
    with connect(root) as client:
        version = find_version(client, model, entry["key"], entry["digest"])
        if version is None:
            return None
        holder = current_aliases(client, model).get(entry["alias"])
        number, reason = str(version.version), version.tags.get(REASON, "")
    # Whether the registration moved the alias is not recorded: it did so, or found it there.
    return Promotion(model, number, holder == number, reason, holder, changed=holder == number)


def _identity(result: Result) -> dict[str, str]:
    return {"key": result.record.key, "measured": result.measurement.digest}


def _log_run(result: Result, settings: Settings) -> tuple[str, str | None]:
    """Bring the training's run up to date; return its id and its commit."""
    with connect() as client:
        run_id = _ensure_run(client, result, settings.registry.experiment)
        _log_results(client, run_id, result)
        return run_id, client.get_run(run_id).data.tags.get("git.commit")


def _entry(result: Result, alias: Alias, run_id: str, commit: str | None) -> Entry:
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
        together=result.together,
        step=result.record.step,
        seed=int(result.samples["images"][0]["seed"]),
        denoising_steps=int(result.samples["steps"]),
        guidance_scale=result.guidance_scale,
        template=result.adaptation.prompts.target,
        example=result.example,
    )


def _write_card(result: Result, promotion: Promotion, alias: Alias, run_id: str) -> None:
    """Make the card, with the gate's verdict, the version's description and a file of its run."""
    model, version = promotion.model, promotion.version
    uri = f"models:/{model}" + (f"@{alias.name}" if promotion.promoted else f"/{version}")
    with connect() as client:
        text = card.version_card(result, uri, judging.describe(client, model, version), run_id)
        client.log_text(run_id, text, "model_card.md")
        client.update_model_version(model, version, versions.shorten(text))


def _ensure_run(client: MlflowClient, result: Result, experiment: str) -> str:
    """Return the id of the training's run, complete and FINISHED.

    MLflow may not know the run, because the model came from DVC's cache or the server was down. Then the run
    is created from the training log, with the times of the training, and tagged `replayed`.
    """
    plan = plan_for(
        result.adaptation.name,
        result.record.key,
        result.adaptation,
        experiment,
        inputs=result.record.inputs,
        versions=result.record.versions,
    )
    first, last = (int(result.history[index]["timestamp"]) for index in (0, -1))
    if (run_id := find_run(client, plan, experiment_id(client, experiment))) is None:
        plan = replace(plan, tags={**plan.tags, "replayed": "true"}, start_time=first)
        run_id = open_run(client, plan)
    log_missing(client, run_id, result.history)
    if client.get_run(run_id).info.status != "FINISHED":
        client.set_terminated(run_id, "FINISHED", last)
    return run_id


def _log_results(client: MlflowClient, run_id: str, result: Result) -> None:
    """Log metrics, lineage, images and files of a result. Logging them again changes nothing."""
    from mlflow.entities import RunTag

    log_evaluation(client, run_id, result.metrics, result.record.step)
    log_records(client, run_id, result.candidates, {})
    client.log_batch(run_id, tags=[RunTag(*tag) for tag in result.tags.items()], synchronous=True)
    client.log_dict(run_id, origin(result, client.get_run(run_id).data.tags), "lineage.json")
    log_inputs(client, run_id, result.adaptation)
    for folder, paths in _files(result.adaptation).items():
        for path in paths:
            if path.is_dir():
                client.log_artifacts(run_id, str(path), folder)
            elif path.is_file():
                client.log_artifact(run_id, str(path), folder)


def _files(adaptation: Adaptation) -> dict[str, list[Path]]:
    """Return the files and folders that become the run's artifacts, by their folder in the run."""
    name, target = adaptation.name, TARGETS / adaptation.target
    return {
        "samples": [ADAPTED_SAMPLES / name / "grid.png"],
        "previews": [TRAINING / name / "previews"],
        "training": [TRAINING / name / "losses.csv"],
        "selection": [TRAINING / name / "selection"],
        "evaluation": [EVALUATION / name / "metrics.json", EVALUATION / name / "nearest.json"],
        "data/shots": [target / "shots/contact_sheet.png"],
        "data/domain": [target / "domain/contact_sheet.png"],
        "pipeline": [Path("params.yaml"), Path("dvc.lock")],
    }
