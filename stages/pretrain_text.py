"""Stage `pretrain_text`: train the demo's text-to-image source model. Frozen in dvc.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stages.cli import run

if TYPE_CHECKING:
    import numpy as np
    from diffusers import AutoencoderKL
    from numpy.typing import NDArray
    from torch import Tensor

    from domainstudio.data import ImageSet

FOLDER = Path("models/sources/noto-text")
PARAPHRASES = 3
"""Draws of keywords beside an image's name and its short name."""


def main() -> None:
    """Train VAE, text encoder, and the UNet with both, or go on; write all in half precision."""
    import torch

    from domainstudio import config
    from domainstudio.config import LossWeights
    from domainstudio.data import ImageSet
    from domainstudio.data.prompts import paraphrases
    from domainstudio.demo.autoencoder import train_autoencoder
    from domainstudio.demo.styles import with_styles
    from domainstudio.demo.text_encoder import train_text_encoder
    from domainstudio.demo.text_model import new_pipeline
    from domainstudio.models.text_to_image import TextToImageDenoiser
    from domainstudio.sampling import default_device
    from domainstudio.storage import checkpoint
    from domainstudio.storage.files import write_text
    from domainstudio.storage.mirror import mirrored
    from domainstudio.tracking.tracker import run_for
    from domainstudio.training.cards import source_card
    from domainstudio.training.examples import Examples
    from domainstudio.training.previews import previewer
    from domainstudio.training.trainer import Trainer

    settings = config.load()
    pretrain = settings.pretrain_text
    everything = ImageSet.load("data/source")
    images = trained_on(everything, pretrain.held_out, pretrain.held_out_seed)
    inputs = {"images": everything.digest}
    vae_params = pretrain.vae.model_dump(mode="json")
    vae_folder = Path(".checkpoints") / checkpoint.run_key(vae_params, {"images": images.digest})
    with mirrored(vae_folder):
        vae = train_autoencoder(images.images, pretrain.vae, vae_folder, default_device())

    plain = [paraphrases(record, PARAPHRASES) for record in images.records]
    shown, texts = with_styles(images.images, plain, pretrain.styles)
    params = pretrain.model_dump(mode="json")
    key = checkpoint.run_key(params, inputs)
    torch.manual_seed(pretrain.training.seed)
    corpus = [text for each in texts for text in each]
    pipeline = new_pipeline(pretrain.model, pretrain.noise, vae, images.resolution, corpus)
    folder = Path(".checkpoints") / key
    text_encoder_folder = folder.with_name(f"{key}-text-encoder")
    with mirrored(text_encoder_folder):
        train_text_encoder(
            pipeline.text_encoder,
            pipeline.tokenizer,
            texts,
            mean_latents(vae, shown),
            pretrain.text_encoder,
            text_encoder_folder,
        )
    denoiser = TextToImageDenoiser(pipeline, FOLDER.as_posix())
    denoiser.train(unet=True, text_encoders=True)
    run = run_for("pretrain-text", key, pretrain, inputs, experiment=settings.registry.experiment)
    with mirrored(folder), run as tracker:
        trainer = Trainer(
            denoiser,
            Examples.of(denoiser, shown, texts),
            pretrain.training,
            LossWeights(),
            folder,
            tracker=tracker,
            preview=previewer(settings.sample, [record.caption for record in images.records[::31]]),
        )
        history = trainer.train()
    if trainer.accelerator.is_main_process:
        denoiser.save(FOLDER, half=True)
        write_text(FOLDER / "README.md", source_card("Text-to-image model", params, images, history))


def mean_latents(vae: AutoencoderKL, images: NDArray[np.uint8]) -> Tensor:
    """Return the mean latents of images, scaled, with shape (N, C, H, W)."""
    import torch

    parts = torch.split(torch.from_numpy(images), 32)
    with torch.no_grad():
        means = [vae.encode(part.to(vae.device).float() / 127.5 - 1).latent_dist.mean.cpu() for part in parts]
    return torch.cat(means) * float(vae.config.scaling_factor)


def trained_on(images: ImageSet, held_out: int, seed: int) -> ImageSet:
    """Return the images that are left when `held_out` of them, drawn with `seed`, are kept aside."""
    if not held_out:
        return images
    aside = {record.id for record in images.draw(held_out, seed).records}
    return images.take([index for index, record in enumerate(images.records) if record.id not in aside])


if __name__ == "__main__":
    run(main)
