"""Candidates: weights along a training, one of which becomes the model. Of adapters they hold these alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from domainstudio.errors import CheckpointError
from domainstudio.storage.files import sha256_of, write_text
from domainstudio.storage.tensors import load_tensors, save_tensors

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "candidates"
"""Below a run's folder of training states."""

WEIGHTS, DIGEST = ".safetensors", ".sha256"


def save(folder: Path, step: int, weights: Mapping[str, Tensor]) -> Path:
    """Write the weights after `step` optimiser steps, whole or not at all.

    Args:
        folder: The run's checkpoint folder.
        step: Finished optimiser steps.
        weights: The trained parameters by name.

    Returns:
        The file.
    """
    path = folder / FOLDER / f"step-{step:07d}{WEIGHTS}"
    path.with_suffix(DIGEST).unlink(missing_ok=True)
    save_tensors(path, weights)
    return path


def listed(folder: Path) -> dict[int, Path]:
    """Return the file of each candidate of a run by its step, in order, of deleted ones too."""
    found = ((re.fullmatch(r"step-(\d+)", path.stem), path) for path in (folder / FOLDER).glob("step-*"))
    return dict(sorted((int(match[1]), path.with_suffix(WEIGHTS)) for match, path in found if match))


def digest(path: Path) -> str:
    """Return the SHA-256 of a candidate's file, also of one that `delete` has deleted.

    Raises:
        CheckpointError: it was never there.
    """
    try:
        return path.with_suffix(DIGEST).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        try:
            return sha256_of(path)
        except FileNotFoundError as error:
            raise _unreadable(path, error) from error


def delete(path: Path) -> None:
    """Delete a candidate's weights. What was measured of it still counts: its hash stays."""
    if path.is_file():
        write_text(path.with_suffix(DIGEST), sha256_of(path) + "\n")
        path.unlink()


def read(path: Path) -> dict[str, Tensor]:
    """Return a candidate's weights by name.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return load_tensors(path, unmarked=True)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    deleted = path.with_suffix(DIGEST).is_file()
    why = "it was deleted (choose.keep: false)" if deleted else str(error)
    return CheckpointError(
        f"the candidate {path} cannot be read: {why}. Delete the folder {path.parents[1]} and train again"
    )
