"""The pictures of `benchmarks.curves`, drawn by matplotlib without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.curves import Difference, Records

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
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(16, 5.4), layout="constrained")
        first, second, third = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
        _trajectories(first, records, "frechet_distance", "intra_distance")
        first.set(title="Closeness against variety", xlabel="Fréchet distance  (← closer to the domain)")
        first.set_ylabel("intra distance  (more varied →)")
        x, y = ("density", "coverage") if _has(records, "coverage") else ("precision", "recall")
        _trajectories(second, records, x, y, annotate=False)
        second.set(title="Faithfulness against reach", xlabel=f"{x}  (more faithful →)")
        second.set_ylabel(f"{y}  (more of the domain →)")
        _along(third, records, "memorized_share")
        third.set(title="Memorised along training", xlabel="step", ylabel="share of memorised samples")
        third.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
        third.set_ylim(bottom=0)
        found = [axes.get_legend_handles_labels() for axes in (first, second)]
        shown = {
            label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)
        }
        figure.suptitle(records.network, x=0.995, ha="right", fontsize=8.5, color="#625f59")
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown))
        return figure


def differences(found: Mapping[str, Difference], baseline: str, names: Sequence[str]) -> Figure:
    """Intra distance minus the baseline's over the Fréchet distance, and the mean of each seed."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(2, 1), sharey=True)
        for position, (name, item) in enumerate(found.items()):
            colour = COLOURS[names.index(name) % len(COLOURS)]
            for row in item.by_seed:
                left.plot(item.levels, row, color=colour, alpha=0.25, lw=1)
            reached = np.isfinite(item.by_seed).all(axis=0)
            shared, rows = item.levels[reached], item.by_seed[:, reached]
            left.plot(shared, rows.mean(axis=0), color=colour, lw=2.4, label=name)
            if len(rows) > 1:
                spread = rows.std(axis=0, ddof=1)
                mean = rows.mean(axis=0)
                left.fill_between(shared, mean - spread, mean + spread, color=colour, alpha=0.14, lw=0)
            _strip(right, position, item.means, colour)
        for axes in (left, right):
            axes.axhline(0, color="#1c1b19", lw=1)
        left.set(title=f"Intra distance minus that of {baseline}", xlabel="at equal Fréchet distance")
        left.set_ylabel("difference  (above 0: more varied)")
        left.legend(loc="upper right")
        right.set(title="Mean of each seed", xticks=range(len(found)), xticklabels=list(found))
        right.set_xlim(-0.6, len(found) - 0.4)
        right.grid(visible=False, axis="x")
        return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as `<path>.png` and `<path>.svg`, the same bytes for the same figures."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(path.with_name(path.name + ".png"), dpi=150, metadata={"Software": None})
        figure.savefig(path.with_name(path.name + ".svg"), metadata={"Date": None})


def _trajectories(axes: Axes, records: Records, x: str, y: str, *, annotate: bool = True) -> None:
    for index, adaptation in enumerate(records.names):
        colour = COLOURS[index % len(COLOURS)]
        for run in records.runs(adaptation).values():
            points = [(i.values[x], i.values[y]) for i in run if x in i.values and y in i.values]
            axes.plot(*np.array(points).reshape(-1, 2).T, color=colour, alpha=0.22, lw=1, marker=".", ms=3)
        steps = [s for s in records.steps(adaptation) if _measured(records, adaptation, s, x, y)]
        moments = [_moments(records, adaptation, step, x, y) for step in steps]
        means, spreads = (np.array([pair[i] for pair in moments]).reshape(-1, 2) for i in (0, 1))
        axes.errorbar(
            means[:, 0],
            means[:, 1],
            xerr=spreads[:, 0],
            yerr=spreads[:, 1],
            color=colour,
            label=adaptation,
            **POINTS,
        )
        for step, (px, py) in zip(steps, means, strict=True) if annotate else ():
            axes.annotate(
                f"{step}",
                (px, py),
                xytext=(6, 5 if index == 0 else -11),
                textcoords="offset points",
                fontsize=8,
                color=colour,
            )
    for name, values in records.references.items():
        # Copies have intra distance 0 by definition: drawn, it would only squeeze the curves.
        if x in values and y in values and (name, y) != ("shots", "intra_distance"):
            label, marker = REFERENCES.get(name, (name, "D"))
            axes.plot(
                values[x], values[y], marker, color="#625f59", mfc="white", ms=9, mew=1.6, ls="", label=label
            )


def _along(axes: Axes, records: Records, metric: str) -> None:
    for index, adaptation in enumerate(records.names):
        colour = COLOURS[index % len(COLOURS)]
        for run in records.runs(adaptation).values():
            points = [(i.step, i.values[metric]) for i in run if metric in i.values]
            axes.plot(*np.array(points).reshape(-1, 2).T, color=colour, alpha=0.22, lw=1)
        found = [
            (s, v) for s in records.steps(adaptation) if len(v := records.over_seeds(adaptation, s, metric))
        ]
        spread = [v.std(ddof=1) if len(v) > 1 else 0.0 for _, v in found]
        means = [v.mean() for _, v in found]
        axes.errorbar([step for step, _ in found], means, yerr=spread, color=colour, **POINTS)
    if metric in (domain := records.references.get("domain", {})):
        axes.axhline(domain[metric], color="#625f59", lw=1, ls="--")
        axes.annotate(
            "real images", (1, domain[metric]), xycoords=("axes fraction", "data"), ha="right", va="bottom"
        )


def _strip(axes: Axes, position: int, means: np.ndarray, colour: str) -> None:
    axes.plot(np.full(len(means), position), means, "o", color=colour, alpha=0.45, ms=6)
    spread = means.std(ddof=1) if len(means) > 1 else 0.0
    axes.errorbar(position + 0.18, means.mean(), yerr=spread, color=colour, marker="D", ms=7, lw=2, capsize=4)


def _measured(records: Records, adaptation: str, step: int, *metrics: str) -> bool:
    return all(len(records.over_seeds(adaptation, step, metric)) for metric in metrics)


def _moments(records: Records, adaptation: str, step: int, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (0 for a single seed) over seeds of two figures, each `(2,)`."""
    values = [records.over_seeds(adaptation, step, metric) for metric in (x, y)]
    means = np.array([v.mean() for v in values])
    return means, np.array([v.std(ddof=1) if len(v) > 1 else 0.0 for v in values])


def _has(records: Records, metric: str) -> bool:
    return any(metric in item.values for item in records.measurements)
