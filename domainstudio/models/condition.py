"""Conditions: what a model gets beside the noisy batch. Their rows are taken, concatenated and moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import torch

if TYPE_CHECKING:
    from torch import Tensor

    Condition: TypeAlias = Mapping[str, Tensor]
    """Tensors by name, each with shape (N, ...); none for a model without conditions. Any model's conditions
    have the same names, so that their rows can be taken and concatenated."""


LENGTHS = "lengths"
"""Name of how many tokens each text has. They stay on the CPU: networks ask for them in every step, and no
step should wait for a GPU to answer."""


def take(condition: Condition, index: Tensor, variant: Tensor) -> dict[str, Tensor]:
    """Return one variant of some rows.

    Args:
        condition: of M images in K variants, with shape (M, K, ...).
        index: the rows, with shape (N,).
        variant: which variant of each row, from 0 to below 1, with shape (N,).

    Returns:
        A condition with shape (N, ...).
    """
    return {name: values[index, (variant * values.shape[1]).long()] for name, values in condition.items()}


def concatenate(first: Condition, second: Condition) -> dict[str, Tensor]:
    """Return the rows of two conditions of one model, one after the other."""
    return {name: torch.cat([first[name], second[name]]) for name in first}


def to_device(condition: Condition, device: torch.device) -> dict[str, Tensor]:
    """Return a condition on a device, but its `LENGTHS`, also those of two models, on the CPU."""
    return {
        name: values.cpu() if name.rpartition(".")[2] == LENGTHS else values.to(device)
        for name, values in condition.items()
    }
