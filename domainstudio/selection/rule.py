"""The rule that chooses among candidates: where more fidelity costs too much diversity, and before copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from domainstudio.config import ChooseSettings
from domainstudio.metrics.distances import Float64s
from domainstudio.selection.figures import Curve

Reason: TypeAlias = Literal["knee", "copies", "copying", "last", "only", "never"]
"""Why a step was chosen:

* `knee`: later steps lose more diversity than their fidelity is worth.
* `copies`: later steps copy training images.
* `copying`: all candidates that have learned something copy; of these, the earliest is taken.
* `last`: the last step is still the best.
* `only`: there is one candidate.
* `never`: no candidate came nearer to the domain, or has two samples to compare in it; the last is taken.
"""

SURE = 2.0
"""Standard errors by which a gain must exceed 0 to count as one."""


@dataclass(frozen=True)
class Choice:
    """The chosen step, the reason, and the value of each step (NaN where it has none)."""

    step: int
    reason: Reason
    values: Mapping[int, float]

    @property
    def warning(self) -> str | None:
        """What to do about a training whose best candidate is not in it."""
        return {
            "last": "the last step is still the best one: train longer to see the knee",
            "copying": "every candidate that came nearer to the domain copies training images: lower "
            "finetune.candidate_every or finetune.learning_rate",
            "never": "no candidate came nearer to the domain than the source model is: train longer, or "
            "raise finetune.learning_rate",
        }.get(self.reason)


def choose(curves: Mapping[int, Curve], rule: ChooseSettings) -> Choice:
    """Choose one of the candidates.

    1. Candidates count that came nearer to the domain than chance alone does, and that come before the first
       one whose share of copies exceeds `max_copies`. If there is none before it, the earliest one that came
       nearer is chosen, copies and all.
    2. The value of a candidate is V = F − g·(1 − D), with its fidelity F and diversity D (see `Curve`), both
       at most 1, and g = `gain_per_loss`. The source model has V = 0. Along a curve on which fidelity costs
       ever more diversity, V is largest where the gain ΔF per loss −ΔD has fallen to g.
    3. The candidate with the largest V is chosen, or the earliest that is its equal: whose V and F are both
       within one standard error of those. The error is that of the difference, over resamples of the seeds
       that all candidates share. (The one-standard-error rule of Breiman et al. 1984: between equals take the
       one that has trained less. Of F too, as an early candidate is varied by what the source has left.)

    A candidate's V is defined where two of its samples in the domain can be compared.

    Args:
        curves: Figures by step.
        rule: The limits.
    """
    steps = sorted(curves)
    values = {step: _value(curves[step], rule.gain_per_loss) for step in steps}
    shown = {step: float(value[0]) for step, value in values.items()}
    if len(steps) == 1:
        return Choice(steps[0], "only", shown)
    learned = [step for step in steps if _learned(curves[step]) and np.isfinite(shown[step])]
    if not learned:
        return Choice(steps[-1], "never", shown)
    allowed = [step for step in before_copies(curves, rule.max_copies) if step in learned]
    if not allowed:
        return Choice(learned[0], "copying", shown)
    chosen = _earliest_equal_of_the_best(allowed, curves, values)
    unlimited = _earliest_equal_of_the_best(learned, curves, values)
    if unlimited > allowed[-1]:
        return Choice(chosen, "copies", shown)
    return Choice(chosen, "last" if chosen == steps[-1] else "knee", shown)


def before_copies(curves: Mapping[int, Curve], max_copies: float) -> list[int]:
    """Return the steps before the first one whose share of copies is above the limit."""
    steps = sorted(curves)
    above = [step for step in steps if curves[step].copies[0] > max_copies]
    return [step for step in steps if not above or step < above[0]]


def _value(curve: Curve, gain_per_loss: float) -> Float64s:
    lost = 1 - np.minimum(curve.diversity, 1)
    return np.minimum(curve.fidelity, 1) - gain_per_loss * lost


def _learned(curve: Curve) -> bool:
    error = float(np.std(curve.fidelity[1:])) if len(curve.fidelity) > 1 else 0.0
    return bool(curve.fidelity[0] > SURE * error)


def _earliest_equal_of_the_best(
    steps: Sequence[int], curves: Mapping[int, Curve], values: Mapping[int, Float64s]
) -> int:
    best = max(steps, key=lambda step: values[step][0])
    return next(
        step
        for step in steps
        if _equal(values[step], values[best])
        and _equal(np.minimum(curves[step].fidelity, 1), np.minimum(curves[best].fidelity, 1))
    )


def _equal(one: Float64s, best: Float64s) -> bool:
    """Return whether a figure is within one standard error of the best candidate's, or above it."""
    behind = best - one
    drawn = behind[1:][np.isfinite(behind[1:])]
    return bool(behind[0] <= (float(np.std(drawn)) if len(drawn) else 0.0))
