"""The kernel distance (KID's statistic): unbiased for any number of images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from domainstudio.errors import DataError
from domainstudio.metrics.distances import Float64s, Floats
from domainstudio.metrics.metric import Figure, Indices, Measured, Metric, Scores, Statistic, undefined

BLOCK = 1000
"""Rows of the reference whose kernels are in memory together."""


def cubic_kernel(a: Floats, b: Floats) -> Float64s:
    """Return k(x, y) = (x·y/D + 1)³ of all pairs.

    Args:
        a: Rows with shape (N, D).
        b: Rows with shape (M, D).

    Returns:
        float64 with shape (N, M).
    """
    kernel = a.astype(np.float64) @ b.astype(np.float64).T
    kernel /= a.shape[1]
    kernel += 1
    cubed: Float64s = kernel * kernel * kernel
    return cubed


def squared_mmd(a: Floats, b: Floats) -> float:
    """Return the unbiased estimate of the squared maximum mean discrepancy under the cubic kernel.

    Gretton et al. 2012, lemma 6: the diagonals of k(a, a) and k(b, b) are left out, so its expectation is 0
    for equal distributions, and a single estimate may be negative. With the cubic kernel it is KID
    (Bińkowski et al., arXiv 1801.01401). Departure from their code: it compares all images at once instead of
    averaging over random subsets, which has the same expectation and less noise.

    Args:
        a: Rows with shape (N, D), N ≥ 2.
        b: Rows with shape (M, D), M ≥ 2.

    Raises:
        DataError: a set has fewer than 2 rows.
    """
    if min(len(a), len(b)) < 2:
        raise DataError(
            f"a kernel distance needs at least 2 images on either side, got {len(a)} and {len(b)}"
        )
    return KernelSums.of(a, b, mean_within(b)).distance(np.arange(len(a)))


def mean_within(rows: Floats) -> float:
    """Return the mean kernel of all pairs of different rows, in bounded memory.

    Args:
        rows: Rows with shape (N, D), N ≥ 2.
    """
    total = 0.0
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        kernel = cubic_kernel(block, block)
        total += float(kernel.sum() - np.trace(kernel))
        if len(later := rows[start + BLOCK :]):
            total += 2 * float(cubic_kernel(block, later).sum())
    return total / (len(rows) * (len(rows) - 1))


@dataclass(frozen=True, eq=False)
class KernelSums:
    """What the distance of any of the samples is made of.

    Attributes:
        within: Kernels of the samples, with 0 on the diagonal; shape (N, N).
        across: Mean kernel of each sample and the reference, with shape (N,).
        reference: Mean kernel of the reference's pairs.
    """

    within: Float64s
    across: Float64s
    reference: float

    @classmethod
    def of(cls, samples: Floats, reference: Floats, reference_mean: float) -> KernelSums:
        """Compute the kernels of samples with shape (N, D) and a reference with shape (M, D)."""
        within = cubic_kernel(samples, samples)
        np.fill_diagonal(within, 0)
        return cls(within, cubic_kernel(samples, reference).mean(axis=1), reference_mean)

    def distance(self, chosen: Indices) -> float:
        """Return `squared_mmd` of the samples at `chosen`, at least 2."""
        pairs = len(chosen) * (len(chosen) - 1)
        within = float(self.within[np.ix_(chosen, chosen)].sum()) / pairs
        return within + self.reference - 2 * float(self.across[chosen].mean())


def _reference(measured: Measured) -> float:
    return mean_within(measured.reference.pooled)


def _prepare(measured: Measured) -> Statistic:
    if measured.fewest < 2:
        return undefined
    rows = measured.images.pooled, measured.reference.pooled
    sums = KernelSums.of(*rows, measured.once(_reference))

    def scores(chosen: Indices) -> Scores:
        return {"kid": sums.distance(chosen)}

    return scores


METRIC = Metric(
    _prepare,
    (
        Figure(
            "kid",
            "Kernel distance",
            "lower",
            "The same question by KID, which is unbiased for any number of images. Around 0 the two sets "
            "cannot be told apart.",
        ),
    ),
)
