"""Stage `pretrain_class`: give the demo's source model the emoji's groups as classes. Frozen in dvc.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.cli import run

if TYPE_CHECKING:
    from domainstudio.config import TrainingSettings
    from domainstudio.data import ImageSet
    from domainstudio.models.class_conditional import ClassConditionalDenoiser

FOLDER = Path("models/sources/noto-class")


def main() -> None:
    """Train the class-conditional model of params.yaml, or go on with it; write it in half precision."""
    from domainstudio import config, models
    from domainstudio.config import LossWeights
    from domainstudio.data import ImageSet
    from domainstudio.storage import checkpoint
    from domainstudio.storage.files import write_text
    from domainstudio.storage.mirror import mirrored
    from domainstudio.tracking.tracker import run_for
    from domainstudio.training.cards import source_card
    from domainstudio.training.examples import Examples
    from domainstudio.training.previews import previewer
    from domainstudio.training.trainer import Trainer

    settings = config.load()
    pretrain = settings.pretrain_class
    source = Path("models/sources") / pretrain.source
    images = ImageSet.load("data/source")
    labels = labels_of(images)
    inputs = {"images": images.digest, "source": models.digest(source)}
    key = checkpoint.run_key(pretrain.model_dump(mode="json"), inputs)
    denoiser = starting_model(source, sorted(set(labels)))
    folder = Path(".checkpoints") / key
    run = run_for("pretrain-class", key, pretrain, inputs, experiment=settings.registry.experiment)
    with mirrored(folder), run as tracker:
        trainer = Trainer(
            denoiser,
            Examples.of(denoiser, images.images, [[label] for label in labels]),
            pretrain.training,
            LossWeights(),
            folder,
            tracker=tracker,
            preview=previewer(settings.sample, denoiser.classes),
        )
        history = trainer.train()
    if trainer.accelerator.is_main_process:
        denoiser.save(FOLDER, half=True)
        kind = f"Class-conditional pixel-space UNet ({', '.join(denoiser.classes)})"
        params, start = described(denoiser, pretrain.training), f"from the weights of `{pretrain.source}`"
        card = source_card(kind, params, images, history, start)
        write_text(FOLDER / "README.md", card)


def labels_of(images: ImageSet) -> list[str]:
    """Return every image's class.

    Raises:
        DataError: an image has none.
    """
    from domainstudio.errors import DataError

    for record in images.records:
        if not record.label:
            raise DataError(
                f"{images.origin}: the image {record.origin} has no label. Put every image into a folder "
                "named after its class"
            )
    return [str(record.label) for record in images.records]


def starting_model(folder: Path, classes: list[str]) -> ClassConditionalDenoiser:
    """Return the unconditional model of a folder with classes that say nothing yet.

    Raises:
        ConfigError: it is no unconditional model.
    """
    from domainstudio import models
    from domainstudio.models.class_conditional import ClassConditionalDenoiser

    return ClassConditionalDenoiser.from_unconditional(models.load(folder), classes)


def described(denoiser: ClassConditionalDenoiser, training: TrainingSettings) -> dict[str, Any]:
    """Return what the model's card says of network, noise and training."""
    unet: Any = denoiser.network.config
    attention = ["Attn" in block for block in unet.down_block_types]
    return {
        "unet": {"block_out_channels": list(unet.block_out_channels), "attention": attention},
        "noise": denoiser.noise_scheduler.config,
        "training": training.model_dump(mode="json"),
    }


if __name__ == "__main__":
    run(main)
