"""Stage `finetune`: adapt a source model to the few images of a target domain.

With `finetune.candidate_every` the model is the best of the states along the training (section `choose`).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from stages.cli import run
from stages.launch import launch

if TYPE_CHECKING:
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


def _write(trainer: Trainer, record: Provenance, shots: ImageSet) -> None:
    from domainstudio.storage.files import write_json, write_text
    from domainstudio.tracking import provenance
    from domainstudio.training.cards import adapted_card

    training = Path("training") / record.adaptation
    provenance.write_history(training, trainer.history)
    for output in ("previews", "selection"):  # the stage has them also where nothing is in them
        (training / output).mkdir(exist_ok=True)
    if (trainer.checkpoints / "previews").is_dir():  # preview_every 0 makes none
        shutil.copytree(trainer.checkpoints / "previews", training / "previews", dirs_exist_ok=True)
    folder = Path("models/adapted") / record.adaptation
    trainer.denoiser.save(folder)
    write_json(folder / "provenance.json", record.model_dump(mode="json"))
    write_text(folder / "README.md", adapted_card(record, shots, trainer.denoiser.kind))


if __name__ == "__main__":
    run(main)
