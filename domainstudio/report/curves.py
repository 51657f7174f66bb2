"""The report's curves as inline SVG: they take the page's colours, light or dark, and stay sharp in print.

Not by matplotlib: its SVG of a panel is five times as large (16 kB), and its ids, clip paths and style sheet
must be cut out before several can stand in one page that loads nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 340, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26
BINS = 60
LOG_ABOVE = 8.0
"""Positive values that span more than this factor are drawn on a logarithmic axis."""


@dataclass(frozen=True)
class Series:
    """One logged column of one run: steps and values, both `(rows,)`; `slot` names its colour."""

    name: str
    slot: int
    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Summary:
    """A series in at most `BINS` bins: mean, and the 10th to 90th percentile of each."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Point:
    """A labelled point of a scatter plot; `slot` is `None` for a reference."""

    label: str
    x: float
    y: float
    slot: int | None


@dataclass(frozen=True)
class Front:
    """Points of one adaptation along a setting, joined by a line of its colour."""

    slot: int
    points: tuple[Point, ...]


class Axis:
    """A linear or logarithmic axis from data to SVG units, with its ticks."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool = False) -> None:
        """Cover `low .. high` by `start .. end`; an empty range is widened."""
        if high <= low:
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    def __call__(self, value: float) -> float:
        """Position of a value, clipped to the axis."""
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, self._clip(value)))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def _clip(self, value: float) -> float:
        return min(max(float(value), self.low), self.high)

    def ticks(self, number: int = 4) -> list[float]:
        """Round values inside the axis, about `number` of them."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1,), (1, 3), (1, 2, 5)):
                found = [d * 10.0**e for e in decades for d in digits if self.low <= d * 10.0**e <= self.high]
                if len(found) >= 3:
                    return found[:: math.ceil(len(found) / 5)]
            return found
        rough = (self.high - self.low) / number
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def summarize(series: Series) -> Summary | None:
    """Bin a series along its rows, leaving out values that are not finite; `None` if none is."""
    finite = np.isfinite(series.values)
    if not finite.any():
        return None
    steps, values = series.steps[finite], series.values[finite]
    bins = [part for part in np.array_split(np.arange(len(values)), BINS) if len(part)]
    low, high = (np.array([np.quantile(values[part], q) for part in bins]) for q in (0.1, 0.9))
    return Summary(
        steps=np.array([steps[part].mean() for part in bins]),
        mean=np.array([values[part].mean() for part in bins]),
        low=low,
        high=high,
    )


def loss_panel(shown: Series, context: Sequence[Series]) -> Markup | None:
    """One column along training: mean and spread of `shown` over the means of the same column elsewhere.

    Returns `None` when there is nothing finite to draw.
    """
    summary = summarize(shown)
    if summary is None:
        return None
    others = [(series, other) for series in context if (other := summarize(series)) is not None]
    low = min([summary.low.min(), *(other.mean.min() for _, other in others)])
    high = max([summary.high.max(), *(other.mean.max() for _, other in others)])
    log = low > 0 and high / low > LOG_ABOVE
    end = max(float(series.steps.max()) for series in (shown, *(series for series, _ in others)))
    x = Axis(0.0, end, LEFT, WIDTH - RIGHT)
    margin = 0.0 if log else 0.04 * (high - low)
    y = Axis(low - margin, high + margin, HEIGHT - BOTTOM, TOP, log=log)
    band = [
        *zip(summary.steps, summary.high, strict=True),
        *zip(summary.steps[::-1], summary.low[::-1], strict=True),
    ]
    parts = [
        _frame(x, y),
        *(_line(other.steps, other.mean, x, y, f"context s{series.slot}") for series, other in others),
        f'<path class="band s{shown.slot}" d="{_path(band, x, y)}Z"/>',
        _line(summary.steps, summary.mean, x, y, f"line s{shown.slot}"),
    ]
    scale = "logarithmic" if log else "linear"
    return _svg(parts, f"{shown.name} along training, {scale} scale, last value {summary.mean[-1]:.3g}")


def candidates_panel(
    name: str,
    steps: Sequence[float],
    bounds: Sequence[tuple[float, float, float]],
    chosen: float,
    slot: int,
    limit: float | None = None,
) -> Markup | None:
    """A figure of candidates along training with its interval; the chosen step and a limit are marked.

    Args:
        name: what the figure is.
        steps: of the candidates for which it is defined, ascending.
        bounds: low end, value and high end of each.
        chosen: the chosen step.
        slot: the colour.
        limit: a value that is not to be exceeded.
    """
    if not steps:
        return None
    low, _, high = zip(*bounds, strict=True)
    top = max(*high, limit or 0.0, 1e-6)
    x = Axis(0.0, max(*steps, chosen), LEFT, WIDTH - RIGHT - 6)
    y = Axis(min(0.0, *low), top * 1.05, HEIGHT - BOTTOM, TOP)
    band = [*zip(steps, high, strict=True), *zip(reversed(steps), reversed(low), strict=True)]
    values = np.array([value for _, value, _ in bounds])
    parts = [_frame(x, y), f'<path class="chosen" d="M{x(chosen):.1f} {TOP}V{HEIGHT - BOTTOM}"/>']
    if limit is not None:
        parts.append(f'<path class="threshold" d="M{LEFT} {y(limit):.1f}H{WIDTH - RIGHT}"/>')
    parts += [f'<path class="band s{slot % 6}" d="{_path(band, x, y)}Z"/>']
    parts += [_line(np.array(steps), values, x, y, f"line s{slot % 6}")]
    for step, value in zip(steps, values, strict=True):
        radius = 5 if step == chosen else 2.8
        parts.append(
            f'<circle class="point s{slot % 6}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="{radius}"/>'
        )
    described = ", ".join(f"{step:g}: {value:.3g}" for step, value in zip(steps, values, strict=True))
    return _svg(parts, f"{name} of the candidates by step. {described}. Chosen: {chosen:g}")


def scatter(points: Sequence[Point], x_label: str, y_label: str) -> Markup | None:
    """One figure against another, with labels; `None` when no adaptation is among the points."""
    if not any(point.slot is not None for point in points):
        return None
    return _plane(points, (), x_label, y_label)


def fronts(lines: Sequence[Front], references: Sequence[Point], x_label: str, y_label: str) -> Markup | None:
    """One figure against another along a setting: a line for each adaptation; `None` where there is none."""
    if not lines:
        return None
    points = [point for line in lines for point in line.points]
    return _plane([*points, *references], lines, x_label, y_label)


def _plane(points: Sequence[Point], lines: Sequence[Front], x_label: str, y_label: str) -> Markup:
    """Draw labelled points, and lines through some of them."""
    width, height = 520, 320
    xs, ys = [point.x for point in points], [point.y for point in points]
    spread_x, spread_y = (max(v) - min(v) or abs(max(v)) or 1.0 for v in (xs, ys))
    left = min(xs) - 0.1 * spread_x
    x = Axis(left if min(xs) < 0 else max(0.0, left), max(xs) + 0.1 * spread_x, 52, width - 12)
    y = Axis(max(0.0, min(ys) - 0.15 * spread_y), max(ys) + 0.15 * spread_y, height - 42, 12)
    parts = [_frame(x, y, width, height, left=52, bottom=42)]
    parts += [
        f'<text class="axis end" x="{width - 12}" y="{height - 4}">{escape(x_label)}</text>',
        f'<text class="axis end" transform="rotate(-90)" x="-12" y="11">{escape(y_label)}</text>',
    ]
    for line in lines:
        path = _path([(point.x, point.y) for point in line.points], x, y)
        parts.append(f'<path class="line s{line.slot}" d="{path}"/>')
    labels = _spaced([y(point.y) for point in points], 15.0)
    parts += [_marked(point, at, x, y, width) for point, at in zip(points, labels, strict=True)]
    described = "; ".join(f"{point.label}: {point.x:.3g}, {point.y:.3g}" for point in points)
    return _svg(parts, f"{x_label} and {y_label}. {described}", width, height)


def _marked(point: Point, label_y: float, x: Axis, y: Axis, width: int) -> str:
    """Return a point with its label beside it, at a height of its own."""
    kind = "reference" if point.slot is None else f"point s{point.slot}"
    px, py = x(point.x), y(point.y)
    side, anchor = (1, "start") if px < 0.62 * width else (-1, "end")
    return (
        f'<path class="leader" d="M{px:.1f} {py:.1f}L{px + 9 * side:.1f} {label_y:.1f}"/>'
        f'<circle class="{kind}" cx="{px:.1f}" cy="{py:.1f}" r="5.5"/>'
        f'<text class="label" x="{px + 11 * side:.1f}" y="{label_y + 4:.1f}" text-anchor="{anchor}">'
        f"{escape(point.label)}</text>"
    )


def histogram(distances: Sequence[float], threshold: float, slot: int) -> Markup | None:
    """How far the samples are from their nearest training image, and the threshold of memorisation."""
    if not distances:
        return None
    width, height = 520, 110
    top = max([*distances, threshold]) * 1.05 or 1.0
    # A whole number of bins below the threshold, so that no bar straddles it.
    step = threshold / max(1, round(40 * threshold / top)) if threshold > 0 else top / 40
    counts, edges = np.histogram(distances, bins=np.arange(math.ceil(top / step) + 1) * step)
    top = float(edges[-1])
    x = Axis(0.0, top, 8, width - 8)
    y = Axis(0.0, float(counts.max()), height - BOTTOM, 18)
    parts = [f'<path class="grid" d="M8 {height - BOTTOM}H{width - 8}"/>']
    for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            kind = "near" if right <= threshold + 1e-9 else f"s{slot}"
            parts.append(
                f'<rect class="bar {kind}" x="{x(left) + 0.5:.1f}" y="{y(count):.1f}" '
                f'width="{x(right) - x(left) - 1:.1f}" height="{height - BOTTOM - y(count):.1f}"/>'
            )
    at = x(threshold)
    anchor = "start" if at < width / 2 else "end"
    parts.append(f'<path class="threshold" d="M{at:.1f} 6V{height - BOTTOM}"/>')
    parts.append(
        f'<text class="label" x="{at + (5 if anchor == "start" else -5):.1f}" y="14" text-anchor="{anchor}">'
        f"memorised below {threshold:g}</text>"
    )
    parts += [f'<text class="tick mid" x="{x(t):.1f}" y="{height - 9}">{t:g}</text>' for t in x.ticks(5)]
    return _svg(
        parts, f"Distances of {len(distances)} samples to their nearest training image", width, height
    )


def _frame(
    x: Axis, y: Axis, width: int = WIDTH, height: int = HEIGHT, left: int = LEFT, bottom: int = BOTTOM
) -> str:
    parts = []
    for tick in y.ticks():
        parts.append(f'<path class="grid" d="M{left} {y(tick):.1f}H{width - RIGHT}"/>')
        parts.append(f'<text class="tick end" x="{left - 6}" y="{y(tick) + 3.5:.1f}">{tick:.4g}</text>')
    for tick in x.ticks():
        parts.append(f'<text class="tick mid" x="{x(tick):.1f}" y="{height - bottom + 15}">{tick:.6g}</text>')
    return "".join(parts)


def _line(steps: np.ndarray, values: np.ndarray, x: Axis, y: Axis, kind: str) -> str:
    return f'<path class="{kind}" d="{_path(list(zip(steps, values, strict=True)), x, y)}"/>'


def _path(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
    return "M" + "L".join(f"{x(px):.1f} {y(py):.1f}" for px, py in points)


def _spaced(positions: Sequence[float], gap: float) -> list[float]:
    """Move positions apart, downwards in their order, until neighbours are at least `gap` apart."""
    placed = list(positions)
    order = sorted(range(len(placed)), key=lambda i: placed[i])
    for above, below in pairwise(order):
        placed[below] = max(placed[below], placed[above] + gap)
    return placed


def _svg(parts: Sequence[str], description: str, width: int = WIDTH, height: int = HEIGHT) -> Markup:
    label = escape(description)
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    )
