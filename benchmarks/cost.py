"""Counts floating-point operations and memory, part by part, of whatever runs: on real tensors or fake ones.

On fake tensors (`torch._subclasses.fake_tensor`), which have shapes and types but no values, a step of the
largest model is counted in seconds, without its weights and without a GPU.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

P = ParamSpec("P")
R = TypeVar("R")
aten = torch.ops.aten

SETUP = "setup"
"""The part of what is there before a step: weights and the optimiser's state."""


class Cost(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts all operations while it is entered.

    Operations are torch's own count (`torch.utils.flop_counter`): matrix products and convolutions, a
    multiplication and an addition each. Memory is the sum of the live tensors' storages. An allocator's
    rounding, kernels' workspaces and a GPU's context come on top.

    Attributes:
        operations: by part.
        peak: the largest memory in bytes since `restart`.
        held: what was live at that peak, in bytes by the part that made it.
        peak_part: what ran at that peak.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._part = SETUP
        self._live: dict[int, weakref.ref[Any]] = {}
        self._memory: Counter[str] = Counter()
        self._total = 0
        self.restart()

    def restart(self) -> None:
        """Count operations and the peak anew. What is live stays known."""
        self.operations: Counter[str] = Counter()
        self.held: Counter[str] = Counter()
        self.peak, self.peak_part = 0, SETUP
        self._look()

    def enter(self, part: str) -> None:
        """Count what follows for this part."""
        self._part = part

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs inside for this part."""
        before, self._part = self._part, name
        yield
        self._part = before

    def counted(self, name: str, function: Callable[P, R]) -> Callable[P, R]:
        """Return a function whose operations count for this part."""

        def inside(*args: P.args, **options: P.kwargs) -> R:
            with self.part(name):
                return function(*args, **options)

        return inside

    def hold(self, values: Any) -> None:
        """Count the memory of tensors that were there before."""
        for value in tree_leaves(values):
            if isinstance(value, Tensor):
                self._hold(value)
        self._look()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and not _has_value(args[0]):
            return 1.0  # a number that is logged, or an optimiser's step
        result = func(*args, **kwargs)
        count = _FORMULAS.get(func._overloadpacket)
        if count is not None:
            self.operations[self._part] += count(*args, **kwargs, out_val=result)
        self.hold(result)
        return result

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size, part = storage._cdata, storage.nbytes(), self._part
        if key in self._live:
            return

        def release(_: weakref.ref[Any]) -> None:
            del self._live[key]
            self._memory[part] -= size
            self._total -= size

        self._live[key] = weakref.ref(storage, release)
        self._memory[part] += size
        self._total += size

    def _look(self) -> None:
        if self._total > self.peak:
            self.peak, self.peak_part, self.held = self._total, self._part, Counter(self._memory)


class GpuAutocast(TorchFunctionMode):
    """Lets autocast on a CPU keep in float32 what it keeps in float32 on a GPU: norms and softmax."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, of inputs in float32 where a GPU would cast them."""
        kwargs = kwargs or {}
        if func in _FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, _in_float32, (args, kwargs))
        return func(*args, **kwargs)


_FLOAT32 = {torch.group_norm, torch.layer_norm, torch.softmax, Tensor.softmax}


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _has_value(tensor: Tensor) -> bool:
    return not isinstance(tensor, FakeTensor)


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, out_val: Any, **options: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


def _attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, out_val: Any, **options: Any
) -> int:
    shapes = (gradient.shape, query.shape, key.shape, value.shape)
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # torch's own table knows attention on a GPU only
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
