"""Sweeps: settings of an adaptation to try side by side."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from domainstudio.config.base import MANY, Name, Section, Seed, Text


class RangeSettings(Section):
    """Numbers to draw from; whole ones where both ends are whole."""

    low: int | float
    """Smallest value."""
    high: int | float
    """Largest value."""
    scale: Literal["linear", "log"] = "linear"
    """`log` draws each order of magnitude as often as any other: for learning rates and weights."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"scale log needs low above 0, got {self.low}")
        return self


class ObjectiveSettings(Section):
    """What makes a setting the best: metrics of the samples by their names in metrics.json, such as
    `frechet_distance`, `intra_distance`, `coverage` or `clip_score`; means over the sweep's `seeds`.
    """

    metric: Text = "frechet_distance"
    """What is compared."""
    direction: Literal["minimize", "maximize"] = "minimize"
    """Which values are better."""
    at_most: dict[str, float] = Field(default_factory=dict)
    """Largest values of metrics, such as `{memorized_share: 0.05}`, for a setting to be the best."""
    at_least: dict[str, float] = Field(default_factory=dict)
    """Smallest values of metrics for a setting to be the best."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Every metric that decides, the compared one first."""
        return tuple(dict.fromkeys([self.metric, *self.at_most, *self.at_least]))


class SweepSettings(Section):
    """Settings of an adaptation to try side by side, each of them a trial on a Ray cluster.

    Keys of `grid` and `random` are dotted keys of an adaptation: `source`, `target`, `method`,
    `weights.image`, `finetune.learning_rate`, `prior.number` and so on.
    """

    adaptation: Name
    """A key of `adaptations`, whose values hold for whatever is not swept."""
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Values of each key; every combination is tried."""
    random: dict[str, tuple[Any, ...] | RangeSettings] = Field(default_factory=dict)
    """Values or a range of each key, from which `draws` settings are drawn. With a grid, each of them is
    tried with every combination of the grid."""
    draws: int | None = Field(default=None, ge=1, le=MANY)
    """Number of settings to draw from `random`. A larger number begins with the same settings."""
    draw_seed: Seed = 0
    """Seed of the draws."""
    seeds: tuple[Seed, ...] = ()
    """Seeds of training: each setting is trained with each of them. If empty, with the adaptation's own."""
    objective: ObjectiveSettings = ObjectiveSettings()
    """Which setting is the best."""
    gpus: float = Field(default=1.0, ge=0, le=1)
    """GPUs of a trial, which is one process: 1, or a fraction such as 0.5 for two trials on each GPU."""
    cpus: float = Field(default=1.0, ge=0)
    """CPU cores of a trial, for Ray's bookkeeping."""
    retries: int = Field(default=3, ge=0)
    """Further attempts at a trial whose node or process died. One that raised an error is not repeated."""
    send_inputs: bool = False
    """Send images and source models through Ray, to nodes that do not see this project's folder."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.grid and not self.random:
            raise ValueError("neither grid nor random has a key: there is nothing to try")
        if twice := sorted(self.grid.keys() & self.random.keys()):
            raise ValueError(f"{', '.join(twice)}: in grid and in random; keep one")
        if empty := sorted(key for key, values in {**self.grid, **self.random}.items() if values == ()):
            raise ValueError(f"{', '.join(empty)}: no values")
        if bool(self.random) != (self.draws is not None):
            raise ValueError("random needs draws, the number of settings to draw, and draws needs random")
        if self.seeds and "finetune.seed" in {**self.grid, **self.random}:
            raise ValueError("finetune.seed: in grid or random, and given by seeds; keep one")
        return self
