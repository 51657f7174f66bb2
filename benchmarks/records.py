"""Recorded measurements of adaptations along training, and their difference at equal nearness.

A record is one JSON object per line, as `benchmarks.compare` writes them: `{"adaptation", "method", "draw",
"seed", "step", "frechet_distance_infinity", "intra_distance_in_domain", ...}` for samples of a model, or
`{"reference": "domain" | "shots" | "source", ...}`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from domainstudio.errors import DataError

METRICS = (
    "frechet_distance_infinity",
    "frechet_distance",
    "kid",
    "intra_distance_in_domain",
    "intra_distance",
    "in_domain_share",
    "attributes_kept",
    "attributes_kept_chance",
    "precision",
    "recall",
    "density",
    "coverage",
    "memorized_share",
    "top_1",
    "top_5",
    "seconds_per_step",
    "peak_memory_mib",
)
GRID = 200

Run = tuple[int, int]
"""Seed of the draw of training images, and seed of the training. Records without a draw have draw 0."""


@dataclass(frozen=True)
class Measurement:
    """Figures of one adaptation's samples after one step of one training; `step` is one of them.

    `chosen` marks the step that was chosen without looking at these figures, `null_of` the adaptation of
    which this one is a repetition at another speed.
    """

    name: str
    method: str
    run: Run
    step: int
    values: Mapping[str, float]
    chosen: bool = False
    null_of: str | None = None


@dataclass(frozen=True)
class Records:
    """All measurements, and the reference values by name."""

    measurements: tuple[Measurement, ...]
    references: Mapping[str, Mapping[str, float]]
    network: str
    """The feature network behind the figures, in words."""

    @property
    def names(self) -> list[str]:
        """Adaptations in the order of their first record."""
        return list(dict.fromkeys(item.name for item in self.measurements))

    @property
    def axes(self) -> tuple[str, str]:
        """Keys of nearness and diversity: the sound figures where all measurements have them."""
        sound = ("frechet_distance_infinity", "intra_distance_in_domain")
        known = [{*sound} & {*item.values} for item in self.measurements]
        everywhere = set.intersection(*known)
        somewhere = set.union(*known)
        # A model without two samples in the domain has no diversity there.
        complete = sound[0] in everywhere and sound[1] in somewhere
        return sound if complete else ("frechet_distance", "intra_distance")

    def nulls(self, name: str) -> list[str]:
        """Adaptations that repeat another one at another speed."""
        return list(dict.fromkeys(item.name for item in self.measurements if item.null_of == name))

    def runs(self, name: str) -> dict[Run, list[Measurement]]:
        """Measurements of each run of an adaptation, by step."""
        runs: dict[Run, list[Measurement]] = {}
        for item in sorted(self.measurements, key=lambda item: (item.run, item.step)):
            if item.name == name:
                runs.setdefault(item.run, []).append(item)
        return runs

    def steps(self, name: str) -> list[int]:
        """Steps at which an adaptation was measured."""
        return sorted({item.step for item in self.measurements if item.name == name})

    def over_runs(self, name: str, step: int, metric: str) -> np.ndarray:
        """A figure of every run at one step, `(runs,)`."""
        found = [i for i in self.measurements if (i.name, i.step) == (name, step) and metric in i.values]
        return np.array([item.values[metric] for item in found], dtype=float)


@dataclass(frozen=True)
class Difference:
    """Diversity of an adaptation minus the baseline's, at equal nearness.

    Attributes:
        levels: Nearness that both curves of at least one pair of runs reach, `(GRID,)`.
        by_run: Difference of each run, `(runs, GRID)`, NaN where one of the curves does not reach.
        runs: The runs, in that order.
    """

    levels: np.ndarray
    by_run: np.ndarray
    runs: tuple[Run, ...]

    @property
    def means(self) -> np.ndarray:
        """Mean difference of each run over the levels it reaches, `(runs,)`."""
        return np.array([row[np.isfinite(row)].mean() for row in self.by_run])


def read(paths: Sequence[Path]) -> Records:
    """Read records; a later one replaces an earlier one of the same adaptation, run and step.

    Raises:
        DataError: a line is no record, there is no measurement, or figures are mixed that do not compare:
            those of two feature networks, or of two targets.
    """
    measurements: dict[tuple[str, Run, int], Measurement] = {}
    references: dict[str, Mapping[str, float]] = {}
    kinds: dict[str, set[str]] = {"features": set(), "features_digest": set(), "target": set()}
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                _add(record, measurements, references)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                place = f"{path}:{number}"
                raise DataError(f"{place} is no record ({error!r}): measure again, or remove it") from error
            for key, found in kinds.items():
                found |= {str(record[key])} if key in record else set()
    if not measurements:
        raise DataError(f"{', '.join(map(str, paths)) or 'no file'}: no measurements to draw. Measure first")
    for key, found in kinds.items():
        if len(found) > 1:
            raise DataError(f"records of different {key} do not compare, {sorted(found)}: draw them apart")
    named = ", weights ".join(value for key in ("features", "features_digest") for value in kinds[key])
    network = f"Feature network: {named or 'not recorded'}. Figures of different networks are not comparable."
    return Records(tuple(measurements.values()), references, network)


def find_baseline(records: Records, wanted: str) -> str:
    """Name of the adaptation that others are compared with.

    Args:
        records: all measurements.
        wanted: an adaptation, or a method that only one adaptation uses.

    Raises:
        DataError: there is no such adaptation, or more than one.
    """
    named = {item.name for item in records.measurements if item.name == wanted}
    found = sorted(named or {item.name for item in records.measurements if item.method == wanted})
    if len(found) != 1:
        raise DataError(
            f"--baseline {wanted!r} fits {found or 'nothing'} of {records.names}: name one of them"
        )
    return found[0]


def difference(records: Records, name: str, baseline: str) -> Difference | None:
    """Compare two adaptations run by run along their whole curves; `None` when no run's two curves overlap.

    Each run is a curve of diversity over nearness (`Records.axes`). Only its efficient part counts: going
    along training, a point is kept while the distance still falls below all before it, so that every level is
    met once, on the way to the run's best. Between points the curve is linear.
    """
    ours, theirs = records.runs(name), records.runs(baseline)
    return _difference(records, {run: (ours[run], theirs[run]) for run in ours if run in theirs})


def null_difference(records: Records, baseline: str, pairs: Sequence[tuple[Run, Run]]) -> Difference | None:
    """Compare runs of the baseline with other runs of its own, the same way: what it finds is chance."""
    runs = records.runs(baseline)
    return _difference(records, {run: (runs[other], runs[run]) for run, other in pairs})


def _difference(
    records: Records, pairs: Mapping[Run, tuple[Sequence[Measurement], Sequence[Measurement]]]
) -> Difference | None:
    curves = {run: tuple(_descent(side, *records.axes) for side in pair) for run, pair in pairs.items()}
    spans = {
        run: (max(a[0][0], b[0][0]), min(a[0][-1], b[0][-1]))
        for run, (a, b) in curves.items()
        if min(len(a[0]), len(b[0])) >= 2
    }
    spans = {run: (low, high) for run, (low, high) in spans.items() if low < high}
    if not spans:
        return None
    levels = np.linspace(min(low for low, _ in spans.values()), max(high for _, high in spans.values()), GRID)
    rows = []
    for run, (low, high) in spans.items():
        (ax, ay), (bx, by) = curves[run]
        row = np.interp(levels, ax, ay) - np.interp(levels, bx, by)
        # The grid need not hit the ends of a short overlap, so the nearest level to its middle stays.
        inside = (levels >= low) & (levels <= high)
        inside[np.abs(levels - (low + high) / 2).argmin()] = True
        rows.append(np.where(inside, row, np.nan))
    return Difference(levels, np.array(rows), tuple(spans))


def _descent(run: Sequence[Measurement], nearness: str, diversity: str) -> tuple[np.ndarray, np.ndarray]:
    """Points of a run at which its distance reaches a new low, in ascending order of it."""
    kept: list[tuple[float, float]] = []
    for item in run:
        if nearness in item.values and diversity in item.values:
            point = (item.values[nearness], item.values[diversity])
            if not kept or point[0] < kept[-1][0]:
                kept.append(point)
    x, y = np.array(kept[::-1], dtype=float).reshape(-1, 2).T
    return x, y


def _add(
    record: Mapping[str, Any],
    measurements: dict[tuple[str, Run, int], Measurement],
    references: dict[str, Mapping[str, float]],
) -> None:
    values = _figures(record)
    if "reference" in record:
        references[str(record["reference"])] = values
        return
    name = str(record.get("adaptation") or record["method"])
    run, step = (int(record.get("draw") or 0), int(record["seed"])), int(record["step"])
    measurements[name, run, step] = Measurement(
        name,
        str(record.get("method", name)),
        run,
        step,
        {**values, "step": step},
        chosen=bool(record.get("chosen")),
        null_of=record.get("null_of"),
    )


def _figures(record: Mapping[str, Any]) -> dict[str, float]:
    found = {key: record[key] for key in METRICS if record.get(key) is not None}
    return {key: float(value) for key, value in found.items() if math.isfinite(value)}
