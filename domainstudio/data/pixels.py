"""Files of pixels that may be larger than the memory: written and hashed by blocks, and mapped when read."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

Pixels = NDArray[np.uint8]

BLOCK = 64 * 2**20
"""Bytes that are in memory at a time."""


def blocks(array: Pixels) -> Iterator[memoryview]:
    """Yield the bytes of an array row by row, in blocks. Pages of a file mapped to be read are given back."""
    rows = max(1, BLOCK // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        yield np.ascontiguousarray(array[start : start + rows]).data.cast("B")
        _forget(array)


def map_rows(path: Path, row: tuple[int, ...], number: int) -> Pixels:
    """Return a file of `number` arrays of the shape `row`, one after the other, mapped to be read."""
    return np.memmap(path, np.uint8, "r", shape=(number, *row)).view(np.ndarray)


def write_pixels(path: Path, arrays: Mapping[str, Pixels]) -> None:
    """Write arrays by name as a safetensors file, byte for byte as safetensors itself would."""
    header, end = {}, 0
    for name, array in sorted(arrays.items()):
        offsets = [end, end := end + array.nbytes]
        header[name] = {"dtype": "U8", "shape": list(array.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in sorted(arrays.items()):
            for block in blocks(array):
                file.write(block)


def map_pixels(path: Path, mode: Literal["r", "c"] = "c") -> dict[str, Pixels]:
    """Map a safetensors file of bytes: nothing is read before it is looked at, and the file never changes.

    Args:
        path: the file.
        mode: `c` arrays can be changed, in memory alone; the pages of `r` arrays can be given back.

    Raises:
        OSError: the file cannot be read.
        SafetensorError: it is damaged.
        ValueError: an array is of another type.
    """
    with safe_open(path, framework="numpy"):  # checks the header against the file's length
        pass
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    content = np.memmap(path, np.uint8, mode).view(np.ndarray)[8 + length :]
    return {name: _mapped(content, **entry) for name, entry in header.items()}


def _mapped(content: Pixels, dtype: str, shape: list[int], data_offsets: list[int]) -> Pixels:
    if dtype != "U8":
        raise ValueError(f"expected uint8 pixels, got {dtype}")
    return content[slice(*data_offsets)].reshape(shape)


def _forget(array: Pixels) -> None:
    """Give the pages of a mapped file back to the system, which may read them again."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and not array.flags.writeable:
        base.madvise(mmap.MADV_DONTNEED)
