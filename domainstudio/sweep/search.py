"""Sweeps: the trials of a grid or of random draws, and which setting is the best."""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from domainstudio.config import ObjectiveSettings, RangeSettings, SweepSettings
from domainstudio.errors import ConfigError

Values = Mapping[str, Any]
"""Swept values by dotted key of an adaptation."""


@dataclass(frozen=True)
class Trial:
    """One setting with one training seed.

    Attributes:
        number: From 1, in the order of the sweep.
        values: What is swept.
        seed: The training's, or None for the adaptation's own.
    """

    number: int
    values: Values
    seed: int | None = None

    @property
    def overrides(self) -> dict[str, Any]:
        """What differs from the adaptation, by dotted key."""
        return {**self.values} if self.seed is None else {**self.values, "finetune.seed": self.seed}

    @property
    def title(self) -> str:
        """What differs, for people."""
        return ", ".join(f"{key} {value}" for key, value in self.overrides.items())


@dataclass(frozen=True)
class Outcome:
    """What became of a trial.

    Attributes:
        trial: The trial.
        status: `trained` now, `kept` from an earlier sweep, `failed`, or `not run` to its end.
        key: Hash of all that decides its result.
        scores: Metrics of the samples by name; empty where there are none.
        seconds: Training, sampling and measuring.
        place: Node and GPUs, for people.
        error: Why it failed.
    """

    trial: Trial
    status: Literal["trained", "kept", "failed", "not run"]
    key: str
    scores: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None
    place: str = ""
    error: str = ""


@dataclass(frozen=True)
class Candidate:
    """A setting with the outcomes of all its seeds.

    Attributes:
        values: What is swept.
        outcomes: One for each seed.
        objections: Why it cannot be the best: bounds that it breaks, failures.
    """

    values: Values
    outcomes: Sequence[Outcome]
    objections: tuple[str, ...] = ()

    def mean(self, metric: str) -> float | None:
        """Return the mean of a metric over the seeds, or None where one of them lacks it."""
        found = [outcome.scores[metric] for outcome in self.outcomes if metric in outcome.scores]
        return statistics.fmean(found) if len(found) == len(self.outcomes) else None

    def spread(self, metric: str) -> float | None:
        """Return the standard deviation over the seeds, or None with fewer than two."""
        found = [outcome.scores[metric] for outcome in self.outcomes if metric in outcome.scores]
        return statistics.stdev(found) if len(found) > 1 else None


def trials(sweep: SweepSettings) -> list[Trial]:
    """Return the trials of a sweep: every grid point with every draw and every seed; none is there twice."""
    found: dict[str, Values] = {}
    for drawn in _draws(sweep):
        for combination in itertools.product(*sweep.grid.values()):
            values = {**dict(zip(sweep.grid, combination, strict=True)), **drawn}
            found.setdefault(json.dumps(values, default=str), values)
    pairs = itertools.product(found.values(), sweep.seeds or (None,))
    return [Trial(number, values, seed) for number, (values, seed) in enumerate(pairs, start=1)]


def _draws(sweep: SweepSettings) -> Iterator[Values]:
    """Yield the random settings. The values of a key depend on no other key."""
    if sweep.draws is None:
        yield {}
        return
    generators = {key: random.Random(f"{sweep.draw_seed}/{key}") for key in sweep.random}
    for _ in range(sweep.draws):
        yield {key: _draw(choices, generators[key]) for key, choices in sweep.random.items()}


def _draw(choices: tuple[Any, ...] | RangeSettings, generator: random.Random) -> Any:
    if isinstance(choices, tuple):
        return generator.choice(choices)
    low, high = choices.low, choices.high
    whole = isinstance(low, int) and isinstance(high, int)
    if choices.scale == "log":
        drawn = math.exp(generator.uniform(math.log(low), math.log(high)))
    elif whole:
        return generator.randint(int(low), int(high))
    else:
        drawn = generator.uniform(low, high)
    # Four digits, so that people can read it in a table and in params.yaml.
    return round(drawn) if whole else min(max(float(f"{drawn:.4g}"), low), high)


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


def rank(outcomes: Sequence[Outcome], objective: ObjectiveSettings) -> list[Candidate]:
    """Return the settings, the best first, and last those to which there are objections."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(json.dumps(outcome.trial.values, default=str), []).append(outcome)
    sign = 1 if objective.direction == "minimize" else -1

    def order(candidate: Candidate) -> tuple[bool, float]:
        mean = candidate.mean(objective.metric)
        return bool(candidate.objections), math.inf if mean is None else sign * mean

    return sorted((_candidate(group, objective) for group in groups.values()), key=order)


def best(ranked: Sequence[Candidate]) -> Candidate | None:
    """Return the best of the settings that `rank` returned, or None where there are objections to all."""
    return ranked[0] if ranked and not ranked[0].objections else None


def _candidate(group: Sequence[Outcome], objective: ObjectiveSettings) -> Candidate:
    measured = Candidate(group[0].trial.values, group)
    unfinished = [outcome for outcome in group if outcome.status in ("failed", "not run")]
    if unfinished:
        objections = [f"{o.status}: {o.error}" if o.error else o.status for o in unfinished]
    else:
        objections = list(_objections(measured, objective))
    return Candidate(measured.values, group, tuple(objections))


def _objections(candidate: Candidate, objective: ObjectiveSettings) -> Iterator[str]:
    for name in objective.metrics:
        if (value := candidate.mean(name)) is None:
            yield f"{name} is not defined"
        elif value > objective.at_most.get(name, math.inf):
            yield f"{name} {value:.4g} > {objective.at_most[name]:g}"
        elif value < objective.at_least.get(name, -math.inf):
            yield f"{name} {value:.4g} < {objective.at_least[name]:g}"
