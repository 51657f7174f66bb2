"""What the training loop, the losses and the sampler know of a model: one protocol for every kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch
    from diffusers import DDPMScheduler
    from torch import Tensor, nn

    from domainstudio.models.lora import Adapters

    Condition: TypeAlias = Mapping[str, Tensor]
    """What a model is told beside the noisy batch: tensors by name, each with shape (N, ...). Empty where
    it is told nothing. Rows of several conditions of one model can be taken and joined."""


@dataclass(frozen=True)
class Prediction:
    """What a network says of a noisy batch."""

    output: Tensor
    """ε or v, as the noise scheduler's `prediction_type` says, with shape (N, C, H, W)."""
    variance: Tensor | None = None
    """The learned variance's interpolation value (improved DDPM), with the same shape; `None` if fixed."""


class Denoiser(Protocol):
    """A diffusion model of any kind. `x0` and `xt` live in its own space: pixels or latents."""

    conditional: bool
    """Whether the model is told anything: a prompt or a class."""
    location: str
    """Folder or hub id that it was loaded from, with forward slashes; "" for none."""
    adapters: Adapters | None
    """Its low-rank adapters, if it has any (`domainstudio.models.lora`)."""
    network: nn.Module
    """Every module that training may change; what of it is trained requires gradients."""
    noise_scheduler: DDPMScheduler
    """The forward diffusion, by its ᾱ and prediction type."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one x0."""
        ...

    @property
    def resolution(self) -> tuple[int, int]:
        """Height and width of its images, in pixels."""
        ...

    @property
    def multiple(self) -> int:
        """What the sides of images of another size must be multiples of, in pixels."""
        ...

    @property
    def learned_variance(self) -> bool:
        """Whether predictions carry a variance."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Return all that `x0` needs of images in [-1, 1], with shape (N, 3, H, W); the same every time."""
        ...

    def x0(self, encoded: Tensor, generator: torch.Generator) -> Tensor:
        """Return x0 of encoded images, with shape (N, C, H, W), drawn where the encoder is a distribution."""
        ...

    def decode(self, x0: Tensor) -> Tensor:
        """Return images in about [-1, 1], with shape (N, 3, H, W); gradients flow through."""
        ...

    def condition(self, values: Sequence[str], size: tuple[int, int] | None = None) -> Condition:
        """Return the condition of one text each: prompts, or names of classes; "" stands for none.

        Args:
            values: the texts.
            size: height and width of the images, for models that are told it; by default `resolution`.

        Raises:
            ConfigError: a value is not one that the model can take.
        """
        ...

    def predict(self, xt: Tensor, timesteps: Tensor, condition: Condition) -> Prediction:
        """Return the network's prediction for xt, with shape (N, C, H, W), at timesteps (N,)."""
        ...

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass, wherever gradients flow."""
        ...

    def frozen_source(self) -> Denoiser:
        """Return the model as it is now, frozen, to compare with; it shares what training never changes.

        Of a model with adapters it is a view of the same network that predicts without them.
        """
        ...

    def to(self, device: torch.device | str) -> Denoiser:
        """Move every part to a device and return the model itself."""
        ...

    def save(self, folder: Path, *, half: bool = False) -> None:
        """Write a diffusers pipeline folder, as safetensors; `half` stores float16.

        Of a model with adapters, write these alone (`domainstudio.models.adapter_folder`).
        """
        ...
