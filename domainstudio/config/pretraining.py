"""The demo's source models."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from domainstudio.config.base import MANY, Name, Seed, Text
from domainstudio.config.data import SourceImages
from domainstudio.config.model import (
    AutoencoderSettings,
    FlowModelSettings,
    NoiseSettings,
    TextEncoderSettings,
    TextModelSettings,
    UNetSettings,
)
from domainstudio.config.training import TrainingSettings

Style = Literal["grey", "sepia", "blueprint", "negative", "pastel", "stencil"]
"""A style of `domainstudio.demo.styles`."""


class PretrainingImages(SourceImages):
    """What a source model of the demo is trained on."""

    resolution: int = Field(ge=8, le=2048, multiple_of=8)
    """Height and width of its images, in pixels; otherwise they are prepared as `prepare` says."""


class PretrainSettings(PretrainingImages):
    """`python -m stages.pretrain pretrain`: an unconditional source model of pixels from scratch."""

    unet: UNetSettings
    """The network."""
    noise: NoiseSettings
    """The forward diffusion."""
    training: TrainingSettings
    """The training run."""


class PretrainLatentSettings(PretrainSettings):
    """`python -m stages.pretrain pretrain_latent`: an unconditional source model of latents from scratch."""

    vae: Text
    """Folder of a trained `AutoencoderKL`, whose latents the model learns. It should know other styles too:
    targets are encoded and decoded with it."""


class PretrainTextSettings(PretrainingImages):
    """`python -m stages.pretrain pretrain_text`: a small text-to-image source model from scratch."""

    held_out: int = Field(default=0, ge=0, le=MANY)
    """Images left out of training, to see what the model draws for prompts that it has never met."""
    held_out_seed: Seed = 0
    """Seed of the choice of those images."""
    styles: tuple[Style, ...] = ()
    """Half of the images are shown in one of these styles, with "… in grey style" in their prompts. So the
    model learns that such words go with every subject, as the words for a new style will."""
    vae: AutoencoderSettings
    """The autoencoder, trained first."""
    model: TextModelSettings
    """UNet and text encoder."""
    text_encoder: TextEncoderSettings
    """The training of the text encoder, before the UNet's."""
    noise: NoiseSettings
    """The forward diffusion."""
    training: TrainingSettings
    """The training run."""


class PretrainFlowSettings(PretrainingImages):
    """`python -m stages.pretrain pretrain_flow`: a small flow-matching source model from scratch.

    It takes VAE and text encoder of a trained text-to-image model, and its images as `pretrain_text` does.
    """

    source: Name
    """The text-to-image model, in `models/sources/<source>`."""
    held_out: int = Field(default=0, ge=0)
    """Images left out of training; give what the text model left out."""
    held_out_seed: int = Field(default=0, ge=0)
    """Seed of the choice of those images."""
    styles: tuple[Style, ...] = ()
    """Styles in which half of the images are shown."""
    model: FlowModelSettings
    """The transformer."""
    training: TrainingSettings
    """The training run."""


class PretrainClassSettings(PretrainingImages):
    """`python -m stages.pretrain pretrain_class`: a class-conditional source model from an unconditional one.

    Its classes are the labels of the prepared source images.
    """

    source: Name
    """The unconditional model to start from, in `models/sources/<source>`."""
    training: TrainingSettings
    """The training run. Its `condition_dropout` trains the null class that guidance needs."""
