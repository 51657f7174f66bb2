"""Conversions between x0 and a network's output, ε or v, by the prediction type of a noise scheduler."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from domainstudio.errors import CheckpointError

if TYPE_CHECKING:
    from diffusers import DDPMScheduler
    from torch import Tensor


def alpha_bar(noise_scheduler: DDPMScheduler, timesteps: Tensor, like: Tensor) -> Tensor:
    """Return ᾱ_t in float32, shaped (N, 1, ...) to multiply `like` with shape (N, ...)."""
    values: Tensor = noise_scheduler.alphas_cumprod.to(like.device)[timesteps]
    return values.view(-1, *[1] * (like.ndim - 1))


def at_least_float32(x: Tensor) -> Tensor:
    """Return a tensor in float32, or as it is where it is more precise."""
    return x if x.dtype == torch.float64 else x.float()


def to_x0(noise_scheduler: DDPMScheduler, output: Tensor, xt: Tensor, timesteps: Tensor) -> Tensor:
    """Return the clean batch that a prediction implies, in at least float32.

    ε: x0 = (xt - sqrt(1 - ᾱ)·ε) / sqrt(ᾱ) (DDPM, arXiv 2006.11239, equation 15);
    v: x0 = sqrt(ᾱ)·xt - sqrt(1 - ᾱ)·v (arXiv 2202.00512, appendix D).

    Args:
        noise_scheduler: gives ᾱ and the prediction type.
        output: the network's output, with shape (N, C, H, W).
        xt: the noisy batch, with the same shape.
        timesteps: integers, with shape (N,).
    """
    a = alpha_bar(noise_scheduler, timesteps, xt)
    output, xt = at_least_float32(output), at_least_float32(xt)
    if noise_scheduler.config.prediction_type == "epsilon":
        return (xt - (1 - a).sqrt() * output) / a.sqrt()
    return a.sqrt() * xt - (1 - a).sqrt() * output


def true_output(noise_scheduler: DDPMScheduler, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return what a perfect network would predict: the noise, or v = sqrt(ᾱ)·ε - sqrt(1 - ᾱ)·x0."""
    if noise_scheduler.config.prediction_type == "epsilon":
        return noise
    velocity: Tensor = noise_scheduler.get_velocity(x0, noise, timesteps)
    return velocity


def min_snr_weights(noise_scheduler: DDPMScheduler, timesteps: Tensor, gamma: float | None) -> Tensor:
    """Return the Min-SNR-γ weight of each image's denoising error (arXiv 2303.09556, section 3.4).

    With SNR = ᾱ / (1 - ᾱ), min(SNR, γ) / SNR for ε and min(SNR, γ) / (SNR + 1) for v: both weigh the error
    of x0 by min(SNR, γ).

    Args:
        noise_scheduler: gives ᾱ and the prediction type.
        timesteps: integers, with shape (N,).
        gamma: γ; `None` gives every image 1.

    Returns:
        Weights, with shape (N,).
    """
    a = alpha_bar(noise_scheduler, timesteps, timesteps)
    if gamma is None:
        return torch.ones_like(a)
    if noise_scheduler.config.prediction_type == "epsilon":  # γ(1 - ᾱ)/ᾱ: finite where SNR is not
        return (gamma * (1 - a) / a).clamp(max=1)
    return torch.minimum(a, gamma * (1 - a))


def check_prediction_type(noise_scheduler: DDPMScheduler, where: str) -> None:
    """Refuse a scheduler whose prediction type has no conversion here.

    Raises:
        CheckpointError: the type is neither `epsilon` nor `v_prediction`.
    """
    kind = noise_scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise CheckpointError(
            f"{where}: prediction_type {kind!r} is not supported; use a model that predicts "
            "epsilon or v_prediction"
        )
