"""Nearness against variety as the source model takes more or less part in drawing: a figure for each mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from domainstudio.config import Combination, SwitchSettings
from domainstudio.report import curves
from domainstudio.report.reading import Results, TradeoffPoint
from domainstudio.report.tables import number

NEARNESS, VARIETY = "kid", "intra_distance_in_domain"
"""Keys of the two figures. The kernel distance has no bias, however few the samples are."""

LABELS = "kernel distance (← closer to the domain)", "intra distance in the domain (more varied →)"
ADVICE = (
    "Up and to the left is better, but only as high as real images go. {} Names mark the adapted model alone."
)
MODES = {
    "switch above": ("The source model draws first", "Numbers: the noise level above which it draws."),
    "switch below": ("The source model draws last", "Numbers: the noise level below which it draws."),
    "guide": ("Guided away from the source model", "Numbers: the weight; 1 is the adapted model alone."),
    "interpolate": ("Weights between both models", "Numbers: the weight of the adapted model."),
}


def figures(results: Sequence[Results], slots: Mapping[str, int]) -> list[tuple[str, str, Markup]]:
    """Return name, advice and drawing of each mode that was measured.

    Args:
        results: of one target.
        slots: the adaptations' colours.
    """
    found = []
    for mode, (name, meaning) in MODES.items():
        lines = [line for item in results if (line := _line(item, mode, slots)) is not None]
        drawing = curves.fronts(lines, _references(results), *LABELS)
        if drawing is not None:
            found.append((f"{name}.", ADVICE.format(meaning), drawing))
    return found


def value(combination: Combination) -> float:
    """Return a combination's weight or noise level."""
    return combination.at if isinstance(combination, SwitchSettings) else combination.weight


def mode_of(combination: Combination) -> str:
    """Return a key of `MODES`."""
    if isinstance(combination, SwitchSettings):
        return f"{combination.mode} {combination.source}"
    return combination.mode


def _line(results: Results, mode: str, slots: Mapping[str, int]) -> curves.Front | None:
    """Return the points of one mode in the order of their values, the adapted model alone among them."""
    points = results.tradeoff.points if results.tradeoff else ()
    alone = 0.0 if mode == "switch below" else 1.0
    chosen: list[tuple[float, TradeoffPoint]] = [
        (alone if point.combination is None else value(point.combination), point)
        for point in points
        if point.combination is None or mode_of(point.combination) == mode
    ]
    if all(point.combination is None for _, point in chosen):
        return None
    placed = []
    for at, point in sorted(chosen, key=lambda pair: pair[0]):
        x, y = number(point.scores, NEARNESS), number(point.scores, VARIETY)
        if x is not None and y is not None:
            label = results.adaptation.name if point.combination is None else f"{at:g}"
            placed.append(curves.Point(label, x, y, slots[results.adaptation.name]))
    return curves.Front(slots[results.adaptation.name], tuple(placed)) if placed else None


def _references(results: Sequence[Results]) -> list[curves.Point]:
    for item in results:
        scores = item.tradeoff.references.get("domain") if item.tradeoff else None
        x, y = number(scores, NEARNESS), number(scores, VARIETY)
        if x is not None and y is not None:
            return [curves.Point("real images", x, y, None)]
    return []
