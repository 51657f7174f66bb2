"""A linear probe that tells the target domain from the source domain, from a few images of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Float64s = NDArray[np.float64]

SHRINKAGE = 0.5
"""Weight of the identity in the covariance: images are far fewer than features."""

FOLDS = 5


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear discriminant (Fisher 1936) with a shrunk covariance.

    score(x) = (x − (μ_t + μ_s)/2)·w / ((μ_t − μ_s)·w), with w = ((1 − γ)Σ + γ tr(Σ)/D · I)⁻¹ (μ_t − μ_s).
    The target's mean scores ½, the source's −½.

    Attributes:
        middle: (μ_t + μ_s)/2, with shape (D,).
        direction: w, so scaled that scores are as above, with shape (D,).
        threshold: From this score on an image is in the domain.
        accuracy: Mean of the shares of target and source images that cross-validation put on their side.
    """

    middle: Float64s
    direction: Float64s
    threshold: float = 0.0
    accuracy: float = 1.0

    @classmethod
    def fit(cls, target: Floats, source: Floats) -> Self:
        """Fit a probe, its threshold in the middle between both domains' held-out mean scores.

        A few images lie nearer to a mean that was made from them than further images of their domain do.
        Held-out scores are free of that.

        Args:
            target: Rows with shape (N, D), N ≥ 2.
            source: Rows with shape (M, D), M ≥ 2.
        """
        held_out = [_held_out(target, source), -_held_out(source, target)]
        threshold = float(np.mean([scores.mean() for scores in held_out]))
        right = (held_out[0] >= threshold).mean(), (held_out[1] < threshold).mean()
        middle, direction = _discriminant(target, source)
        return cls(middle, direction, threshold, float(np.mean(right)))

    def inside(self, rows: Floats) -> NDArray[np.bool_]:
        """Return whether each row is in the target domain, with shape (N,)."""
        inside: NDArray[np.bool_] = _scores(rows, self.middle, self.direction) >= self.threshold
        return inside


def _held_out(own: Floats, other: Floats) -> Float64s:
    """Return the scores of one domain's rows by probes that were fitted without them; own ones score ½."""
    scores = np.empty(len(own))
    for fold in range(min(FOLDS, len(own))):
        out = np.arange(len(own)) % FOLDS == fold
        scores[out] = _scores(own[out], *_discriminant(own[~out], other))
    return scores


def _scores(rows: Floats, middle: Float64s, direction: Float64s) -> Float64s:
    scores: Float64s = (rows - middle) @ direction
    return scores


def _discriminant(target: Floats, source: Floats) -> tuple[Float64s, Float64s]:
    """Return middle and direction.

    With centred rows X and N of them, Σ = XᵀX/N. By the Woodbury identity the system has N unknowns, not D.
    """
    means = target.mean(axis=0, dtype=np.float64), source.mean(axis=0, dtype=np.float64)
    gap, middle = means[0] - means[1], (means[0] + means[1]) / 2
    rows = np.concatenate([target - means[0], source - means[1]]).astype(np.float64)
    rows *= np.sqrt((1 - SHRINKAGE) / len(rows))
    ridge = max(SHRINKAGE / (1 - SHRINKAGE) * float((rows**2).sum()) / rows.shape[1], 1e-12)
    inner = rows @ rows.T + ridge * np.eye(len(rows))
    direction = gap - rows.T @ np.linalg.solve(inner, rows @ gap)
    scale = float(gap @ direction)
    return middle, direction / scale if scale > 0 else np.zeros_like(direction)
