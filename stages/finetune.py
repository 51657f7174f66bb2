"""Stage `finetune`: adapt a source model to the few images of a target domain."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from stages.cli import run


def main() -> None:
    """Train one adaptation of params.yaml, or go on with it, and write its model and training log."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adaptation", help="a key of adaptations in params.yaml")
    name = parser.parse_args().adaptation

    from domainstudio import config

    settings = config.load()
    adaptation = settings.adaptation(name)
    source_folder = Path("models/sources") / adaptation.source

    from domainstudio import checkpoint, models, provenance
    from domainstudio.datasets import ImageSet
    from domainstudio.integrations.mlflow_tracking import run_for
    from domainstudio.training import Trainer, previewer

    shots = ImageSet.load(Path("data/targets") / adaptation.target / "shots")
    inputs = {"source": models.digest(source_folder), "shots": shots.digest}
    params = adaptation.model_dump(mode="json")
    key = checkpoint.run_key(params, inputs)
    workspace = Path(".checkpoints") / key
    denoiser = models.load(source_folder)
    source = models.load(source_folder) if adaptation.weights.needs_source else None
    with run_for(name, key, adaptation, inputs, experiment=settings.registry.experiment) as tracker:
        trainer = Trainer(
            denoiser,
            shots.images,
            adaptation.training,
            adaptation.weights,
            workspace,
            source=source,
            tracker=tracker,
            preview=previewer(settings.sample),
        )
        history = trainer.train()

    if trainer.accelerator.is_main_process:
        training = Path("training") / name
        provenance.write_history(training, history)
        (training / "previews").mkdir(exist_ok=True)
        if (workspace / "previews").is_dir():  # preview_every 0 makes none
            shutil.copytree(workspace / "previews", training / "previews", dirs_exist_ok=True)
        model_folder = Path("models/adapted") / name
        denoiser.save(model_folder)
        record = provenance.Provenance(
            adaptation=name, key=key, params=params, inputs=inputs, steps=len(history)
        )
        (model_folder / "provenance.json").write_text(json.dumps(record.as_json(), indent=1) + "\n")
        (model_folder / "README.md").write_text(provenance.model_card(record, shots))


if __name__ == "__main__":
    run(main)
