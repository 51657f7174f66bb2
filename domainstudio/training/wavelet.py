"""The one-level Haar wavelet transform, and the high-frequency part of an image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

_LOW_LOW = ((0.5, 0.5), (0.5, 0.5))
_LOW_HIGH = ((0.5, 0.5), (-0.5, -0.5))
_HIGH_LOW = ((0.5, -0.5), (0.5, -0.5))
_HIGH_HIGH = ((0.5, -0.5), (-0.5, 0.5))
_HIGH_FREQUENCY = ((1.5, -0.5), (-0.5, -0.5))  # LH + HL + HH: the filters are linear, so their sum is one


def haar_dwt(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the orthonormal one-level Haar transform (LL, LH, HL, HH).

    The high-pass filter is (1, -1)/√2, PyWavelets' sign; the first letter is the horizontal filter.

    Args:
        x: images, with shape (N, C, H, W), H and W even.

    Returns:
        Four bands, each with shape (N, C, H/2, W/2). Together they have the energy of `x`.
    """
    bands = tuple(_filter(x, kernel) for kernel in (_LOW_LOW, _LOW_HIGH, _HIGH_LOW, _HIGH_HIGH))
    return bands[0], bands[1], bands[2], bands[3]


def high_frequency(x: Tensor) -> Tensor:
    """Return hf(x) = LH(x) + HL(x) + HH(x) (DomainStudio, arXiv 2306.14153, section 4.2).

    The released code uses the high-pass filter (-1, 1)/√2, whose sum of bands is this one of the image
    turned by 180 degrees; both keep the same details.

    Args:
        x: images, with shape (N, C, H, W), H and W even.

    Returns:
        The summed detail bands, with shape (N, C, H/2, W/2), in the type of `x`.

    Raises:
        ValueError: the shape does not fit.
    """
    return _filter(x, _HIGH_FREQUENCY)


def _filter(x: Tensor, kernel: tuple[tuple[float, float], tuple[float, float]]) -> Tensor:
    if x.ndim != 4 or x.shape[-1] % 2 or x.shape[-2] % 2:
        raise ValueError(f"expected shape (N, C, H, W) with even H and W, got {tuple(x.shape)}")
    channels = x.shape[1]
    weight = x.new_tensor(kernel).expand(channels, 1, 2, 2)
    with torch.autocast(x.device.type, enabled=False):
        return F.conv2d(x, weight, stride=2, groups=channels)
