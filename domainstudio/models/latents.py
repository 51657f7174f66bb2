"""Latents of a VAE as diffusion models see them: drawn from the encoder's distribution, and scaled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from domainstudio.models.schedule import at_least_float32

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, VQModel
    from torch import Tensor


def factor(vae: AutoencoderKL | VQModel) -> int:
    """Return how many pixels, along a side, a latent stands for."""
    config: Any = vae.config
    video = "temperal_downsample" in config  # diffusers' spelling
    return int(2 ** len(config.temperal_downsample) if video else 2 ** (len(config.block_out_channels) - 1))


def channels(vae: AutoencoderKL | VQModel) -> int:
    """Return how many channels its latents have."""
    config: Any = vae.config
    return int(config.z_dim if "z_dim" in config else config.latent_channels)


def encode_images(images: Tensor, vae: AutoencoderKL | VQModel) -> Tensor:
    """Return mean and standard deviation of the latents of images; a VQ model's deviation is 0.

    Args:
        images: in [-1, 1], with shape (N, 3, H, W).
        vae: the encoder.

    Returns:
        At least float32, with shape (N, 2C, H, W).
    """
    with torch.no_grad():
        encoded = vae.encode(images.to(vae.dtype))
    if hasattr(encoded, "latent_dist"):
        parts = encoded.latent_dist.mean, encoded.latent_dist.std
    else:
        parts = encoded.latents, torch.zeros_like(encoded.latents)
    return at_least_float32(torch.cat(parts, dim=1))


def draw_latents(encoded: Tensor, vae: AutoencoderKL | VQModel, generator: torch.Generator) -> Tensor:
    """Draw latents, scaled to about unit variance (latent diffusion, arXiv 2112.10752, appendix G).

    VAEs of SD3 and Flux have a mean too, their shift factor.

    Args:
        encoded: mean and standard deviation, with shape (N, 2C, H, W).
        vae: gives the scaling factor.
        generator: draws on the CPU.
    """
    latents = draw_unscaled(encoded, generator)
    if shift := _shift(vae):
        latents = latents - shift
    scaled: Tensor = latents * vae.config.scaling_factor
    return scaled


def draw_unscaled(encoded: Tensor, generator: torch.Generator) -> Tensor:
    """Draw latents as the VAE makes them, with shape (N, C, H, W), of their mean and standard deviation."""
    mean, deviation = encoded.chunk(2, dim=1)
    return mean + deviation * torch.randn(mean.shape, generator=generator).to(mean)


def decode_latents(x0: Tensor, vae: AutoencoderKL | VQModel) -> Tensor:
    """Return the images of scaled latents, in about [-1, 1]; gradients flow through."""
    latents = at_least_float32(x0) / vae.config.scaling_factor
    if shift := _shift(vae):
        latents = latents + shift
    images: Tensor = vae.decode(latents.to(vae.dtype)).sample
    return at_least_float32(images)


def _shift(vae: AutoencoderKL | VQModel) -> float:
    """Return the mean of unscaled latents; 0 where the VAE has none."""
    return float(vae.config.get("shift_factor") or 0.0)
