"""One model whose weights lie between those of a source model and of the model adapted from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from domainstudio.errors import CheckpointError
from domainstudio.models import lora
from domainstudio.models.schedule import at_least_float32

if TYPE_CHECKING:
    from torch import Tensor

    from domainstudio.models.denoiser import Denoiser

_UNLIKE = "the weights of the source and the adapted model cannot be interpolated"


def interpolate(source: Denoiser, adapted: Denoiser, weight: float) -> None:
    """Make the adapted model's weights (1 - weight)·source + weight·adapted, in place.

    Of adapters, B alone is scaled: W + (alpha / rank)·(weight·B)·A is that mix of the weights.

    Args:
        source: the source model.
        adapted: the model to change.
        weight: from 0, the source model, to 1, the adapted one; both are exact.

    Raises:
        CheckpointError: the models' weights differ in name or shape.
    """
    with torch.no_grad():
        if adapted.adapters is not None:
            for part in lora.parts_of(adapted.network).items():
                for key, parameter in lora.weights_of(*part).items():
                    if ".lora_B." in key:
                        parameter.mul_(weight)
            return
        for tables in _tables(source, adapted):
            tables.interpolate(weight)


def _tables(source: Denoiser, adapted: Denoiser) -> list[_Tables]:
    first, second = (dict(each.network.named_parameters()) for each in (source, adapted))
    if differing := sorted(first.keys() ^ second.keys()):
        raise CheckpointError(
            f"{_UNLIKE}: {len(differing)} are in one of them only, such as {differing[0]}. Set combine to "
            "another mode, such as switch"
        )
    tables = [_Tables(name, values, second[name]) for name, values in first.items()]
    for each in tables:
        if not each.fit:
            raise CheckpointError(
                f"{_UNLIKE}: {each.name} has shape {tuple(each.source.shape)} and "
                f"{tuple(each.adapted.shape)}. Name the source model that was adapted"
            )
    return tables


@dataclass(frozen=True)
class _Tables:
    """Weights of two networks under one name."""

    name: str
    source: Tensor
    adapted: Tensor

    @property
    def fit(self) -> bool:
        """Whether they are of one shape, or the adapted model has further rows, which are new tokens."""
        same = self.source.shape[1:] == self.adapted.shape[1:] and self.source.ndim == self.adapted.ndim
        return same and (not self.source.ndim or len(self.source) <= len(self.adapted))

    def interpolate(self, weight: float) -> None:
        """Change the adapted model's values in place; rows that the source model lacks stay as they are."""
        known = self.adapted[: len(self.source)] if self.source.ndim else self.adapted
        source = self.source.to(known.device)
        known.copy_(torch.lerp(at_least_float32(source), at_least_float32(known), weight))
