"""What a candidate's samples are measured by, with the training images and the source's samples alone.

Every figure is computed from matrices of kernel values and distances, so that a resample of the samples is a
row of counts. Candidates are drawn from the same noise, and their resamples take the same seeds: what two
candidates share in luck cancels in their difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from domainstudio.errors import DataError
from domainstudio.metrics.distances import Float64s, Floats, nearest, squared_distance_blocks
from domainstudio.metrics.features import Features
from domainstudio.metrics.in_domain import DomainProbe

MIN_SHOTS = 3
"""Training images that a choice needs: one to be near, one to be far, and one for the probe."""

RESAMPLES = 200
"""Resamples behind every interval."""


@dataclass(frozen=True, eq=False)
class Curve:
    """The figures of one candidate: of its samples first, then of each resample; all with shape (1 + R,).

    Attributes:
        fidelity: Share of the way from the source model to the domain, (d_source − d) / d_source, with d the
            maximum mean discrepancy to the training images: √KID, 0 where KID is negative. It is a distance,
            so samples of which the share p is real and the rest is the source's are p of the way. All 0 where
            the source's samples cannot be told from the training images.
        diversity: Intra distance of the samples in the domain, as a share of the mean distance between
            training images. Copies give 0; real images about 0.75, as those of one group are nearer than any
            two images. NaN where no two samples in the domain have the same nearest training image.
        copies: Share of the samples that are copies of a training image.
        in_domain: Share of the samples that the probe puts into the domain.
    """

    fidelity: Float64s
    diversity: Float64s
    copies: Float64s
    in_domain: Float64s


@dataclass(frozen=True, eq=False)
class Yardstick:
    """What candidates are measured against.

    Attributes:
        shots: Features of the N training images.
        source: Features of the source model's samples, from the candidates' noise.
        mirrored: Features of the training images mirrored, where mirrored copies count too.
        copy_distance: Share of the distance between training images below which a sample is a copy
            (`choose.copy_distance`).
        seed: Seed of the resamples.
        garbage: Features of images in no domain (`metrics.garbage`), such as a diverged training draws.

    Raises:
        DataError: there are fewer than `MIN_SHOTS` training images.
    """

    shots: Features
    source: Features
    mirrored: Features | None
    copy_distance: float
    seed: int = 0
    garbage: Features | None = None

    def __post_init__(self) -> None:
        if len(self.shots) < MIN_SHOTS:
            raise DataError(
                f"choosing a checkpoint needs at least {MIN_SHOTS} training images, got {len(self.shots)}: "
                "add images, or set finetune.candidate_every to 0 to take the last step"
            )

    @cached_property
    def probe(self) -> DomainProbe:
        """Tells the domain from the source."""
        garbage = None if self.garbage is None else self.garbage.pooled
        return DomainProbe.fit(self.shots.pooled, self.source.pooled, garbage, self.seed)

    @cached_property
    def _between(self) -> Float64s:
        return _distances(self.shots.perceptual)

    @property
    def spread(self) -> float:
        """Mean perceptual distance between two training images."""
        return float(self._between.sum() / (len(self.shots) * (len(self.shots) - 1)))

    @property
    def spacing(self) -> Float64s:
        """Perceptual distance from each training image to the nearest other one, with shape (N,)."""
        nearest_other: Float64s = (self._between + np.diag(np.full(len(self.shots), np.inf))).min(axis=1)
        return nearest_other

    @property
    def threshold(self) -> float:
        """Perceptual distance to a training image below which a sample is a copy."""
        return self.copy_distance * float(np.median(self.spacing))

    @property
    def false_alarms(self) -> float:
        """Share of the training images that would count as copies of another one."""
        return float((self.spacing < self.threshold).mean())

    @cached_property
    def _counts(self) -> Float64s:
        """How often each seed is in the samples (once), and in each resample, with shape (1 + R, n)."""
        number = len(self.source)
        drawn = np.random.default_rng(self.seed).multinomial(number, np.full(number, 1 / number), RESAMPLES)
        return np.concatenate([np.ones((1, number)), drawn])

    @cached_property
    def _mmd_of_source(self) -> Float64s:
        return self._mmd(self.source)

    def measure(self, samples: Features) -> Curve:
        """Return the figures of a candidate's samples, which are drawn from the source samples' noise."""
        source = self._mmd_of_source
        inside = self.probe.contains(samples.pooled)
        shots = [each.perceptual for each in (self.shots, self.mirrored) if each is not None]
        _, distances = nearest(samples.perceptual, np.concatenate(shots))
        return Curve(
            fidelity=(source - self._mmd(samples)) / source[0] if source[0] > 0 else np.zeros_like(source),
            diversity=self._intra(samples, inside) / self.spread,
            copies=self._share(distances < self.threshold),
            in_domain=self._share(inside),
        )

    def _share(self, chosen: NDArray[np.bool_]) -> Float64s:
        share: Float64s = self._counts @ chosen / len(chosen)
        return share

    def _mmd(self, samples: Features) -> Float64s:
        """Return the MMD to the training images under KID's kernel (see `metrics.kernel`).

        Its square is unbiased. Copies of one sample within a resample are no pair.
        """
        counts, shots = self._counts, self.shots.pooled
        within_shots = _cubic(shots, shots)
        n = len(shots)
        own = (within_shots.sum() - np.trace(within_shots)) / (n * (n - 1))
        across = counts @ _cubic(samples.pooled, shots).mean(axis=1) / len(samples)
        squared = _pair_mean(counts, _cubic(samples.pooled, samples.pooled)) + own - 2 * across
        mmd: Float64s = np.sqrt(np.maximum(squared, 0))
        return mmd

    def _intra(self, samples: Features, chosen: NDArray[np.bool_]) -> Float64s:
        """Return the intra distance (see `metrics.diversity`) of chosen samples; NaN where it has no pair."""
        distances = _distances(samples.perceptual)
        assigned, _ = nearest(samples.perceptual, self.shots.perceptual)
        groups = [np.flatnonzero(chosen & (assigned == shot)) for shot in range(len(self.shots))]
        means = np.stack(
            [_pair_mean(self._counts[:, group], distances[np.ix_(group, group)]) for group in groups]
        )
        there = np.isfinite(means)
        total, number = np.where(there, means, 0).sum(axis=0), there.sum(axis=0)
        mean: Float64s = np.where(number > 0, total / np.maximum(number, 1), np.nan)
        return mean


def _distances(rows: Floats) -> Float64s:
    """Return the squared Euclidean distance of all pairs of rows, with shape (N, N)."""
    distances: Float64s = np.concatenate([squared for _, squared in squared_distance_blocks(rows, rows)])
    return distances


def _cubic(a: Floats, b: Floats) -> Float64s:
    """Return KID's kernel (a·b/D + 1)³ of all pairs, with shape (N, M)."""
    kernel: Float64s = (a.astype(np.float64) @ b.astype(np.float64).T / a.shape[1] + 1) ** 3
    return kernel


def _pair_mean(counts: Float64s, values: Float64s) -> Float64s:
    """Return the mean value over pairs of different samples, weighted by counts; NaN where there is no pair.

    Args:
        counts: How often each of n samples is there, with shape (R, n).
        values: A value of each pair, with shape (n, n).
    """
    total = np.einsum("ri,ri->r", counts @ (values - np.diag(np.diag(values))), counts)
    pairs = counts.sum(axis=1) ** 2 - (counts**2).sum(axis=1)
    mean: Float64s = np.where(pairs > 0, total / np.maximum(pairs, 1), np.nan)
    return mean
