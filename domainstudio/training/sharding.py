"""Weights that FSDP spreads over processes: whole in checkpoints, pictures and models, in shards to train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor, distribute_tensor

from domainstudio.errors import TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor
    from torch.optim import Optimizer


def is_sharded(accelerator: Accelerator) -> bool:
    """Tell whether accelerate's configuration spreads weights over processes.

    Raises:
        TrainingError: it asks for a way that this loop does not know.
    """
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise TrainingError("launch.accelerate_config asks for FSDP 1: set fsdp_version: 2 in that file")
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise TrainingError(
            f"launch.accelerate_config asks for {kind.value}: choose MULTI_GPU, or FSDP with fsdp_version: 2"
        )
    return bool(kind == DistributedType.FSDP)


def whole(value: Any) -> Any:
    """Return nested dicts and lists with every sharded tensor whole. All processes must take part."""
    if isinstance(value, DTensor):
        return value.full_tensor().detach()
    if isinstance(value, Mapping):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [whole(item) for item in value]
    return value


def sharded_like(value: Any, parameter: Tensor) -> Any:
    """Return a whole tensor spread as a parameter is; anything that is none of its size stays as it is."""
    if not isinstance(parameter, DTensor) or getattr(value, "shape", None) != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def sharded_moments(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return a whole state of an optimiser, spread as its parameters are."""
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    moments = {
        index: {name: sharded_like(value, parameters[index]) for name, value in each.items()}
        for index, each in state["state"].items()
    }
    return {**state, "state": moments}
