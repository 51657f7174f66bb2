"""What became of the trials, and which setting is the best."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from domainstudio.config import ObjectiveSettings
from domainstudio.errors import ConfigError
from flows.sweep.search import Trial, Values, identity

Status = Literal["trained", "kept", "failed", "not run"]
"""Measured now, or in an earlier sweep; failed; not run to its end."""


@dataclass(frozen=True)
class Outcome:
    """What became of a trial."""

    trial: Trial
    status: Status
    key: str
    """Hash of all that decides its result."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the samples by name; empty where there are none."""
    seconds: float | None = None
    """Training, sampling and measuring."""
    place: str = ""
    """Node and GPUs, for people."""
    error: str = ""
    """Why it failed."""


@dataclass(frozen=True)
class Candidate:
    """A setting with the outcomes of all its seeds."""

    outcomes: Sequence[Outcome]
    objective: ObjectiveSettings

    @property
    def values(self) -> Values:
        """What is swept."""
        return self.outcomes[0].trial.values

    def mean(self, metric: str) -> float | None:
        """Return the mean of a metric over the seeds, or None where one of them lacks it."""
        found = self._figures(metric)
        return statistics.fmean(found) if len(found) == len(self.outcomes) else None

    def spread(self, metric: str) -> float | None:
        """Return the standard deviation over the seeds, or None with fewer than two."""
        found = self._figures(metric)
        return statistics.stdev(found) if len(found) > 1 else None

    def _figures(self, metric: str) -> list[float]:
        return [outcome.scores[metric] for outcome in self.outcomes if metric in outcome.scores]

    @cached_property
    def objections(self) -> tuple[str, ...]:
        """Why it cannot be the best: failures, or else bounds that it breaks."""
        unfinished = [each for each in self.outcomes if each.status in ("failed", "not run")]
        failures = (f"{each.status}: {each.error}" if each.error else each.status for each in unfinished)
        return tuple(failures if unfinished else self._broken_bounds())

    def _broken_bounds(self) -> Iterator[str]:
        at_most, at_least = self.objective.at_most, self.objective.at_least
        for name in self.objective.metrics:
            if (value := self.mean(name)) is None:
                yield f"{name} is not defined"
            elif value > at_most.get(name, math.inf):
                yield f"{name} {value:.4g} > {at_most[name]:g}"
            elif value < at_least.get(name, -math.inf):
                yield f"{name} {value:.4g} < {at_least[name]:g}"

    @property
    def order(self) -> tuple[bool, float]:
        """What to sort by, so that the best comes first, and last what has objections."""
        mean = self.mean(self.objective.metric)
        sign = 1 if self.objective.direction == "minimize" else -1
        return bool(self.objections), math.inf if mean is None else sign * mean


def rank(outcomes: Sequence[Outcome], objective: ObjectiveSettings) -> list[Candidate]:
    """Return the settings, the best first, and last those to which there are objections."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(identity(outcome.trial.values), []).append(outcome)
    candidates = (Candidate(group, objective) for group in groups.values())
    return sorted(candidates, key=lambda candidate: candidate.order)


def best(ranked: Sequence[Candidate]) -> Candidate | None:
    """Return the best of the settings that `rank` returned, or None where there are objections to all."""
    return ranked[0] if ranked and not ranked[0].objections else None


def scores(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of the samples by name.

    Args:
        metrics: the content of metrics.json.
    """
    parts = (metrics, metrics.get("paired", {}), metrics.get("clip", {}))
    found = {name: value for part in parts for name, value in part.get("samples", {}).items()}
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def check(objective: ObjectiveSettings, where: str) -> None:
    """Refuse an objective that can never be measured, before anything is trained.

    Raises:
        ConfigError: a metric is unknown.
    """
    from domainstudio.metrics.catalogue import KEYS

    if unknown := [name for name in objective.metrics if name not in KEYS]:
        raise ConfigError(f"{where}: no metric is called {', '.join(unknown)}. Known are {sorted(KEYS)}")
