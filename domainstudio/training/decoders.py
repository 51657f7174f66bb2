"""How the loss terms on images get colours from latents: the VAE's decoder, or something cheaper."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

from domainstudio.models.linear_decoder import fit
from domainstudio.models.tiny_vae import load_decoder
from domainstudio.seeding import generator
from domainstudio.training.latents import encode_all

if TYPE_CHECKING:
    from torch import Tensor

    from domainstudio.config import LossWeights
    from domainstudio.models.denoiser import Denoiser

    Decoder = Callable[[Tensor], Tensor]

RECOLOURED = 8
"""Copies of each image in other colours, from which the linear map is fitted too."""

MOST = 16
"""Training images of a size that it is fitted to."""

_COLOURS = 30  # sets this draw apart from others of the same seed


def make_decoder(
    denoiser: Denoiser,
    weights: LossWeights,
    shots: Sequence[Tensor],
    prior: Tensor | None = None,
    folder: Path | None = None,
) -> Decoder:
    """Return what turns x0 of a model into the images that the terms compare; gradients flow through it.

    Args:
        denoiser: the model; one of pixels has nothing to decode.
        weights: which decoder.
        shots: the training images of each size, uint8, with shape (N, 3, H, W). A linear map is fitted to
            them as they are, and in other colours.
        prior: images of the source domain, in the same form, which it is fitted to as well.
        folder: where encoded images are kept between runs.

    Raises:
        CheckpointError: the tiny VAE cannot be loaded.
        ConfigError: the tiny VAE decodes other latents.
    """
    if denoiser.vae is None or weights.space == "latent":
        return denoiser.decode
    if weights.decoder == "tiny":
        return load_decoder(weights.tiny_vae or "", denoiser)
    if weights.decoder == "linear":
        few = [each[:MOST] for each in shots]
        parts = [*few, *map(recoloured, few), *([] if prior is None else [prior[: MOST * RECOLOURED]])]
        fitted = fit(pair for part in parts for pair in _pairs(denoiser, part, folder))
        return fitted.to(next(denoiser.network.parameters()).device)
    return one_by_one(denoiser.decode)


def one_by_one(decode: Decoder) -> Decoder:
    """Return a decoder that holds the activations of one image at a time.

    In the backward pass they are computed again (arXiv 1604.06174), for one image after the other.
    """

    def decoded(x0: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x0.requires_grad):
            return torch.cat([decode(each) for each in torch.split(x0, 1)])
        return torch.cat([checkpoint(decode, each, use_reentrant=False) for each in torch.split(x0, 1)])

    return decoded


def recoloured(images: Tensor) -> Tensor:
    """Return copies of uint8 images in other colours: drawings in black alone would say nothing of colours.

    In each copy every channel runs from a level of its own to another one.
    """
    draw = generator(_COLOURS)
    copies = images.repeat(RECOLOURED, 1, 1, 1).float()
    low, high = 255 * torch.rand(2, len(copies), images.shape[1], 1, 1, generator=draw)
    tinted: Tensor = low + (high - low) * copies / 255
    return tinted.round().to(torch.uint8)


def _pairs(denoiser: Denoiser, images: Tensor, folder: Path | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Give mean latents and image, one by one."""
    encoded = encode_all(denoiser, images, False, folder)
    if encoded is None:
        raise ValueError("a model of pixels has nothing to decode")
    for values, image in zip(torch.split(encoded[0], 1), torch.split(images, 1), strict=True):
        mean, deviation = values.chunk(2, dim=1)
        latents = torch.cat([mean, torch.zeros_like(deviation)], dim=1)
        yield denoiser.x0(latents, generator(_COLOURS)), image.float() / 127.5 - 1
