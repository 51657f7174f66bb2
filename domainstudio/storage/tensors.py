"""Files of tensors that can be made again: safetensors with a digest of their content, verified when read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from domainstudio.storage.files import output_file

if TYPE_CHECKING:
    from torch import Tensor

_DIGEST = "sha256"


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name, whole or not at all. Several processes may write the same at once."""
    from safetensors.torch import save_file

    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with output_file(path) as partial:
        save_file(kept, partial, metadata={_DIGEST: _digest(kept)})


def load_tensors(path: Path, *, unmarked: bool = False) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote.

    Args:
        path: The file.
        unmarked: Read a file without a digest too, which an earlier version wrote.

    Raises:
        OSError: it is not there, or cannot be read.
        ValueError: it is damaged. The message is the reason alone.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    marked = metadata is not None or not unmarked  # where only the digest is gone, that is damage too
    if marked and (metadata or {}).get(_DIGEST) != _digest(tensors):
        raise ValueError("its SHA-256 is not the one that was written")
    return tensors


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's values as they lie in memory, row by row; not copied if they do so already."""
    import torch

    values: memoryview = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return values


def _digest(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(bytes_of(tensor))
    return total.hexdigest()
