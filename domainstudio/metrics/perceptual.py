"""The embedding behind perceptual distances: unit-normalised activations of several layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 1e-10
"""Added to the norm over channels, as LPIPS's released code does."""


def perceptual_rows(activations: Sequence[Tensor], largest_side: int) -> Tensor:
    """Return rows whose squared Euclidean distance is a perceptual distance of the images.

    LPIPS's construction (arXiv 1801.03924, eq. 1) with all weights 1: with ŷ the activations of layer l,
    unit-normalised over channels at each of H_l × W_l positions,

        d(a, b) = Σ_l 1/(H_l W_l) Σ_hw ‖ŷ_a,hw − ŷ_b,hw‖².

    Each ŷ is divided by sqrt(H_l W_l), flattened and concatenated, so d is the squared Euclidean distance
    of two rows, and features are computed once per image instead of once per pair. Without LPIPS's learned
    weights and its network, d is not LPIPS.

    Departure from the paper: layers with more than `largest_side` positions a side are halved by average
    pooling until they fit, before they are normalised. This keeps rows short and makes the fine layers
    tolerant of shifts by a few pixels.

    Args:
        activations: One tensor per layer, each with shape (B, C_l, H_l, W_l).
        largest_side: Positions a side that are kept, at least 1.

    Returns:
        A tensor with shape (B, Σ_l C_l H_l W_l) whose rows have squared norm of the number of layers.
    """
    import torch
    from torch.nn import functional

    rows = []
    for layer in activations:
        while max(layer.shape[-2:]) > largest_side:
            layer = functional.avg_pool2d(layer, 2, ceil_mode=True)
        unit = layer / (layer.square().sum(dim=1, keepdim=True).sqrt() + EPSILON)
        rows.append(unit.flatten(1) / (layer.shape[-2] * layer.shape[-1]) ** 0.5)
    return torch.cat(rows, dim=1)
