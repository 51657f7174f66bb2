"""A small decoder of latents for the loss terms, in place of the model's own VAE."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderTiny

from domainstudio.errors import CheckpointError, ConfigError
from domainstudio.storage.weights import load_part

if TYPE_CHECKING:
    from torch import Tensor

    from domainstudio.models.denoiser import Denoiser


def load_decoder(name_or_path: str, denoiser: Denoiser) -> Callable[[Tensor], Tensor]:
    """Return a function from x0 to images in about [-1, 1]; gradients flow through it.

    `AutoencoderTiny` reads latents as the UNet sees them (its own `scaling_factor` is 1).

    Args:
        name_or_path: a folder or a hub id, for example madebyollin/taesd.
        denoiser: the model whose latents it decodes.

    Raises:
        CheckpointError: it cannot be loaded.
        ConfigError: it decodes latents of another shape.
    """
    try:
        vae = load_part(AutoencoderTiny, name_or_path, torch_dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"methods.*.tiny_vae: {name_or_path} is not an AutoencoderTiny as safetensors: {error}"
        ) from error
    vae.requires_grad_(False).eval()
    scale = 2 ** (len(vae.config.decoder_block_out_channels) - 1)
    wanted = tuple(side // scale for side in denoiser.resolution)
    channels, *size = denoiser.shape
    if (vae.config.latent_channels, wanted) != (channels, tuple(size)):
        raise ConfigError(
            f"methods.*.tiny_vae: {name_or_path} decodes {vae.config.latent_channels} channels by a factor "
            f"of {scale}, and the model's latents of {channels}x{size[0]}x{size[1]} become images of "
            f"{denoiser.resolution[0]}x{denoiser.resolution[1]} pixels: name the small VAE of this family"
        )

    def decode(x0: Tensor) -> Tensor:
        images: Tensor = vae.to(x0.device).decode(x0.float() / vae.config.scaling_factor).sample
        return images

    return decode
