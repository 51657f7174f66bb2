"""Squared Euclidean distances between rows of features, in float64 and in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Float64s = NDArray[np.float64]

BLOCK_BYTES = 64 * 2**20
"""Memory of one block of distances."""

ROUNDING = 1e-12
"""‖a‖² + ‖b‖² − 2a·b of equal float32 rows leaves about 1e-14 of the squared norms: below this share of
them a distance is 0, so that exact copies have distance 0."""


def squared_distance_blocks(
    a: Floats, b: Floats, block_bytes: int = BLOCK_BYTES
) -> Iterator[tuple[slice, Float64s]]:
    """Yield blocks of rows of the matrix ‖a_i − b_j‖².

    Args:
        a: Rows with shape (N, D).
        b: Rows with shape (M, D).
        block_bytes: Upper bound of a block's memory, as long as it has more than one row.

    Yields:
        The slice of `a` and its squared distances to all of `b`, float64 with shape (rows, M).
    """
    right = b.astype(np.float64)
    right_norms = np.einsum("ij,ij->i", right, right)
    rows = max(1, block_bytes // (8 * max(1, len(b), a.shape[1])))
    for start in range(0, len(a), rows):
        block = slice(start, min(start + rows, len(a)))
        left = a[block].astype(np.float64)
        norms = np.einsum("ij,ij->i", left, left)[:, None] + right_norms
        squared = norms - 2 * (left @ right.T)
        squared[squared < ROUNDING * norms] = 0
        yield block, squared


def nearest(a: Floats, b: Floats) -> tuple[NDArray[np.intp], Float64s]:
    """Return, for each row of `a`, the index of the nearest row of `b` and the squared distance.

    Of equally near rows the first counts.

    Args:
        a: Rows with shape (N, D).
        b: Rows with shape (M, D), M ≥ 1.

    Returns:
        Indices into `b` and squared distances, both with shape (N,).
    """
    indices = np.empty(len(a), dtype=np.intp)
    distances = np.empty(len(a))
    for block, squared in squared_distance_blocks(a, b):
        indices[block] = squared.argmin(axis=1)
        distances[block] = squared.min(axis=1)
    return indices, distances
