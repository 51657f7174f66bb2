"""The kernel distance (KID's statistic): unbiased for any number of images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from domainstudio.errors import DataError
from domainstudio.metrics.distances import Float64s, Floats
from domainstudio.metrics.metric import Figure, Measured, Metric, Scores


class KernelDistance(NamedTuple):
    """Mean and standard deviation over subsets."""

    mean: float
    std: float


def cubic_kernel(rows: Float64s) -> Float64s:
    """Return k(x, y) = (x·y/D + 1)³ of all pairs of rows, with shape (N, N)."""
    kernel: Float64s = (rows @ rows.T / rows.shape[1] + 1) ** 3
    return kernel


def squared_mmd(a: Floats, b: Floats) -> float:
    """Return the unbiased estimate of the squared maximum mean discrepancy under the cubic kernel.

    Gretton et al. 2012, lemma 6: the diagonals of k(a, a) and k(b, b) are left out, so its expectation is 0
    for equal distributions, and a single estimate may be negative.

    Args:
        a: Rows with shape (N, D), N ≥ 2.
        b: Rows with shape (M, D), M ≥ 2.
    """
    n, m = len(a), len(b)
    kernel = cubic_kernel(np.concatenate([a, b]).astype(np.float64))
    within_a = (kernel[:n, :n].sum() - np.trace(kernel[:n, :n])) / (n * (n - 1))
    within_b = (kernel[n:, n:].sum() - np.trace(kernel[n:, n:])) / (m * (m - 1))
    return float(within_a + within_b - 2 * kernel[:n, n:].mean())


def kernel_distance(
    a: Floats, b: Floats, subset_size: int = 100, subsets: int = 50, seed: int = 0
) -> KernelDistance:
    """Return mean and standard deviation of `squared_mmd` over random subsets (arXiv 1801.01401).

    Args:
        a: Rows with shape (N, D), N ≥ 2.
        b: Rows with shape (M, D), M ≥ 2.
        subset_size: Rows of each subset, drawn without replacement; at most min(N, M) are used.
        subsets: Number of subsets.
        seed: Seed of the draws.

    Raises:
        DataError: a set has fewer than 2 rows.
    """
    size = min(subset_size, len(a), len(b))
    if size < 2:
        raise DataError(
            f"a kernel distance needs at least 2 images on either side, got {len(a)} and {len(b)}"
        )
    generator = np.random.default_rng(seed)
    values = [
        squared_mmd(
            a[generator.choice(len(a), size, replace=False)], b[generator.choice(len(b), size, replace=False)]
        )
        for _ in range(subsets)
    ]
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def _scores(measured: Measured) -> Scores:
    if measured.fewest < 2:
        return {}
    settings, rows = measured.settings, (measured.images.pooled, measured.reference.pooled)
    distance = kernel_distance(*rows, settings.kid_subset_size, settings.kid_subsets, settings.seed)
    return {"kid": distance.mean, "kid_std": distance.std}


METRIC = Metric(
    _scores,
    (
        Figure(
            "kid",
            "Kernel distance",
            "lower",
            "The same question without the bias of small sets; ± is the spread over random subsets. Around 0 "
            "the two sets cannot be told apart.",
            spread="kid_std",
        ),
    ),
)
