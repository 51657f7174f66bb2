"""The trials of a sweep: the points of its grid, each with every random draw and every seed.

Ray Tune's search spaces (Ray 2.60) do not serve here: a further key changes the draws of all others, so that
no trial is the same as before, draws are not rounded to what people read, and what is there twice runs twice.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from domainstudio.config import RangeSettings, SweepSettings

Values = Mapping[str, Any]
"""Swept values by dotted key of an adaptation."""


@dataclass(frozen=True)
class Trial:
    """One setting with one training seed."""

    number: int
    """From 1, in the order of the sweep."""
    values: Values
    """What is swept."""
    seed: int | None = None
    """The training's, or None for the adaptation's own."""

    @property
    def overrides(self) -> dict[str, Any]:
        """What differs from the adaptation, by dotted key."""
        return {**self.values} if self.seed is None else {**self.values, "finetune.seed": self.seed}

    @property
    def title(self) -> str:
        """What differs, for people."""
        return described(self.overrides)


def described(values: Values) -> str:
    """Return swept values for people."""
    return ", ".join(f"{key} {value}" for key, value in values.items())


def identity(values: Values) -> str:
    """Return a text that is the same for the same values only."""
    return json.dumps(values, default=str)


def trials(sweep: SweepSettings) -> list[Trial]:
    """Return the trials of a sweep: every grid point with every draw and every seed; none is there twice."""
    found: dict[str, Values] = {}
    for drawn in _draws(sweep):
        for combination in itertools.product(*sweep.grid.values()):
            values = {**dict(zip(sweep.grid, combination, strict=True)), **drawn}
            found.setdefault(identity(values), values)
    pairs = itertools.product(found.values(), sweep.seeds or (None,))
    return [Trial(number, values, seed) for number, (values, seed) in enumerate(pairs, start=1)]


def _draws(sweep: SweepSettings) -> Iterator[Values]:
    """Yield the random settings, or an empty one. The values of a key depend on no other key."""
    generators = {key: random.Random(f"{sweep.draw_seed}/{key}") for key in sweep.random}
    for _ in range(sweep.draws or 1):
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
