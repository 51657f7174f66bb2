r"""Distil a small decoder from a text model's VAE, for `methods.*.tiny_vae`.

    python -m stages.prepare source noto --params params.yaml benchmarks/ink.yaml
    python -m stages.prepare target ink --params params.yaml benchmarks/ink.yaml
    python -m benchmarks.tiny_vae --source noto-text --images data/sources/noto \
        --unseen data/targets/ink/domain --output .cache/tiny-vae

Writes an `AutoencoderTiny` as diffusers does and prints how far its images are from the whole decoder's. Only
its decoder is trained; the encoder is there because the class has one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from diffusers.optimization import get_cosine_schedule_with_warmup
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm, trange

from benchmarks import cli
from domainstudio import models
from domainstudio.data import ImageSet
from domainstudio.demo.autoencoder import augment
from domainstudio.errors import ConfigError
from domainstudio.models.denoiser import Denoiser
from domainstudio.models.tiny_vae import load_decoder
from domainstudio.project import SOURCE_MODELS
from domainstudio.sampling import default_device
from domainstudio.seeding import generator
from stages.cli import run

LEARNING_RATE, WARMUP = 3e-3, 50
VARIANTS, BATCH = 4, 64


def main() -> None:
    """Distil, write, and measure what was written."""
    parser = cli.parser("tiny_vae", __doc__)
    parser.add_argument("--source", required=True, help="a name in models/sources")
    parser.add_argument("--images", type=Path, required=True, help="the image set to learn from")
    parser.add_argument("--unseen", type=Path, nargs="*", default=[], help="other image sets to measure on")
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    denoiser = models.load(SOURCE_MODELS / arguments.source)
    if denoiser.vae is None:
        raise ConfigError(f"{arguments.source} has no VAE: name a text model")
    denoiser.to(default_device())
    images, started = ImageSet.load(arguments.images).images, time.perf_counter()
    tiny = distil(denoiser, images, arguments.channels, arguments.steps, arguments.batch_size, arguments.seed)
    tiny.save_pretrained(arguments.output, safe_serialization=True)
    sizes = [sum(p.numel() for p in vae.decoder.parameters()) for vae in (denoiser.vae, tiny)]
    record = {"parameters": sizes, "seconds": round(time.perf_counter() - started)}
    for folder in (arguments.images, *arguments.unseen):
        record[str(folder)] = measure(denoiser, arguments.output, ImageSet.load(folder).images)
    print(json.dumps(record, indent=1))


def distil(
    denoiser: Denoiser, images: NDArray[np.uint8], channels: int, steps: int, batch: int, seed: int
) -> AutoencoderTiny:
    """Return a small decoder that makes of latents what the model's VAE makes of them.

    The loss is the mean absolute error to the VAE's images, of `VARIANTS` latents of each given image, varied
    as in the VAE's own training. Half of the latents are blends of two images': x0 predicted from much
    noise is an average of images, too.

    Args:
        denoiser: the model, with a frozen VAE.
        images: uint8, with shape (N, 3, H, W).
        channels: of each of the small decoder's layers.
        steps: optimiser steps.
        batch: images per step.
        seed: of every random draw.
    """
    torch.manual_seed(seed)
    tiny, draw = _new(denoiser, channels), generator(seed)
    latents, truth = _examples(denoiser, images, draw)
    optimizer = torch.optim.AdamW(tiny.decoder.parameters(), lr=LEARNING_RATE)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, WARMUP, steps)
    bar = trange(steps, unit="step", desc="distil")
    for step in bar:
        index = torch.randint(len(latents), (batch,), generator=draw)
        loss = functional.l1_loss(tiny.decode(latents[index]).sample, truth[index])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            bar.set_postfix(error=f"{loss.item():.4f}")
    return tiny.eval()


@torch.no_grad()
def measure(denoiser: Denoiser, folder: Path, images: NDArray[np.uint8]) -> dict[str, float]:
    """Return errors against the whole decoder's images, and that decoder's own against the given ones.

    Errors are mean absolute differences of values in [-1, 1]; `psnr` is in decibels, for that range.

    Args:
        denoiser: the model.
        folder: the small decoder.
        images: uint8, with shape (N, 3, H, W).
    """
    tiny = load_decoder(str(folder), denoiser)
    given = torch.from_numpy(images).float() / 127.5 - 1
    encoded = _batched(lambda part: denoiser.encode(part.to(default_device())), given)
    encoded[:, denoiser.shape[0] :] = 0  # deviations: what is left is the mean latents
    x0 = denoiser.x0(encoded, generator(0))
    whole, small = (_batched(decode, x0).cpu() for decode in (denoiser.decode, tiny))
    error = small - whole
    psnr = 10 * torch.log10(4 / error.square().mean())
    values = {"error": error.abs().mean(), "psnr": psnr, "whole_decoder": (whole - given).abs().mean()}
    return {name: round(float(value), 4) for name, value in values.items()}


def _batched(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    return torch.cat([function(part) for part in torch.split(values, BATCH)])


@torch.no_grad()
def _examples(denoiser: Denoiser, images: NDArray[np.uint8], draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return latents as the UNet sees them, every other one a blend, and the VAE's images of them."""
    order = torch.cat([torch.randperm(len(images), generator=draw) for _ in range(VARIANTS)])
    latents, truth = [], []
    for part in tqdm(torch.split(torch.from_numpy(images)[order], BATCH), unit="batch", desc="encode"):
        encoded = denoiser.encode(augment(part, draw).to(default_device()))
        x0 = denoiser.x0(encoded, draw)
        share = torch.rand(len(x0), 1, 1, 1, generator=draw).to(x0)
        share[::2] = 1
        latents.append(share * x0 + (1 - share) * x0.roll(1, dims=0))
        truth.append(denoiser.decode(latents[-1]))
    return torch.cat(latents), torch.cat(truth)


def _new(denoiser: Denoiser, channels: int) -> AutoencoderTiny:
    levels = (denoiser.resolution[0] // denoiser.shape[1]).bit_length()  # each but one halves the image
    return AutoencoderTiny(
        latent_channels=denoiser.shape[0],
        encoder_block_out_channels=(channels,) * levels,
        num_encoder_blocks=(0,) * levels,
        decoder_block_out_channels=(channels,) * levels,
        num_decoder_blocks=(1,) * levels,
    ).to(default_device())


if __name__ == "__main__":
    run(main)
