"""The processes that share a training or a stage: which one this is, and what all of them predicted."""

from __future__ import annotations

import atexit
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from accelerate import PartialState
    from torch import Tensor


def this_process() -> PartialState:
    """Return accelerate's state of this process: its rank, its device, how many there are.

    Without an accelerator several processes speak through gloo, which accelerate does only when told.
    """
    from accelerate import PartialState

    state = PartialState(cpu=not torch.accelerator.is_available())
    atexit.unregister(_leave)
    atexit.register(_leave)
    return state


def _leave() -> None:
    """Leave the other processes: one that ends without can be aborted when another has ended before it.

    Only under gloo, where that was seen: with NCCL, leaving can wait for processes that have failed.
    """
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


class _Gather(torch.autograd.Function):
    """All-gather with gradients, so that pairs are formed over the global batch.

    The backward pass sums the processes' equal gradients and DDP averages them: the global loss's own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather_with_gradients(x: Tensor) -> Tensor:
    """Return all processes' rows of a tensor, with shape (N·processes, ...)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    joined: Tensor = _Gather.apply(x)  # type: ignore[no-untyped-call]
    return joined
