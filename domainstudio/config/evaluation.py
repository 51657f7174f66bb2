"""The stage `evaluate`."""

from __future__ import annotations

from pydantic import Field

from domainstudio.config.base import Section, Seed, Text


class EvaluateSettings(Section):
    """The stage `evaluate`: how samples are measured."""

    features: Text = "efficientnet-lite0"
    """Feature network, by its name in `domainstudio.metrics.networks`. Figures of different networks cannot
    be compared."""
    batch_size: int = Field(default=50, ge=1)
    """Images per forward pass of that network."""
    neighbours: int = Field(default=3, ge=1)
    """k of precision, recall, density and coverage."""
    resamples: int = Field(default=200, ge=0)
    """Random halves of the samples from which the figures' intervals come; 0 leaves intervals out. Metrics
    that take long use fewer."""
    memorized_false_alarms: float | None = Field(default=0.01, gt=0, lt=1)
    """A sample counts as memorised where it is nearer to a training image than this share of unseen real
    images of the domain are. It needs at least 2 / share of them, 200 for 0.01. With fewer, and with `null`,
    `memorized_below` is taken."""
    memorized_below: float = Field(ge=0)
    """Perceptual distance to a training image below which a sample counts as memorised, where it is not
    derived from real images. metrics.json says what share of unseen real images is as near:
    `memorized_false_alarms`."""
    clip: Text | None = None
    """CLIP model for the CLIP score and Intra-CLIP: a folder in transformers' layout, or a hub id; `null`
    measures neither. DVC does not watch that folder, but metrics.json holds the hash of its weights."""
    seed: Seed = 0
    """Seed of all draws: of the real images that stand for samples, and of halves."""
