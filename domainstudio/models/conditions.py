"""Rows of conditions: taken, joined and moved, whatever a model is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from domainstudio.models.denoiser import Condition


def take(condition: Condition, index: Tensor, variant: Tensor) -> dict[str, Tensor]:
    """Return the rows `index` of a condition of variants; `variant` in [0, 1) chooses among them."""
    return {name: values[index, (variant * values.shape[1]).long()] for name, values in condition.items()}


def join(first: Condition, second: Condition) -> dict[str, Tensor]:
    """Return the rows of two conditions of one model, one after the other."""
    return {name: torch.cat([first[name], second[name]]) for name in first}


def to_device(condition: Condition, device: torch.device) -> dict[str, Tensor]:
    """Return a condition on a device."""
    return {name: values.to(device) for name, values in condition.items()}
