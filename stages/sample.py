"""Stage `sample`: draw images from a source or an adapted model, the same noise for every model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from stages.cli import run
from stages.launch import launch

if TYPE_CHECKING:
    from domainstudio.config import Settings


def main() -> None:
    """Draw the samples of one model, going on where an interrupted call stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["source", "adapted"])
    parser.add_argument("name", help="a key of sources or of adaptations in params.yaml")
    arguments = parser.parse_args()

    from domainstudio import config, models
    from domainstudio.distributed import this_process
    from domainstudio.models.stored import StoredModel, Together
    from domainstudio.sampling import sample_stored
    from domainstudio.storage.files import move_folder

    settings = config.load()
    launch("stages.sample", settings.launch)
    subjects, conditions = _subjects(settings, arguments.kind, arguments.name)
    place = Path("sources" if arguments.kind == "source" else "adapted") / arguments.name
    model_folder = Path("models") / place
    adapted = arguments.kind == "adapted"
    model = StoredModel(model_folder, Together.of(settings.adaptation(arguments.name)) if adapted else None)
    facts = {"model": model_folder.as_posix(), "model_digest": models.digest(model_folder)}
    manifest = {**facts, **_chosen_step(model_folder)}
    partial = sample_stored(
        model, Path(".checkpoints"), "samples", settings.sample, conditions, subjects, **manifest
    )
    if not this_process().is_main_process:
        return
    move_folder(partial, Path("samples") / place)


def _chosen_step(folder: Path) -> dict[str, int]:
    """Return the step that a model was chosen at, where it was one of several candidates."""
    from domainstudio.storage.files import read_json

    record = folder / "provenance.json"
    remedy = f"Run dvc repro finetune@{folder.name}"
    chosen = read_json(record, remedy).get("chosen") if record.is_file() else None
    return {"step": int(chosen["step"])} if chosen else {}


def _subjects(settings: Settings, kind: str, name: str) -> tuple[list[str], list[str]]:
    """Return subjects, and the prompt or class of each. An adapted model draws what its source drew."""
    from domainstudio.data import prompts
    from domainstudio.errors import ConfigError, DataError
    from domainstudio.storage.files import read_json

    if kind == "source":
        if name not in settings.sources:
            raise ConfigError(f"sources has no {name!r}; there are {sorted(settings.sources)}")
        subjects = prompts.read_subjects(settings.sources[name].subjects)
        return subjects, subjects
    adaptation = settings.adaptation(name)
    manifest = Path("samples/sources", adaptation.source, "manifest.json")
    if not manifest.is_file():
        raise DataError(f"{manifest} is missing: run dvc repro sample_source@{adaptation.source} first")
    remedy = f"Delete its folder and run dvc repro sample_source@{adaptation.source}"
    try:
        subjects = [image.get("subject", "") for image in read_json(manifest, remedy)["images"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{manifest} is damaged: it has no list of images. {remedy}") from error
    return subjects, prompts.sample_prompts(adaptation, subjects)


if __name__ == "__main__":
    run(main)
