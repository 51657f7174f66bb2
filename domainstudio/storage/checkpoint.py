"""Training states, from which a training continues: whole folders of safetensors and JSON, never pickled."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainstudio.errors import CheckpointError
from domainstudio.storage.files import output_folder

if TYPE_CHECKING:
    from torch import Tensor

KEEP = 2
"""States kept per run: the last, and the one before in case the last is damaged."""


def run_key(params: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Return the SHA-256 of everything that decides the result of a run.

    Args:
        params: JSON-like parameters.
        inputs: Content hashes of the inputs by name.
    """
    text = json.dumps({"params": params, "inputs": inputs}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def save(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write a training state, whole or not at all, and delete all but the last `KEEP`.

    Args:
        folder: The run's checkpoint folder.
        step: Finished optimiser steps.
        state: Nested dicts and lists of tensors and JSON values, such as `state_dict()`s.

    Returns:
        The folder of this state.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    tree = _pack(state, tensors, "")
    final = folder / f"step-{step:07d}"
    with output_folder(final, synced=True) as partial:
        save_file(tensors, partial / "state.safetensors")
        content = json.dumps({"format": 1, "step": step, "tree": tree})
        (partial / "state.json").write_text(content, encoding="utf-8")
    for old in sorted(folder.glob("step-*"))[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """Return step and content of a run's newest state that can be read, or `None`.

    A damaged state is skipped with a warning that names it.
    """
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return _read(path)
        except CheckpointError as error:
            warnings.warn(f"{error}; going back to the state before it", stacklevel=2)
    return None


def _read(path: Path) -> tuple[int, dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        content = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(path / "state.safetensors")
        return content["step"], _unpack(content["tree"], tensors)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"training state {path} is damaged ({error})") from error


def _pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Return a JSON tree, and put tensors into `tensors` under their path. Dict keys keep their type."""
    import torch

    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
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
