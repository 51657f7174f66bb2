"""Modules that training does not need: they leave the device, and come back while they are called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn


def rest(modules: Iterable[nn.Module], place: str = "cpu") -> None:
    """Move modules away; a call moves one to the device of its first tensor, and back.

    Args:
        modules: such as text encoders, whose embeddings of the training's prompts are kept.
        place: where they rest.
    """

    def come(module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        first = next(value for value in (*inputs, *named.values()) if isinstance(value, Tensor))
        module.to(first.device)

    def leave(module: nn.Module, *_: Any) -> None:
        module.to(place)

    for module in modules:
        module.to(place)
        module.register_forward_pre_hook(come, with_kwargs=True)
        module.register_forward_hook(leave, always_call=True)
