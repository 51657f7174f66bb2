"""Stage `finetune`: adapt a source model to the few images of a target domain."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from stages.cli import run
from stages.launch import launch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from domainstudio.data import ImageSet
    from domainstudio.tracking.provenance import Provenance
    from domainstudio.training.trainer import Record, Trainer


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
    from domainstudio.storage import checkpoint
    from domainstudio.storage.mirror import mirrored
    from domainstudio.tracking import provenance
    from domainstudio.tracking.tracker import run_for
    from domainstudio.training import recipe

    process = this_process()
    inputs = recipe.load_inputs(adaptation, settings.sample, process)
    params = adaptation.model_dump(mode="json")
    if process.num_processes > 1:  # the global batch is so many times larger
        params["processes"] = process.num_processes
    key = checkpoint.run_key(params, inputs.digests)
    folder = Path(".checkpoints") / key
    run = run_for(name, key, adaptation, inputs.digests, experiment=settings.registry.experiment)
    with mirrored(folder), run as tracker:
        trainer = recipe.make_trainer(
            inputs.denoiser,
            inputs.shots,
            inputs.prior,
            adaptation,
            folder,
            latents=Path(".cache/latents"),
            tracker=tracker,
            drawing=settings.sample,
        )
        history = trainer.train()
    if trainer.accelerator.is_main_process:
        record = provenance.Provenance(
            adaptation=name, key=key, params=params, inputs=inputs.digests, steps=len(history)
        )
        _write(trainer, record, history, inputs.shots)


def _write(trainer: Trainer, record: Provenance, history: Sequence[Record], shots: ImageSet) -> None:
    from domainstudio.storage.files import write_json, write_text
    from domainstudio.tracking import provenance
    from domainstudio.training.cards import adapted_card

    training = Path("training") / record.adaptation
    provenance.write_history(training, history)
    (training / "previews").mkdir(exist_ok=True)
    if (trainer.checkpoints / "previews").is_dir():  # preview_every 0 makes none
        shutil.copytree(trainer.checkpoints / "previews", training / "previews", dirs_exist_ok=True)
    folder = Path("models/adapted") / record.adaptation
    trainer.denoiser.save(folder)
    write_json(folder / "provenance.json", record.model_dump(mode="json"))
    write_text(folder / "README.md", adapted_card(record, shots, trainer.denoiser.kind))


if __name__ == "__main__":
    run(main)
