"""What the training loop, the losses and the sampler know of a model: one protocol for every kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, VQModel
    from torch import Tensor, nn

    from domainstudio.models.adapters import Adapters
    from domainstudio.models.condition import Condition
    from domainstudio.models.schedule import Schedule


@dataclass(frozen=True)
class Prediction:
    """A network's output for a noisy batch."""

    output: Tensor
    """ε, v or velocity, as the schedule's `prediction_type` says, with shape (N, C, H, W)."""
    variance: Tensor | None = None
    """The learned variance's interpolation value (improved DDPM), with the same shape; `None` if fixed."""


class Denoiser(Protocol):
    """A diffusion model of any kind. `x0` and `xt` live in its own space: pixels or latents."""

    kind: str
    """The kind's name: `unconditional`, `latent`, `class-conditional` or `text-to-image`."""
    conditional: bool
    """Whether it takes a condition: a prompt or a class."""
    name_or_path: str
    """Folder or hub id that it was loaded from, with forward slashes; "" for none."""
    adapters: Adapters | None
    """Its low-rank adapters, if it has any (`domainstudio.models.lora`)."""
    network: nn.Module
    """Every module that training may change; what of it is trained requires gradients."""

    @property
    def schedule(self) -> Schedule:
        """Its noise levels, and what it predicts at each."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of its classes; none for models of other kinds."""
        ...

    @property
    def vae(self) -> AutoencoderKL | VQModel | None:
        """The frozen encoder and decoder of latents; `None` for a model of pixels."""
        ...

    @property
    def text_encoders(self) -> Sequence[nn.Module]:
        """The text encoders within the network, if it has any."""
        ...

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
    def guidance_patch(self) -> int:
        """Side of the patches of a guided output that get the norm of the condition's own; 0 for none."""
        ...

    @property
    def learned_variance(self) -> bool:
        """Whether predictions carry a variance."""
        ...

    def train(
        self, *, unet: bool = True, text_encoders: bool = False, new_tokens: Mapping[str, str] | None = None
    ) -> None:
        """Choose what is trained, before conditions and the frozen source are made.

        Args:
            unet: the UNet.
            text_encoders: the text encoders.
            new_tokens: words that the tokenizers get, whose embeddings alone are trained (textual inversion,
                arXiv 2208.01618), each with the known word whose embedding they begin as.

        Raises:
            ConfigError: the model has no text encoder, or knows a new token already.
        """
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
            size: height and width of the images, for models that take it (XL); by default `resolution`.

        Raises:
            ConfigError: a value is not one that the model can take.
        """
        ...

    def condition_key(self, values: Sequence[str], size: tuple[int, int] | None = None) -> list[Any] | None:
        """Return what decides `condition` beside the weights of the text encoders, to keep the result by.

        `None` where there is nothing to keep: a class's row, or tokens.
        """
        ...

    def predict(self, xt: Tensor, timesteps: Tensor, condition: Condition) -> Prediction:
        """Return the network's prediction for xt, with shape (N, C, H, W), at timesteps (N,)."""
        ...

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass, wherever gradients flow."""
        ...

    def frozen_source(self) -> Self:
        """Return the model as it is now, frozen, to compare with; it shares what training never changes.

        Of a model with adapters it is a view of the same network that predicts without them.
        """
        ...

    def to(self, device: torch.device | str) -> Self:
        """Move every part to a device and return the model itself."""
        ...

    def save(self, folder: Path, *, half: bool = False) -> None:
        """Write a diffusers pipeline folder, as safetensors; `half` stores float16.

        Of a model with adapters, write these alone (`domainstudio.models.adapter_folder`).
        """
        ...
