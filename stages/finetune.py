"""Stage `finetune`: adapt a source model to the few images of a target domain.

With `finetune.candidate_every` the model is the best of the states along the training (section `choose`).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from stages.cli import run
from stages.launch import launch

if TYPE_CHECKING:
    from domainstudio.config import Adaptation
    from domainstudio.data import ImageSet
    from domainstudio.tracking.provenance import Provenance
    from domainstudio.training.trainer import Trainer


def main() -> None:
    """Train one adaptation of params.yaml, or go on with it, and write its model and training log."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adaptation", help="a key of adaptations in params.yaml")
    name = parser.parse_args().adaptation

    from domainstudio import config

    settings = config.load()
    launch("stages.finetune", settings.launch)
    adaptation = settings.adaptation(name)
    _check_prompts(adaptation)

    from domainstudio.distributed import this_process
    from domainstudio.project import CHECKPOINTS
    from domainstudio.selection.training import TrainingChoice
    from domainstudio.tracking.provenance import Provenance
    from domainstudio.tracking.tracker import run_for
    from domainstudio.training.recipe import Recipe
    from domainstudio.training.run import TrainingRun

    process = this_process()
    recipe = Recipe.load(adaptation, settings.sample, process)
    training = TrainingRun(name, adaptation, recipe.digests, process.num_processes)
    key, inputs = training.key, training.inputs
    choice = TrainingChoice.of(recipe, settings, CHECKPOINTS / key)
    tracker = run_for(name, key, adaptation, inputs, experiment=settings.registry.experiment)
    trainer = training.train(recipe.trainer, tracker)
    selection = Path("training") / name / "selection"
    if process.is_main_process:
        shutil.rmtree(selection, ignore_errors=True)
    chosen = choice.choose(trainer.denoiser, selection) if choice is not None else None
    if process.is_main_process:
        record = Provenance(
            adaptation=name,
            key=key,
            params=training.params,
            inputs=inputs,
            steps=len(trainer.history),
            chosen=None if chosen is None else chosen.origin,
        )
        _write(trainer, record, recipe.shots)


def _check_prompts(adaptation: Adaptation) -> None:
    """Refuse prompts that an image cannot fill, before torch is imported."""
    from domainstudio.data import prompts
    from domainstudio.data.image_set import MANIFEST, read_manifest
    from domainstudio.models.folders import has_text_encoder
    from domainstudio.project import SOURCE_MODELS, TARGETS

    if has_text_encoder(SOURCE_MODELS / adaptation.source):
        records = read_manifest(TARGETS / adaptation.target / "shots" / MANIFEST).images
        for kind in get_args(prompts.Kind):
            prompts.of_images(adaptation, kind, records)


def _write(trainer: Trainer, record: Provenance, shots: ImageSet) -> None:
    from domainstudio import models
    from domainstudio.storage.files import output_folder, write_json, write_text
    from domainstudio.tracking import provenance
    from domainstudio.training.cards import adapted_card

    training = Path("training") / record.adaptation
    provenance.write_history(training, trainer.history)
    if not (training / "selection").exists():  # DVC warns of a folder with nothing in it
        write_text(training / "selection/none.txt", "finetune.candidate_every is 0: no state was chosen\n")
    (training / "previews").mkdir(exist_ok=True)
    if (trainer.checkpoints / "previews").is_dir():  # preview_every 0 makes none
        shutil.copytree(trainer.checkpoints / "previews", training / "previews", dirs_exist_ok=True)
    with output_folder(Path("models/adapted") / record.adaptation) as folder:
        trainer.denoiser.save(folder)
        record = record.model_copy(update={"digest": models.digest(folder)})
        write_json(folder / "provenance.json", record.model_dump(mode="json"))
        write_text(folder / "README.md", adapted_card(record, shots, trainer.denoiser.kind))


if __name__ == "__main__":
    run(main)
