"""Stage `pretrain`: train the demo's source model. Frozen in dvc.yaml; `make pretrain` runs it."""

from __future__ import annotations

from pathlib import Path

from stages.cli import run

FOLDER = Path("models/sources/noto")


def main() -> None:
    """Train the source model of params.yaml, or go on with it, and write it in half precision."""
    import torch

    from domainstudio import config
    from domainstudio.config import LossWeights
    from domainstudio.data import ImageSet
    from domainstudio.models.unconditional import UnconditionalDenoiser
    from domainstudio.storage import checkpoint
    from domainstudio.storage.files import write_text
    from domainstudio.storage.mirror import mirrored
    from domainstudio.tracking.tracker import run_for
    from domainstudio.training.cards import source_card
    from domainstudio.training.examples import Examples
    from domainstudio.training.previews import previewer
    from domainstudio.training.trainer import Trainer

    settings = config.load()
    pretrain = settings.pretrain
    images = ImageSet.load("data/source")
    inputs = {"images": images.digest}
    params = pretrain.model_dump(mode="json")
    key = checkpoint.run_key(params, inputs)
    workspace = Path(".checkpoints") / key
    torch.manual_seed(pretrain.training.seed)
    denoiser = UnconditionalDenoiser.new(pretrain.unet, pretrain.noise, images.resolution)
    run = run_for("pretrain", key, pretrain, inputs, experiment=settings.registry.experiment)
    with mirrored(workspace), run as tracker:
        trainer = Trainer(
            denoiser,
            Examples.unconditional(images.images),
            pretrain.training,
            LossWeights(),
            workspace,
            tracker=tracker,
            preview=previewer(settings.sample),
        )
        history = trainer.train()
    if trainer.accelerator.is_main_process:
        denoiser.save(FOLDER, half=True)
        write_text(
            FOLDER / "README.md", source_card("Unconditional pixel-space UNet", params, images, history)
        )


if __name__ == "__main__":
    run(main)
