"""Networks that are trained from scratch, and their noise."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from domainstudio.config.base import MANY, Section, Seed

Width = Annotated[int, Field(ge=1)]
"""Channels."""


class UNetSettings(Section):
    """Architecture of an unconditional UNet trained from scratch (`diffusers.UNet2DModel`)."""

    block_out_channels: tuple[Width, ...] = Field(min_length=1)
    """Channels of each resolution, from fine to coarse."""
    attention: tuple[bool, ...] = Field(min_length=1)
    """Whether each resolution has self-attention; as many entries as `block_out_channels`."""
    layers_per_block: int = Field(default=1, ge=1)
    """Residual blocks per resolution."""
    attention_head_dim: int = Field(default=32, ge=1)
    """Channels of one attention head."""
    norm_num_groups: int = Field(default=16, ge=1)
    """Groups of the group normalisation; divides every entry of `block_out_channels`."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout inside the residual blocks."""
    learned_variance: bool = False
    """Predict the variance too (improved DDPM): twice the output channels, and the `vlb` term."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.attention) != len(self.block_out_channels):
            raise ValueError(
                f"attention has {len(self.attention)} entries and block_out_channels "
                f"{len(self.block_out_channels)}: give one true or false per resolution"
            )
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            raise ValueError(f"norm_num_groups {self.norm_num_groups} must divide {self.block_out_channels}")
        return self


class NoiseSettings(Section):
    """The forward diffusion of a model trained from scratch."""

    num_train_timesteps: int = Field(default=1000, ge=2, le=MANY)
    """Number of noise levels."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    """How noise grows with t, by diffusers' names; `squaredcos_cap_v2` is the cosine schedule."""
    prediction_type: Literal["epsilon", "v_prediction"] = "v_prediction"
    """What the network predicts. A schedule of zero terminal SNR needs `v_prediction`."""
    rescale_betas_zero_snr: bool = True
    """Rescale to zero terminal signal-to-noise ratio (arXiv 2305.08891)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr needs prediction_type v_prediction, got epsilon: it gives no x0 at "
                "pure noise"
            )
        return self


class PartTrainingSettings(Section):
    """The training of one part of a text-to-image model, before its UNet."""

    steps: int = Field(ge=1)
    """Optimiser steps."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of AdamW; it falls to 0 as a cosine."""
    seed: Seed = 0
    """Seed of every random draw."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between resumable checkpoints."""


class AutoencoderSettings(PartTrainingSettings):
    """A small VAE trained from scratch (`diffusers.AutoencoderKL`)."""

    block_out_channels: tuple[Width, ...] = Field(default=(32, 64), min_length=1)
    """Channels of each resolution; each but the last halves height and width."""
    layers_per_block: int = Field(default=1, ge=1)
    """Residual blocks per resolution."""
    latent_channels: int = Field(default=4, ge=1)
    """Channels of a latent."""
    norm_num_groups: int = Field(default=16, ge=1)
    """Groups of the group normalisation."""
    kl_weight: float = Field(default=1e-4, ge=0)
    """Weight of the latents' divergence from a standard normal, per latent value."""
    batch_size: int = Field(default=32, ge=1)
    """Images per step."""


class TextModelSettings(Section):
    """A small text-to-image model trained from scratch, in Stable Diffusion's layout."""

    block_out_channels: tuple[Width, ...] = Field(min_length=1)
    """The UNet's channels of each resolution."""
    attention: tuple[bool, ...] = Field(min_length=1)
    """Whether each resolution attends to itself and to the prompt."""
    layers_per_block: int = Field(default=1, ge=1)
    """Residual blocks per resolution."""
    attention_heads: int = Field(default=4, ge=1)
    """Heads of each attention layer."""
    norm_num_groups: int = Field(default=16, ge=1)
    """Groups of the group normalisation."""
    text_width: int = Field(default=128, ge=32, multiple_of=32)
    """Channels of the text encoder; 32 per head."""
    text_layers: int = Field(default=3, ge=1)
    """Layers of the text encoder."""
    vocabulary: int = Field(default=1024, ge=514)
    """Largest number of tokens. 514 of them are always there: begin, end, and two forms of every byte."""
    prompt_length: int = Field(default=24, ge=4)
    """Tokens of a prompt, begin and end included."""


class FlowModelSettings(Section):
    """A small transformer of flow matching trained from scratch, in SD3's layout."""

    num_layers: int = Field(ge=1)
    """Blocks; in each, image and text attend to each other."""
    num_attention_heads: int = Field(ge=1)
    """Heads of each block."""
    attention_head_dim: int = Field(default=32, ge=2, multiple_of=2)
    """Channels of a head."""
    patch_size: int = Field(default=2, ge=1)
    """Latents along a side of a token."""
    shift: float = Field(default=1.0, gt=0)
    """Static shift of the noise levels towards noise; SD3 of 1024 pixels has 3."""


class TextEncoderSettings(PartTrainingSettings):
    """The training of a small text encoder, which learns what its texts show."""

    batch_size: int = Field(default=128, ge=1)
    """Texts per step."""
