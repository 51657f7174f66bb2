"""What noise does to x0, and what a network is to predict: one protocol for every kind of noise levels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from domainstudio.config import LossWeights, TrainingSettings


class Schedule(Protocol):
    """A forward process x_t = α_t·x0 + σ_t·noise, and the output of a network that undoes it.

    `timesteps` has shape (N,). They are what the network is told: integers, or 1000·σ of flow matching.
    """

    prediction_type: str
    """What the network predicts: `epsilon`, `v_prediction` or `flow`."""
    num_train_timesteps: int
    """T, the number of noise levels."""
    levels: Tensor
    """ᾱ (or σ, of flow matching) of every noise level, with shape (T,)."""

    def draw(
        self, number: int, settings: TrainingSettings, size: tuple[int, int], generator: torch.Generator
    ) -> Tensor:
        """Draw timesteps of a training step.

        Args:
            number: how many.
            settings: how they are distributed.
            size: height and width of x0, on which some models' noise levels depend.
            generator: on the CPU.
        """
        ...

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t, with the shape (N, C, H, W) of x0 and noise."""
        ...

    def true_output(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what a perfect network would predict, with shape (N, C, H, W)."""
        ...

    def to_x0(self, output: Tensor, xt: Tensor, timesteps: Tensor) -> Tensor:
        """Return the clean batch that an output implies, in at least float32, with shape (N, C, H, W)."""
        ...

    def alpha_bar(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """Return SNR / (1 + SNR), which is ᾱ where α² + σ² = 1, shaped (N, 1, ...) to multiply `like`."""
        ...

    def loss_weights(self, timesteps: Tensor, weights: LossWeights) -> Tensor:
        """Return the weight of each image's denoising error, with shape (N,)."""
        ...

    def sampler(self, name: str, steps: int, size: tuple[int, int]) -> Any:
        """Return a diffusers scheduler of these noise levels, its timesteps set.

        Args:
            name: `ddpm`, `ddim` or `dpm-solver++`.
            steps: denoising steps.
            size: height and width of x0.
        """
        ...


def at_least_float32(x: Tensor) -> Tensor:
    """Return a tensor in float32, or as it is where it is more precise."""
    return x if x.dtype == torch.float64 else x.float()


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Return values with shape (N,) shaped (N, 1, ...) to multiply `like`, with shape (N, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))
