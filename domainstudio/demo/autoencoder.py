"""Training a small VAE from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch.nn import functional

from domainstudio.seeding import generator
from domainstudio.training.steps import run_steps

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from domainstudio.config import AutoencoderSettings

EMA = 0.995
"""Decay of the averaged weights, which are what is returned."""


def train_autoencoder(
    images: NDArray[np.uint8], settings: AutoencoderSettings, folder: Path, device: torch.device
) -> AutoencoderKL:
    """Train a VAE on an image set, from the last checkpoint if there is one.

    The loss is the mean absolute error and `kl_weight` times the divergence of the latents from a standard
    normal. Images are cropped, mirrored, and change their colours, down to grey and inverted, so that the VAE
    serves domains other than the one it was trained on. Its scaling factor makes the latents of `images`
    of unit variance.

    Args:
        images: uint8, with shape (N, 3, H, W).
        settings: sizes and training.
        folder: for resumable states.
        device: where to train.
    """
    torch.manual_seed(settings.seed)
    vae = _new(settings, images.shape[-1]).to(device)
    average = EMAModel(vae.parameters(), decay=EMA, foreach=True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.learning_rate)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, 100, settings.steps)
    data = torch.from_numpy(images)

    def take_step(step: int) -> float:
        error = _step(vae, optimizer, data, settings, generator(settings.seed, step))
        lr_scheduler.step()
        average.to(device)  # a state that was read is on the CPU
        average.step(vae.parameters())
        return error

    run_steps(
        take_step,
        {"vae": vae, "average": average, "optimizer": optimizer, "lr_scheduler": lr_scheduler},
        settings.steps,
        folder,
        every=settings.checkpoint_every,
        name="vae",
    )
    average.copy_to(vae.parameters())
    # 1 / the latents' standard deviation (latent diffusion, arXiv 2112.10752, appendix G)
    vae.register_to_config(scaling_factor=round(1 / float(mean_latents(vae.eval(), images).std()), 5))
    return vae


def _step(
    vae: AutoencoderKL,
    optimizer: torch.optim.Optimizer,
    data: Tensor,
    settings: AutoencoderSettings,
    draw: torch.Generator,
) -> float:
    """Make one optimiser step and return the mean absolute error before it."""
    batch = augment(data[torch.randint(len(data), (settings.batch_size,), generator=draw)], draw)
    loss, error = _loss(vae, batch.to(vae.device), settings.kl_weight, draw)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return error


def augment(images: Tensor, draw: torch.Generator) -> Tensor:
    """Return changed copies in [-1, 1] of uint8 images: cropped, mirrored, with other colours."""
    number, _, size, _ = images.shape
    x = images.float() / 127.5 - 1

    def some(probability: float) -> Tensor:
        return (torch.rand(number, generator=draw) < probability).view(-1, 1, 1, 1)

    x = torch.where(some(0.5), x.flip(3), x)
    scale = 1 + 0.6 * torch.rand(number, generator=draw) * some(0.5).view(-1)
    shift = (torch.rand(number, 2, generator=draw) * 2 - 1) * (1 - 1 / scale)[:, None]
    theta = torch.zeros(number, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
    theta[:, :, 2] = shift
    grid = functional.affine_grid(theta, [number, 3, size, size], align_corners=False)
    x = functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
    channels = torch.stack([torch.randperm(3, generator=draw) for _ in range(number)])
    permuted = x.gather(1, channels.view(number, 3, 1, 1).expand_as(x))
    x = torch.where(some(0.3), permuted, x)
    x = torch.where(some(0.2), x.mean(1, keepdim=True).expand_as(x), x)
    contrast = 1 + some(0.3) * (torch.rand(number, 1, 1, 1, generator=draw) * 2)
    x = (x * contrast).clamp(-1, 1)
    return torch.where(some(0.1), -x, x)


def _loss(vae: AutoencoderKL, batch: Tensor, kl_weight: float, draw: torch.Generator) -> tuple[Tensor, float]:
    latents = vae.encode(batch).latent_dist
    z = latents.mean + latents.std * torch.randn(latents.mean.shape, generator=draw).to(batch)
    error = functional.l1_loss(vae.decode(z).sample, batch)
    divergence = 0.5 * (latents.mean**2 + latents.var - 1 - latents.logvar).mean()
    return error + kl_weight * divergence, float(error.detach())


def _new(settings: AutoencoderSettings, resolution: int) -> AutoencoderKL:
    levels = len(settings.block_out_channels)
    return AutoencoderKL(
        sample_size=resolution,
        block_out_channels=settings.block_out_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=settings.layers_per_block,
        latent_channels=settings.latent_channels,
        norm_num_groups=settings.norm_num_groups,
        mid_block_add_attention=False,
    )


@torch.no_grad()
def mean_latents(vae: AutoencoderKL, images: NDArray[np.uint8]) -> Tensor:
    """Return the mean latents of uint8 images on the CPU, not scaled, with shape (N, C, H, W)."""
    parts = torch.split(torch.from_numpy(images), 32)
    means = [vae.encode(part.to(vae.device).float() / 127.5 - 1).latent_dist.mean.cpu() for part in parts]
    return torch.cat(means)
