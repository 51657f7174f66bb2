"""What the training loop, the losses and the sampler know of a model: one protocol for every kind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from diffusers import DDPMScheduler
    from torch import Tensor, nn


@dataclass(frozen=True)
class Prediction:
    """What a network says of a noisy batch."""

    output: Tensor
    """ε or v, as the noise scheduler's `prediction_type` says, with shape (N, C, H, W)."""
    variance: Tensor | None = None
    """The learned variance's interpolation value (improved DDPM), with the same shape; `None` if fixed."""


class Denoiser(Protocol):
    """A diffusion model of any kind. `x0` and `xt` live in its own space: pixels or latents."""

    network: nn.Module
    """The part that is trained."""
    noise_scheduler: DDPMScheduler
    """The forward diffusion, by its ᾱ and prediction type."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one x0."""
        ...

    @property
    def learned_variance(self) -> bool:
        """Whether predictions carry a variance."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Return x0 of images in [-1, 1], with shape (N, 3, H, W)."""
        ...

    def decode(self, x0: Tensor) -> Tensor:
        """Return images in about [-1, 1], with shape (N, 3, H, W); gradients flow through."""
        ...

    def predict(self, xt: Tensor, timesteps: Tensor, condition: Any = None) -> Prediction:
        """Return the network's prediction for xt, with shape (N, C, H, W), at timesteps (N,)."""
        ...

    def to(self, device: torch.device | str) -> Denoiser:
        """Move every part to a device and return the model itself."""
        ...

    def save(self, folder: Path, *, half: bool = False) -> None:
        """Write a diffusers pipeline folder, as safetensors; `half` stores float16."""
        ...
