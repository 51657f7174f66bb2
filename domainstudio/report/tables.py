"""The report's tables: figures beside their reference values, and the settings that differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from domainstudio.config import Adaptation
from domainstudio.metrics.catalogue import FIGURES
from domainstudio.metrics.metric import Figure
from domainstudio.report.reading import Results

COMPARABLE = ("features", "features_digest", "number", "domain_number", "domain_is_shots")
"""Keys of `metrics.json` that must agree before figures may be compared."""

COMPARABLE_CLIP = ("model", "digest")
"""The same of its part `clip`, which may be missing."""

TOO_VARIED = "more varied than real images: look for garbage"


@dataclass(frozen=True)
class Cell:
    """A figure as text, its interval or standard deviation and what chance gives, and what to beware of."""

    text: str
    spread: str | None = None
    best: bool = False
    note: str | None = None


@dataclass(frozen=True)
class Row:
    """One figure: a cell per adaptation, then one per reference."""

    figure: Figure
    cells: tuple[Cell, ...]
    references: tuple[Cell, ...]


@dataclass(frozen=True)
class MetricTable:
    """Figures of all adaptations to one target, measured by one network on as many images."""

    target: str
    features: str
    digest: str
    number: int | None
    steps: tuple[int, ...]
    """Denoising steps of the samples."""
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
    flat = [_flat(_values(item)) for item in adaptations]
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


def _values(adaptation: Adaptation) -> dict[str, Any]:
    """Return an adaptation's settings by key, with how it is drawn where the source model takes part."""
    values = adaptation.model_dump(mode="json", exclude={"name"})
    if adaptation.combine is not None:
        values["combine"] = adaptation.combine.model_dump(mode="json")
    return values


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
    ordered = sorted(FIGURES, key=lambda figure: figure.detail)
    rows = [row for figure in ordered if (row := _row(figure, group, list(beside))) is not None]
    return MetricTable(
        target=target,
        features=str(features),
        digest=str(digest),
        number=count,
        steps=tuple(sorted({steps for item in group if (steps := _steps(item)) is not None})),
        domain_number=domain_number,
        domain_is_shots=bool(domain_is_shots),
        results=tuple(group),
        reference_names=tuple((name, number(values, "number")) for name, values in beside.items()),
        rows=tuple(rows),
        clip=(str(clip), str(clip_digest)) if clip is not None else None,
    )


def _steps(results: Results) -> int | None:
    return None if results.samples is None else results.samples.manifest.get("steps")


def _row(figure: Figure, group: Sequence[Results], names: Sequence[str]) -> Row | None:
    """Return a figure's row, or None where nothing has it; `names` are the table's references."""
    parts = [_part(item, figure.part).get("samples") for item in group]
    values = [number(part, figure.key) for part in parts]
    beside = references(group, figure.part)
    others = [number(beside.get(name), figure.key) for name in names]
    known = [value for value in values if value is not None] or [v for v in others if v is not None]
    if not known:
        return None
    places = 0 if figure.count else decimals(known)
    # More varied than the real domain is no merit, so such a lead is not marked.
    ceiling = number(beside.get("real images"), figure.key) if figure.capped else None
    beyond = {i for i, v in enumerate(values) if v is not None and ceiling is not None and v > ceiling}
    best = _best(figure, values, [_uncertainty(part, figure) for part in parts], places)
    best = set() if best & beyond else best
    cells = (
        replace(_cell(part, figure, places), best=i in best, note=TOO_VARIED if i in beyond else None)
        for i, part in enumerate(parts)
    )
    plain = replace(figure, chance=None)
    return Row(figure, tuple(cells), tuple(_cell(beside.get(name), plain, places) for name in names))


def _best(
    figure: Figure, values: Sequence[float | None], spreads: Sequence[float | None], places: int
) -> set[int]:
    """Return the positions of the best value.

    There is none when nothing is compared, when all read the same, or when the lead over the next one is
    within the uncertainty of either or of their difference: of independent values, it is the root of the sum
    of squares.
    """
    known = {index: value for index, value in enumerate(values) if value is not None}
    if figure.better is None or len(known) < 2:
        return set()
    sign = 1 if figure.better == "lower" else -1
    order = sorted(known, key=lambda index: sign * known[index])
    shown = {i: text(known[i], decimals=places, percent=figure.percent) for i in order}
    best = {i for i in order if shown[i] == shown[order[0]]}
    if len(best) == len(known):
        return set()
    follower = next(i for i in order if i not in best)
    spread = math.hypot(*(spreads[i] or 0.0 for i in (order[0], follower)))
    return best if abs(known[follower] - known[order[0]]) > spread else set()


def _cell(values: Any, figure: Figure, places: int) -> Cell:
    value, error, chance = (number(values, key) for key in (figure.key, figure.spread, figure.chance))
    if value is None:
        return Cell("–")
    spread = None if error is None else f"± {text(error, decimals=places)}"
    if (bounds := _interval(values, figure.key)) is not None:
        low, high = (text(bound, decimals=places, percent=figure.percent) for bound in bounds)
        spread = f"{low} … {high}"
    if chance is not None:
        by_chance = f"chance {text(chance, decimals=places, percent=figure.percent)}"
        spread = f"{spread},\n{by_chance}" if spread else by_chance
    return Cell(text(value, decimals=places, percent=figure.percent), spread)


def _interval(values: Any, key: str) -> tuple[float, float] | None:
    """The interval of a figure of a part of `metrics.json`, or `None`."""
    found = values.get("intervals") if isinstance(values, Mapping) else None
    bounds = found.get(key) if isinstance(found, Mapping) else None
    return None if bounds is None else (float(bounds[0]), float(bounds[1]))


def _uncertainty(values: Any, figure: Figure) -> float | None:
    """Half of a figure's interval, or its standard deviation where it has no interval."""
    bounds = _interval(values, figure.key)
    return number(values, figure.spread) if bounds is None else (bounds[1] - bounds[0]) / 2


def number(values: Any, key: str | None) -> float | None:
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
