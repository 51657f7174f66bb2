"""A linear map of latents to colours for the loss terms, in place of a VAE's decoder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from domainstudio.models.schedule import at_least_float32

if TYPE_CHECKING:
    from torch import Tensor

KERNEL = 3
"""Latents along a side that decide the pixels of the middle one."""

_RIDGE = 1e-6  # of the features' mean square: keeps the solution finite where latents never vary


@dataclass(frozen=True)
class LinearDecoder:
    """Images of latents by one convolution: each latent and its neighbours give a square of pixels.

    Attributes:
        weight: with shape (3·F², C, `KERNEL`, `KERNEL`), of a VAE that divides the sides by F.
        bias: with shape (3·F²,).
        factor: F.
    """

    weight: Tensor
    bias: Tensor
    factor: int

    def __call__(self, x0: Tensor) -> Tensor:
        """Return images in about [-1, 1], with shape (N, 3, F·H, F·W), of latents (N, C, H, W)."""
        x0 = at_least_float32(x0)
        values = functional.conv2d(x0, self.weight.to(x0), self.bias.to(x0), padding=KERNEL // 2)
        return functional.pixel_shuffle(values, self.factor)

    def to(self, device: torch.device | str) -> LinearDecoder:
        """Return it on a device."""
        return LinearDecoder(self.weight.to(device), self.bias.to(device), self.factor)


def fit(pairs: Iterable[tuple[Tensor, Tensor]]) -> LinearDecoder:
    """Return the map with the least squared error to given images, by the normal equations in float64.

    Args:
        pairs: latents as the network sees them, with shape (N, C, H, W), and their images in [-1, 1], with
            shape (N, 3, F·H, F·W).
    """
    moments: list[Tensor] = []
    channels = factor = 0
    for x0, images in pairs:
        channels, factor = x0.shape[1], images.shape[2] // x0.shape[2]
        features = _rows(functional.unfold(x0.double(), KERNEL, padding=KERNEL // 2))
        features = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
        colours = _rows(functional.pixel_unshuffle(images.double(), factor).flatten(2))
        found = [features.T @ features, features.T @ colours]
        moments = [sum_ + each for sum_, each in zip(moments, found, strict=True)] if moments else found
    square, mixed = moments
    ridge = (
        _RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype, device=square.device)
    )
    solution = torch.linalg.solve(square + ridge, mixed).float().T  # (3·F², C·KERNEL² + 1)
    weight = solution[:, :-1].reshape(-1, channels, KERNEL, KERNEL).contiguous()
    return LinearDecoder(weight, solution[:, -1].contiguous(), factor)


def _rows(values: Tensor) -> Tensor:
    """Return values (N, K, L) as rows (N·L, K)."""
    return values.transpose(1, 2).flatten(0, 1)
