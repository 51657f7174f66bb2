"""Training the demo's source models: of pixels, of latents, class-conditional and text-to-image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL

from domainstudio import models
from domainstudio.config import LossWeights
from domainstudio.data.prompts import paraphrases
from domainstudio.demo.autoencoder import mean_latents, train_autoencoder
from domainstudio.demo.flow_model import new_flow_pipeline
from domainstudio.demo.styles import with_styles
from domainstudio.demo.text_encoder import train_text_encoder
from domainstudio.demo.text_model import new_pipeline
from domainstudio.errors import DataError
from domainstudio.models.class_conditional import ClassConditionalDenoiser
from domainstudio.models.latent import LatentDenoiser, read_encoder
from domainstudio.models.stable_diffusion import StableDiffusionDenoiser
from domainstudio.models.stable_diffusion_3 import StableDiffusion3Denoiser
from domainstudio.models.unconditional import UnconditionalDenoiser
from domainstudio.project import CHECKPOINTS, SOURCE_MODELS
from domainstudio.sampling import default_device
from domainstudio.storage.files import output_folder, write_text
from domainstudio.storage.mirror import mirrored
from domainstudio.tracking.tracker import run_for
from domainstudio.training.cards import source_card
from domainstudio.training.examples import Examples
from domainstudio.training.objective import Objective
from domainstudio.training.previews import previewer
from domainstudio.training.run import TrainingRun
from domainstudio.training.trainer import Trainer

if TYPE_CHECKING:
    from domainstudio.config import AutoencoderSettings, Settings, TrainingSettings
    from domainstudio.data import ImageSet
    from domainstudio.models.denoiser import Denoiser
    from domainstudio.training.trainer import Record, Tracker

PARAPHRASES = 3
"""Draws of keywords beside an image's name and its short name."""


def pretrain(settings: Settings, images: ImageSet, folder: Path) -> None:
    """Train the unconditional model of params.yaml, or go on with it, and write it with its card."""
    section = settings.pretrain
    run = TrainingRun("pretrain", section, {"images": images.digest})
    torch.manual_seed(section.training.seed)
    denoiser = UnconditionalDenoiser.new(section.unet, section.noise, images.resolution)
    examples = Examples.unconditional(images.images)
    history = _train(run, section.training, denoiser, examples, settings, folder)
    if history:
        card = source_card("Unconditional pixel-space UNet", run.params, images, history)
        write_text(folder / "README.md", card)


def pretrain_latent(settings: Settings, images: ImageSet, folder: Path) -> None:
    """Train the latent model of params.yaml, or go on with it, and write it with its card.

    Raises:
        CheckpointError: there is no VAE.
    """
    section = settings.pretrain_latent
    inputs = {"images": images.digest, "vae": models.digest(section.vae)}
    run = TrainingRun("pretrain-latent", section, inputs)
    vae = read_encoder(Path(section.vae), AutoencoderKL)
    torch.manual_seed(section.training.seed)
    denoiser = LatentDenoiser.around(vae, section.unet, section.noise, images.resolution)
    examples = Examples.unconditional(images.images)
    history = _train(run, section.training, denoiser, examples, settings, folder)
    if history:
        kind = f"Unconditional diffusion model of the latents of `{section.vae}`, for images"
        write_text(folder / "README.md", source_card(kind, run.params, images, history))


def pretrain_class(settings: Settings, images: ImageSet, folder: Path) -> None:
    """Train the class-conditional model of params.yaml, or go on with it, and write it with its card.

    Raises:
        ConfigError: the model to start from is not unconditional.
        DataError: an image has no label.
    """
    section, labels = settings.pretrain_class, labels_of(images)
    source = SOURCE_MODELS / section.source
    run = TrainingRun("pretrain-class", section, {"images": images.digest, "source": models.digest(source)})
    denoiser = with_classes(source, sorted(set(labels)))
    examples = Examples.of(denoiser, images.images, [[label] for label in labels])
    history = _train(run, section.training, denoiser, examples, settings, folder, denoiser.classes)
    if history:
        kind = f"Class-conditional pixel-space UNet ({', '.join(denoiser.classes)})"
        params, start = _described(denoiser, section.training), f"from the weights of `{section.source}`"
        write_text(folder / "README.md", source_card(kind, params, images, history, start))


def pretrain_text(settings: Settings, images: ImageSet, folder: Path) -> None:
    """Train VAE, text encoder, and the UNet with both, or go on, and write the model with its card."""
    section = settings.pretrain_text
    run = TrainingRun("pretrain-text", section, {"images": images.digest})
    images = trained_on(images, section.held_out, section.held_out_seed)
    vae = _pretrained_vae(section.vae, images)
    plain = [paraphrases(record, PARAPHRASES) for record in images.records]
    shown, texts = with_styles(images.images, plain, section.styles)
    torch.manual_seed(section.training.seed)
    corpus = [text for each in texts for text in each]
    pipeline = new_pipeline(section.model, section.noise, vae, images.resolution, corpus)
    encoder_folder = CHECKPOINTS / f"{run.key}-text-encoder"
    with mirrored(encoder_folder):
        latents = mean_latents(vae, shown) * float(vae.config.scaling_factor)
        train_text_encoder(pipeline, texts, latents, section.text_encoder, encoder_folder)
    denoiser = StableDiffusionDenoiser(pipeline, folder.as_posix())
    denoiser.train(unet=True, text_encoders=True)
    captions = [record.caption for record in images.records[::31]]
    examples = Examples.of(denoiser, shown, texts)
    history = _train(run, section.training, denoiser, examples, settings, folder, captions)
    if history:
        card = source_card("Text-to-image model", run.params, images, history)
        write_text(folder / "README.md", card)


def pretrain_flow(settings: Settings, images: ImageSet, folder: Path) -> None:
    """Train a flow-matching transformer around a text model's parts, or go on, and write it with its card."""
    section = settings.pretrain_flow
    source = SOURCE_MODELS / section.source
    run = TrainingRun("pretrain-flow", section, {"images": images.digest, "source": models.digest(source)})
    images = trained_on(images, section.held_out, section.held_out_seed)
    plain = [paraphrases(record, PARAPHRASES) for record in images.records]
    shown, texts = with_styles(images.images, plain, section.styles)
    torch.manual_seed(section.training.seed)
    pipeline = new_flow_pipeline(section.model, StableDiffusionDenoiser.load(source).pipeline)
    denoiser = StableDiffusion3Denoiser(pipeline, folder.as_posix())
    captions = [record.caption for record in images.records[::31]]
    examples = Examples.of(denoiser, shown, texts)
    history = _train(run, section.training, denoiser, examples, settings, folder, captions)
    if history:
        kind = f"Text-to-image model of flow matching, around VAE and text encoder of `{section.source}`"
        write_text(folder / "README.md", source_card(kind, run.params, images, history))


def _train(
    run: TrainingRun,
    training: TrainingSettings,
    denoiser: Denoiser,
    examples: Examples,
    settings: Settings,
    folder: Path,
    texts: Sequence[str] | None = None,
) -> Sequence[Record]:
    """Train a model, or go on with it, and write it in half precision.

    Args:
        run: what decides the result.
        training: its part that the trainer reads.
        denoiser: the model, in place.
        examples: what to train it on.
        settings: how previews are drawn, and where progress is logged.
        folder: where the model is written.
        texts: prompts or classes of the previews.

    Returns:
        The history of all steps; empty in all processes but the main one.
    """

    def make_trainer(checkpoints: Path, tracker: Tracker | None) -> Trainer:
        preview = previewer(settings.sample, texts)
        objective = Objective(denoiser, LossWeights())
        return Trainer(objective, examples, training, checkpoints, tracker=tracker, preview=preview)

    experiment = settings.registry.experiment
    tracker = run_for(run.name, run.key, run.settings, run.inputs, experiment=experiment)
    trainer = run.train(make_trainer, tracker)
    if not trainer.accelerator.is_main_process:
        return []
    with output_folder(folder) as whole:
        trainer.denoiser.save(whole, half=True)
    return trainer.history


def _pretrained_vae(settings: AutoencoderSettings, images: ImageSet) -> AutoencoderKL:
    folder = CHECKPOINTS / TrainingRun("vae", settings, {"images": images.digest}).key
    with mirrored(folder):
        return train_autoencoder(images.images, settings, folder, default_device())


def labels_of(images: ImageSet) -> list[str]:
    """Return every image's class.

    Raises:
        DataError: an image has none.
    """
    for record in images.records:
        if not record.label:
            raise DataError(
                f"{images.origin}: the image {record.origin} has no label. Put every image into a folder "
                "named after its class"
            )
    return [str(record.label) for record in images.records]


def with_classes(folder: Path, classes: Sequence[str]) -> ClassConditionalDenoiser:
    """Return the unconditional model of a folder with classes, which make no difference yet.

    Raises:
        ConfigError: it is no unconditional model.
    """
    return ClassConditionalDenoiser.from_unconditional(models.load(folder), classes)


def trained_on(images: ImageSet, held_out: int, seed: int) -> ImageSet:
    """Return the images that are left when `held_out` of them, drawn with `seed`, are kept aside."""
    if not held_out:
        return images
    aside = {record.id for record in images.draw(held_out, seed).records}
    return images.take([index for index, record in enumerate(images.records) if record.id not in aside])


def _described(denoiser: ClassConditionalDenoiser, training: TrainingSettings) -> dict[str, Any]:
    """Return network, noise and training for the model's card."""
    unet: Any = denoiser.network.config
    attention = ["Attn" in block for block in unet.down_block_types]
    return {
        "unet": {"block_out_channels": list(unet.block_out_channels), "attention": attention},
        "noise": denoiser.schedule.noise_scheduler.config,
        "training": training.model_dump(mode="json"),
    }
