"""The report's tables: figures beside their reference values, and the settings that differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from domainstudio.config import Adaptation
from domainstudio.report.metrics import METRICS, Metric
from domainstudio.report.reading import Results

COMPARABLE = ("features", "features_digest", "number", "domain_number", "domain_is_shots")
"""Keys of `metrics.json` that must agree before figures may be compared."""

COMPARABLE_CLIP = ("model", "digest")
"""The same of its part `clip`, which may be missing."""

ERRORS = {"kid": "kid_std"}
"""The figure that holds a figure's standard deviation."""

CHANCES = {"top_1": "top_1_chance", "top_5": "top_5_chance"}
"""The figure that says what chance alone would give."""

CAPPED = ("intra_distance", "intra_clip")
"""Figures of variety: more than real images have is no merit."""

TOO_VARIED = "more varied than real images: look for garbage"


@dataclass(frozen=True)
class Cell:
    """A figure as text, its standard deviation or what chance gives, and what to beware of."""

    text: str
    spread: str | None = None
    best: bool = False
    note: str | None = None


@dataclass(frozen=True)
class Row:
    """One metric: a cell per adaptation, then one per reference."""

    metric: Metric
    cells: tuple[Cell, ...]
    references: tuple[Cell, ...]


@dataclass(frozen=True)
class MetricTable:
    """Figures of all adaptations to one target, measured by one network on as many images."""

    target: str
    features: str
    digest: str
    number: int | None
    domain_number: int | None
    domain_is_shots: bool
    results: tuple[Results, ...]
    reference_names: tuple[tuple[str, float | None], ...]
    """What each reference is, and of how many images."""
    rows: tuple[Row, ...]
    clip: tuple[str, str] | None
    """The CLIP model behind CLIP's figures, and its weights' hash."""


def metric_tables(results: Sequence[Results]) -> list[MetricTable]:
    """One table per group of comparable figures: those that share their target and all of `COMPARABLE`."""
    groups: dict[tuple[Any, ...], list[Results]] = {}
    for item in results:
        if item.metrics is not None:
            facts = [item.metrics.get(key) for key in COMPARABLE]
            facts += [(item.metrics.get("clip") or {}).get(key) for key in COMPARABLE_CLIP]
            groups.setdefault((item.adaptation.target, *facts), []).append(item)
    return [_table(key, group) for key, group in groups.items()]


def figure(results: Results, key: str, part: str | None = None) -> float | None:
    """A finite figure of an adaptation's samples, or `None`; `part` as in `Metric`."""
    return number(_part(results, part).get("samples"), key)


def references(group: Sequence[Results], part: str | None = None) -> dict[str, Mapping[str, Any]]:
    """Reference values by what they are measured on; the source's once per source model."""
    found: dict[str, Mapping[str, Any]] = {}
    for item in group:
        values = _part(item, part).get("references") or {}
        names = {
            "shots": "training images",
            "source": f"source ({item.adaptation.source})",
            "domain": "real images",
        }
        for key, name in names.items():
            if values.get(key):
                found.setdefault(name, values[key])
    return found


def _part(results: Results, part: str | None) -> Mapping[str, Any]:
    metrics = results.metrics or {}
    return metrics if part is None else metrics.get(part) or {}


def setting_rows(
    adaptations: Sequence[Adaptation],
) -> tuple[list[tuple[str, list[str]]], list[tuple[str, str]]]:
    """Settings that differ between adaptations (a value each), and those that all share."""
    flat = [_flat(item.model_dump(mode="json", exclude={"name"})) for item in adaptations]
    differing, shared = [], []
    keys = dict.fromkeys(key for item in flat for key in item)
    for key in keys:
        if any(other.startswith(f"{key}.") for other in keys):
            continue  # a section that only some have, such as weights.lora: its own keys are listed
        values = [item.get(key, "–") for item in flat]
        if len(set(values)) > 1:
            differing.append((key, values))
        else:
            shared.append((key, values[0]))
    return differing, shared


def text(value: float, *, decimals: int, percent: bool = False) -> str:
    """A figure for people: a true minus sign, thin thousands."""
    if percent:
        return f"{100 * value:.1f} %"
    return f"{value:,.{decimals}f}".replace(",", " ").replace("-", "−")


def decimals(values: Sequence[float]) -> int:
    """Decimals that give the largest of the values about three significant digits."""
    largest = max((abs(value) for value in values), default=0.0)
    if largest == 0:
        return 3
    power = math.floor(math.log10(largest))
    if power >= 3:
        return 0
    return min(8, max(1, 2 - power))


def _table(key: tuple[Any, ...], group: list[Results]) -> MetricTable:
    target, features, digest, count, domain_number, domain_is_shots, clip, clip_digest = key
    beside = references(group)
    rows = [row for metric in METRICS if (row := _row(metric, group, beside)) is not None]
    return MetricTable(
        target=target,
        features=str(features),
        digest=str(digest),
        number=count,
        domain_number=domain_number,
        domain_is_shots=bool(domain_is_shots),
        results=tuple(group),
        reference_names=tuple((name, number(values, "number")) for name, values in beside.items()),
        rows=tuple(rows),
        clip=(str(clip), str(clip_digest)) if clip is not None else None,
    )


def _row(metric: Metric, group: Sequence[Results], beside: Mapping[str, Mapping[str, Any]]) -> Row | None:
    values = [figure(item, metric.key, metric.part) for item in group]
    if metric.part is not None:
        measured = references(group, metric.part)
        beside = {name: measured.get(name, {}) for name in beside}
    others = [number(item, metric.key) for item in beside.values()]
    known = [value for value in values if value is not None] or [v for v in others if v is not None]
    if not known:
        return None
    places = 0 if metric.key == "intra_clusters" else decimals(known)
    errors = [figure(item, ERRORS.get(metric.key, ""), metric.part) for item in group]
    chances = [figure(item, CHANCES.get(metric.key, ""), metric.part) for item in group]
    other_errors = [number(item, ERRORS.get(metric.key, "")) for item in beside.values()]
    # More varied than the real domain is no merit, so such a lead is not marked.
    ceiling = number(beside.get("real images"), metric.key) if metric.key in CAPPED else None
    beyond = {i for i, v in enumerate(values) if v is not None and ceiling is not None and v > ceiling}
    best = _best(metric, values, errors, places)
    best = set() if best & beyond else best
    cells = [_cell(*figures, metric, places) for figures in zip(values, errors, chances, strict=True)]
    marked = (
        replace(cell, best=i in best, note=TOO_VARIED if i in beyond else None)
        for i, cell in enumerate(cells)
    )
    other_cells = [_cell(v, e, None, metric, places) for v, e in zip(others, other_errors, strict=True)]
    return Row(metric, tuple(marked), tuple(other_cells))


def _best(
    metric: Metric, values: Sequence[float | None], errors: Sequence[float | None], places: int
) -> set[int]:
    """Positions of the best value.

    There is none when nothing is compared, when all read the same, or when the lead over the next one is
    within its own standard deviation.
    """
    known = {index: value for index, value in enumerate(values) if value is not None}
    if metric.better is None or len(known) < 2:
        return set()
    sign = 1 if metric.better == "lower" else -1
    order = sorted(known, key=lambda index: sign * known[index])
    shown = {i: text(known[i], decimals=places, percent=metric.percent) for i in order}
    best = {i for i in order if shown[i] == shown[order[0]]}
    if len(best) == len(known):
        return set()
    follower = next(i for i in order if i not in best)
    spread = max((errors[i] or 0.0) for i in (order[0], follower))
    return best if abs(known[follower] - known[order[0]]) > spread else set()


def _cell(
    value: float | None, error: float | None, chance: float | None, metric: Metric, places: int
) -> Cell:
    if value is None:
        return Cell("–")
    spread = None if error is None else f"± {text(error, decimals=places)}"
    if chance is not None:
        spread = f"chance {text(chance, decimals=places, percent=metric.percent)}"
    return Cell(text(value, decimals=places, percent=metric.percent), spread)


def number(values: Any, key: str) -> float | None:
    """A finite figure of a part of `metrics.json`, or `None`."""
    value = values.get(key) if isinstance(values, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            words = {True: "yes", False: "no", None: "–"}
            plain = value is None or isinstance(value, bool)
            flat[prefix + key] = words[value] if plain else f"{value}"
    return flat
