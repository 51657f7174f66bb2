"""Training states, from which a training continues: whole folders of safetensors and JSON, never pickled.

`state.json` holds the SHA-256 of `state.safetensors` and of its own content, and reading verifies both.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainstudio.errors import CheckpointError
from domainstudio.storage.disk import disk_error
from domainstudio.storage.files import output_folder, sha256_of

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

KEEP = 2
"""States kept per run: the last, and the one before in case the last is damaged."""

_DAMAGE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO})
"""What reading a damaged state may end with. Any other refusal is of the disk or mount, not of the state."""

TENSORS, CONTENT = "state.safetensors", "state.json"
"""The files of a state."""


def run_key(params: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Return the SHA-256 of everything that decides the result of a run.

    Args:
        params: JSON-like parameters.
        inputs: Content hashes of the inputs by name.
    """
    text = json.dumps({"params": params, "inputs": inputs}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Packed:
    """A copy of a training state on the CPU.

    Attributes:
        step: Finished optimiser steps.
        tree: Its nested dicts and lists as JSON, with names in the place of tensors.
        tensors: Those tensors, by name.
    """

    step: int
    tree: Any
    tensors: Mapping[str, Tensor]


def pack(step: int, state: Mapping[str, Any]) -> Packed:
    """Copy a training state; what is in `state` may change from then on.

    Args:
        step: Finished optimiser steps.
        state: Nested dicts and lists of tensors and JSON values, such as `state_dict()`s.
    """
    tensors: dict[str, Tensor] = {}
    return Packed(step, _pack(state, tensors, ""), tensors)


def save(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Pack a training state and write it."""
    return write(folder, pack(step, state))


def write(folder: Path, packed: Packed) -> Path:
    """Write a training state, whole or not at all; then delete all but the last `KEEP`.

    A state of a later step is deleted too: it was damaged, or this one would be that step's.

    Args:
        folder: The run's checkpoint folder.
        packed: The state.

    Returns:
        The folder of this state.
    """
    from safetensors.torch import save_file

    content = {"step": packed.step, "tree": packed.tree}
    final = folder / f"step-{packed.step:07d}"
    with output_folder(final, synced=True) as partial:
        save_file(dict(packed.tensors), partial / TENSORS)
        digests = {TENSORS: sha256_of(partial / TENSORS), CONTENT: _digest(content)}
        text = json.dumps({"format": 2, "sha256": digests, **content})
        (partial / CONTENT).write_text(text, encoding="utf-8")
    *older, _ = (path for path in sorted(folder.glob("step-*")) if path.name <= final.name)
    kept = {final, *older[1 - KEEP :]}
    for path in folder.glob("step-*"):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
    return final


def latest(
    folder: Path, check: Callable[[int, Mapping[str, Any]], None] | None = None
) -> tuple[int, dict[str, Any]] | None:
    """Return step and content of a run's newest state that can be used, or `None`.

    A state that is damaged, or does not fit, is skipped with a warning that names it.

    Args:
        folder: The run's checkpoint folder.
        check: Raises `CheckpointError`, with the reason, for step and content that cannot be gone on from.
    """
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            step, state = _read(path)
            if check is not None:
                check(step, state)
        except CheckpointError as error:
            logger.warning(
                "training state %s is damaged (%s); going back to the state before it", path, error
            )
        else:
            return step, state
    return None


def verify(path: Path) -> dict[str, Any]:
    """Return the content of a state's `state.json` once both files have the SHA-256 that it names.

    States of earlier versions name none: of those, the tensors are read without.

    Raises:
        CheckpointError: a file is missing or damaged. The message is the reason alone.
        DiskError: its disk refuses to read it.
    """
    try:
        content: dict[str, Any] = json.loads((path / CONTENT).read_text(encoding="utf-8"))
        if content["format"] != 1 or "sha256" in content:
            found = {TENSORS: sha256_of(path / TENSORS), CONTENT: _digest(content)}
            for name, digest in found.items():
                if content["sha256"][name] != digest:
                    raise ValueError(f"the SHA-256 of {name} is not the one that was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, OSError) and error.errno not in _DAMAGE:  # it may be whole: nothing is given up
            raise disk_error(error, path) from error
        raise CheckpointError(_reason(error)) from error
    return content


def is_whole(path: Path) -> bool:
    """Return whether `verify` finds nothing."""
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def _read(path: Path) -> tuple[int, dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    content = verify(path)
    try:
        step, state = content["step"], _unpack(content["tree"], load_file(path / TENSORS))
        if type(step) is not int or not isinstance(state, dict):
            raise TypeError(f"step {step!r} with a state of type {type(state).__name__}")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(_reason(error)) from error
    return step, state


def _digest(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what a state's JSON says, in one spelling."""
    text = json.dumps([content["step"], content["tree"]])
    return hashlib.sha256(text.encode()).hexdigest()


def _reason(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)


def _pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Return a JSON tree, and put tensors into `tensors` under their path. Dict keys keep their type."""
    import torch

    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"items": [[key, _pack(item, tensors, f"{name}/{key}")] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_pack(item, tensors, f"{name}/{i}") for i, item in enumerate(value)]
    return value


def _unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_unpack(item, tensors) for item in tree]
    if isinstance(tree, dict):
        if "tensor" in tree:
            return tensors[tree["tensor"]]
        return {key: _unpack(item, tensors) for key, item in tree["items"]}
    return tree
