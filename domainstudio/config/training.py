"""A training run, and the processes that share it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from domainstudio.config.base import Section, Seed, Text
from domainstudio.config.flow import FlowSettings


class TrainingSettings(Section):
    """One training run, of a source or of an adapted model."""

    steps: int = Field(ge=1)
    """Optimiser steps."""
    batch_size: int = Field(ge=1)
    """Images per process and micro-step. Pairwise losses need at least 3."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Micro-steps per optimiser step."""
    learning_rate: float = Field(gt=0, le=1)
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """What follows the warm-up, by diffusers' names."""
    lr_warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this L2 norm."""
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the averaged weights, which are what is saved; 0 saves the raw weights."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast type of the networks; losses and trainable weights stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit` keeps its state in 8 bits (extra `gpu`, CUDA only): 2 bytes per trained weight, not 8."""
    frozen_precision: Literal["no", "bf16", "fp16"] = "no"
    """Type in which frozen networks are kept: the source model's, and the base of adapters. Where adapters of
    the network learn alone, base and text encoders are also read in it. The VAE stays float32. Needs
    `mixed_precision`."""
    compile: bool = False
    """Compile the networks of a step, and the VAE's decoder where terms use it (`torch.compile`): slow first
    steps, then faster ones."""
    horizontal_flip: bool = False
    """Mirror each training image with probability one half."""
    timesteps: Literal["per_image", "shared"] = "per_image"
    """`shared` draws one noise level per step for the whole batch, so that pairs are comparable."""
    max_timestep: float = Field(default=1.0, gt=0, le=1)
    """Draw t from this first fraction of the noise levels."""
    flow: FlowSettings = FlowSettings()
    """How t is drawn for models of flow matching."""
    condition_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of training an image without its prompt or class, for classifier-free guidance."""
    train_text_encoder: bool = False
    """Train the text encoders too; then prompts are encoded at every step."""
    seed: Seed = 0
    """Seed of every random draw, together with the process's rank and the step."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Steps between resumable checkpoints; trackers see the losses when a checkpoint is written."""
    preview_every: int = Field(default=0, ge=0)
    """Steps between preview grids from fixed noise; 0 makes none."""
    candidate_every: int = Field(default=0, ge=0)
    """Steps between the candidates that the section `choose` chooses among; 0 takes the last step."""

    @model_validator(mode="after")
    def _frozen_precision(self) -> Self:
        if self.frozen_precision != "no" and self.mixed_precision != self.frozen_precision:
            raise ValueError(
                f"frozen_precision {self.frozen_precision} needs mixed_precision {self.frozen_precision}, "
                f"got {self.mixed_precision}: set both to the same, or frozen_precision to no"
            )
        return self


class LaunchSettings(Section):
    """Several processes for each stage that trains, draws or measures: one per GPU, by accelerate."""

    processes: int = Field(default=1, ge=1)
    """Processes, and GPUs, of such a stage on this machine. A training's batch is `batch_size` of each."""
    accelerate_config: Text | None = None
    """A file that `accelerate config` wrote, for FSDP (version 2) or several nodes; its own number of
    processes then counts."""
