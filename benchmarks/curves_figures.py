"""The pictures of `benchmarks.curves`, drawn by matplotlib without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.records import Difference, Records

GREY = "#625f59"
COLOURS = ("#8a5a00", "#1257a8", "#7b2f8e", "#0b7266", "#b3365b", "#55670e")
REFERENCES = {"domain": ("real images", "*"), "shots": ("training images", "s"), "source": ("source", "^")}
POINTS: dict[str, Any] = {"lw": 2, "marker": "o", "ms": 5, "elinewidth": 1}
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8b877f",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e9e5dc",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "domainstudio",
    "svg.fonttype": "none",
}


def overview(records: Records) -> Figure:
    """Three panels: closeness against variety, faithfulness against reach, memorisation along training."""
    known = {key for item in records.measurements for key in item.values}
    x, y = ("density", "coverage") if "coverage" in known else ("precision", "recall")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(16, 5.4), layout="constrained")
        first, second, third = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
        _draw(first, records, *records.axes, annotate=True)
        _draw_references(first, records, *records.axes)
        nearness, diversity = (key.replace("_", " ") for key in records.axes)
        first.set(title="Closeness against variety", xlabel=f"{nearness}  (← closer to the domain)")
        first.set_ylabel(f"{diversity}  (more varied →)")
        _draw(second, records, x, y)
        _draw_references(second, records, x, y)
        second.set(title="Faithfulness against reach", xlabel=f"{x}  (more faithful →)")
        second.set_ylabel(f"{y}  (more of the domain →)")
        _memorised(third, records)
        shown = {
            label: handle
            for axes in (first, second)
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.suptitle(records.network, x=0.995, ha="right", fontsize=8.5, color=GREY)
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown))
        return figure


def differences(found: Mapping[str, Difference], baseline: str, names: Sequence[str]) -> Figure:
    """Diversity minus the baseline's over nearness, and the mean of each run."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(2, 1), sharey=True)
        for position, (name, item) in enumerate(found.items()):
            colour = COLOURS[names.index(name) % len(COLOURS)]
            _draw_difference(left, item, name, colour)
            mean, error = item.means.mean(), _deviation(item.means)
            right.plot(np.full(len(item.means), position), item.means, "o", color=colour, alpha=0.45, ms=6)
            look: dict[str, Any] = {"color": colour, "marker": "D", "ms": 7, "lw": 2, "capsize": 4}
            right.errorbar(position + 0.18, mean, yerr=error, **look)
        for axes in (left, right):
            axes.axhline(0, color="#1c1b19", lw=1)
        left.set(title=f"Diversity minus that of {baseline}", xlabel="at equal distance from the domain")
        left.set_ylabel("difference  (above 0: more varied)")
        left.legend(loc="upper right")
        right.set(title="Mean of each run", xticks=range(len(found)), xticklabels=list(found))
        right.set_xlim(-0.6, len(found) - 0.4)
        right.grid(visible=False, axis="x")
        return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as `<path>.png` and `<path>.svg`, the same bytes for the same figures."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(path.with_name(path.name + ".png"), dpi=150, metadata={"Software": None})
        figure.savefig(path.with_name(path.name + ".svg"), metadata={"Date": None})


def _memorised(axes: Axes, records: Records) -> None:
    _draw(axes, records, "step", "memorized_share")
    axes.set(title="Memorised along training", xlabel="step", ylabel="share of memorised samples")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(bottom=0)
    share = records.references.get("domain", {}).get("memorized_share")
    if share is not None:
        axes.axhline(share, color=GREY, lw=1, ls="--")
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        axes.annotate("real images", (1, share), **place)


def _draw_difference(axes: Axes, item: Difference, name: str, colour: str) -> None:
    for row in item.by_run:
        axes.plot(item.levels, row, color=colour, alpha=0.25, lw=1)
    reached = np.isfinite(item.by_run).all(axis=0)
    levels, rows = item.levels[reached], item.by_run[:, reached]
    mean = rows.mean(axis=0)
    axes.plot(levels, mean, color=colour, lw=2.4, label=name)
    if len(rows) > 1:
        spread = rows.std(axis=0, ddof=1)
        axes.fill_between(levels, mean - spread, mean + spread, color=colour, alpha=0.14, lw=0)


def _draw(axes: Axes, records: Records, x: str, y: str, *, annotate: bool = False) -> None:
    """Draw one figure over another: thin lines are runs, thick ones their means and deviations."""
    for index, adaptation in enumerate(records.names):
        colour = COLOURS[index % len(COLOURS)]
        for run in records.runs(adaptation).values():
            points = [(i.values[x], i.values[y]) for i in run if x in i.values and y in i.values]
            axes.plot(*np.array(points).reshape(-1, 2).T, color=colour, alpha=0.22, lw=1, marker=".", ms=3)
        steps, means, spreads = _moments(records, adaptation, x, y)
        errors: dict[str, Any] = {"xerr": spreads[:, 0], "yerr": spreads[:, 1]}
        axes.errorbar(means[:, 0], means[:, 1], **errors, color=colour, label=adaptation, **POINTS)
        for step, point in zip(steps, means, strict=True) if annotate else ():
            place: dict[str, Any] = {"xytext": (6, 5 if index == 0 else -11), "textcoords": "offset points"}
            axes.annotate(f"{step}", point, fontsize=8, color=colour, **place)


def _draw_references(axes: Axes, records: Records, x: str, y: str) -> None:
    look: dict[str, Any] = {"color": GREY, "mfc": "white", "ms": 9, "mew": 1.6, "ls": ""}
    for name, values in records.references.items():
        # Copies have intra distance 0 by definition: drawn, it would only squeeze the curves.
        if x in values and y in values and (name, y) != ("shots", records.axes[1]):
            label, marker = REFERENCES.get(name, (name, "D"))
            axes.plot(values[x], values[y], marker=marker, label=label, **look)


def _moments(records: Records, adaptation: str, x: str, y: str) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Return the steps where two figures are known, and means and deviations over runs, `(steps, 2)`."""
    found = {
        step: [records.over_runs(adaptation, step, key) for key in (x, y)]
        for step in records.steps(adaptation)
    }
    known = {step: pair for step, pair in found.items() if all(map(len, pair))}
    means, spreads = (
        np.array([[moment(values) for values in pair] for pair in known.values()]).reshape(-1, 2)
        for moment in (np.mean, _deviation)
    )
    return list(known), means, spreads


def _deviation(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0
