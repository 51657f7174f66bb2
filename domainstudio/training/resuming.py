"""What of a training its states hold, and whether a state fits the training that would go on from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from domainstudio.distributed import this_process
from domainstudio.errors import CheckpointError, TrainingError

_MOMENTS = ({"exp_avg", "exp_avg_sq"}, {"state1", "state2"})
"""AdamW's names of its moments, and those of its 8-bit form."""

_WHOLE, _NUMBER = "a whole number", "a number"


def states_of(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `state_dict` of each part; of a dictionary, itself."""
    return {name: part if isinstance(part, Mapping) else part.state_dict() for name, part in parts.items()}


def check_fits(state: Mapping[str, Any], parts: Mapping[str, Any], apart: Set[str] = frozenset()) -> None:
    """Compare a state with the parts that would be set to it, without a change of them.

    Args:
        state: What `state_dict` of each part returned once, by the part's name.
        parts: Modules, optimisers and whatever else has a `state_dict`; or such a dictionary.
        apart: What else the state must hold, whatever it is.

    Raises:
        CheckpointError: a part or an entry is missing or unknown, or has another shape or type. The message
            is the reason alone.
    """
    if differing := sorted(map(str, state.keys() ^ {*parts, *apart})):
        raise CheckpointError(f"{differing[0]} is missing or unknown")
    for name, part in parts.items():
        if isinstance(part, torch.optim.Optimizer):
            _check_optimizer(state[name], part, name)
        else:
            _check(state[name], states_of({name: part})[name], name)


def check_history(history: Any, step: int) -> None:
    """Check that a history holds one record for each step up to the last.

    Raises:
        CheckpointError: it does not. The message is the reason alone.
    """
    try:
        steps = [record["step"] for record in history]
        if len(steps) == step and steps == list(range(1, step + 1)):
            _check(history, [dict.fromkeys(record, 0.0) for record in history], "history")
            return
    except (TypeError, KeyError, AttributeError):
        pass
    raise CheckpointError(f"its history is not that of {step} steps")


def check_agreement(step: int) -> None:
    """Check that all processes go on from the same step. All of them must take part.

    Raises:
        TrainingError: they read different states.
    """
    if this_process().num_processes > 1 and len(steps := set(gather_object([step]))) > 1:
        raise TrainingError(
            f"the processes of this training would go on from the steps {sorted(steps)}: all must see "
            "the same folder .checkpoints, with the same states"
        )


def _check(found: Any, expected: Any, place: str) -> None:
    """Compare nested dicts and lists: their keys, lengths, tensors' shapes and types, values' types."""
    if isinstance(expected, Mapping):
        entries = found.keys() if isinstance(found, Mapping) else ()
        if differing := sorted(map(str, expected.keys() ^ entries)):
            raise CheckpointError(f"{place}: {differing[0]} is missing or unknown")
        for key, value in expected.items():
            _check(found[key], value, f"{place}.{key}")
    elif isinstance(expected, list | tuple):
        number = len(found) if isinstance(found, list | tuple) else None
        if number != len(expected):
            raise CheckpointError(f"{place} has {number} entries, expected {len(expected)}")
        for index, value in enumerate(expected):
            _check(found[index], value, f"{place}.{index}")
    elif None not in (found, expected):
        one, other = _form(found), _form(expected)
        if one != other and (one, other) != (_WHOLE, _NUMBER):
            raise CheckpointError(f"{place} is {one}, expected {other}")


def _form(value: Any) -> str:
    """Return what a value must have in common with another to take its place."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _WHOLE if isinstance(value, int) else _NUMBER
    return type(value).__name__


def _check_optimizer(found: Any, optimizer: torch.optim.Optimizer, place: str) -> None:
    expected = optimizer.state_dict()
    moments = found.get("state") if isinstance(found, Mapping) else None
    if not isinstance(moments, Mapping):
        raise CheckpointError(f"{place} has no state")
    _check({**found, "state": {}}, {**expected, "state": {}}, place)  # before the first step it is empty
    parameters: Sequence[Tensor] = [each for group in optimizer.param_groups for each in group["params"]]
    for index, each in moments.items():
        if type(index) is not int or not 0 <= index < len(parameters) or not isinstance(each, Mapping):
            raise CheckpointError(f"{place}: there is no parameter {index!r}")
        names = next((names for names in _MOMENTS if names <= each.keys()), set())
        shapes = [getattr(each[name], "shape", None) for name in names]
        if "step" not in each or not shapes or any(shape != parameters[index].shape for shape in shapes):
            raise CheckpointError(f"{place}: the moments of parameter {index} do not fit it")
