"""Which adaptation wins by which figure: paired differences over draws of training images and seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchmarks.records import Measurement, Records, Run
from domainstudio.metrics.catalogue import FIGURES

Outcome = Literal["wins", "loses", "not shown"]

COMPARED = {
    figure.key: figure
    for figure in FIGURES
    if figure.better is not None and not figure.detail and figure.part in (None, "attributes", "paired")
}
"""Figures with a better side, by their key."""

NEARNESS = ("frechet_distance_infinity", "kid", "frechet_distance")
"""The figure by which each adaptation's best step is found: the first that all measurements have."""

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Verdict:
    """One figure of an adaptation against the baseline's.

    Attributes:
        figure: Its key.
        runs: Paired runs behind it.
        mean: Mean difference, adaptation minus baseline.
        low: Lower end of the 95% interval; NaN with a single run.
        high: Upper end.
        outcome: Whether the interval excludes 0, and on which side.
    """

    figure: str
    runs: int
    mean: float
    low: float
    high: float
    outcome: Outcome


def verdict(figure: str, differences: Mapping[Run, float]) -> Verdict:
    """Judge a figure by its paired differences, one per draw of training images and seed.

    The interval is Student's, with the runs as independent. With few draws it speaks of these draws more than
    of others, so a method also has to be on the same side in the mean of each draw.

    Args:
        figure: Key of the figure, one of `COMPARED`.
        differences: Adaptation minus baseline, by run; at least one.
    """
    values = np.array(list(differences.values()))
    mean, (low, high) = float(values.mean()), _interval(values)
    draws = {draw for draw, _ in differences}
    sides = {
        float(np.sign(np.mean([value for run, value in differences.items() if run[0] == draw])))
        for draw in draws
    }
    shown = (low > 0 or high < 0) and len(sides) == 1
    good = (mean < 0) == (COMPARED[figure].better == "lower")
    return Verdict(
        figure, len(values), mean, low, high, "not shown" if not shown else "wins" if good else "loses"
    )


def verdicts(records: Records, name: str, baseline: str) -> list[Verdict]:
    """Judge an adaptation by every figure that it shares with the baseline, each at its own best step."""
    ours, theirs = best(records, name), best(records, baseline)
    return _judged([(run, ours[run], theirs[run]) for run in ours if run in theirs])


def null(records: Records, baseline: str) -> list[Verdict]:
    """Compare the baseline with itself, trained with the next seed on the same training images.

    What it calls a win is chance.
    """
    runs = best(records, baseline)
    return _judged([(run, runs[other], runs[run]) for run, other in next_seeds(runs)])


def next_seeds(runs: Iterable[Run]) -> list[tuple[Run, Run]]:
    """Return each run with that of the next seed of the same draw, the last with the first."""
    draws: dict[int, list[int]] = {}
    for draw, seed in sorted(runs):
        draws.setdefault(draw, []).append(seed)
    return [
        ((draw, seed), (draw, seeds[(index + 1) % len(seeds)]))
        for draw, seeds in draws.items()
        if len(seeds) > 1
        for index, seed in enumerate(seeds)
    ]


def best(records: Records, name: str) -> dict[Run, Measurement]:
    """Return each run's measurement that counts.

    That is the one whose record says `"chosen": true`, where there are such. Otherwise it is that of the step
    with the best mean nearness over all runs: one step per adaptation, so that no run picks its own luck.
    """
    runs = records.runs(name)
    chosen = {run: item for run, items in runs.items() for item in items if item.chosen}
    if chosen:
        return chosen
    nearness = next(
        (key for key in NEARNESS if all(key in item.values for item in records.measurements)), None
    )
    if nearness is None:
        return {}
    means = {step: float(np.mean(records.over_runs(name, step, nearness))) for step in records.steps(name)}
    complete = max(sum(item.step == step for items in runs.values() for item in items) for step in means)
    full = {
        step: mean
        for step, mean in means.items()
        if sum(item.step == step for items in runs.values() for item in items) == complete
    }
    step = min(full, key=lambda each: full[each])
    return {run: item for run, items in runs.items() for item in items if item.step == step}


def table(found: Mapping[str, Sequence[Verdict]], baseline: str) -> str:
    """Return verdicts as Markdown, a row per adaptation and figure."""
    lines = [
        f"| against {baseline} | figure | runs | difference | 95 % interval | verdict |",
        "|---|---|---:|---:|---|---|",
    ]
    for name, each in found.items():
        for item in each:
            title = COMPARED[item.figure].name
            bounds = "–" if np.isnan(item.low) else f"{item.low:+.3g} … {item.high:+.3g}"
            lines.append(
                f"| {name} | {title} | {item.runs} | {round(item.mean, 9):+.3g} | {bounds} | {item.outcome} |"
            )
    return "\n".join(lines) + "\n"


def _judged(pairs: Sequence[tuple[Run, Measurement, Measurement]]) -> list[Verdict]:
    found = []
    for figure in COMPARED:
        differences = {
            run: ours.values[figure] - theirs.values[figure]
            for run, ours, theirs in pairs
            if figure in ours.values and figure in theirs.values
        }
        if differences:
            found.append(verdict(figure, differences))
    return found


def _interval(values: np.ndarray) -> tuple[float, float]:
    """Return Student's interval of a mean; NaN of a single value."""
    from scipy import stats

    if len(values) < 2:
        return float("nan"), float("nan")
    error = float(values.std(ddof=1)) / np.sqrt(len(values))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error
    return float(values.mean()) - reach, float(values.mean()) + reach
