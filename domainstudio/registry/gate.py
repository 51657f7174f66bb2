"""The gate: whether a model takes the champion's place, from what was measured of both, and why."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from domainstudio.config import GateSettings

Outcome = Literal["promoted", "refused", "not comparable"]

TITLES = {
    "frechet_distance": "Fréchet distance",
    "kid": "kernel distance",
    "intra_distance": "intra distance",
    "top_1": "subject kept",
    "memorized_share": "memorised",
}
"""Figures that the gate looks at; those but the last have a tolerance."""

HIGHER_IS_BETTER = frozenset({"intra_distance", "top_1"})
SHARES = frozenset({"top_1", "memorized_share"})

REMEDY = ". Promote by hand, or register again where the champion can be drawn and measured in the same way"

ROUNDING = 1e-9
"""What the last bits of a float may take from a figure that stands exactly on a limit, as a share of it."""


@dataclass(frozen=True)
class Measurement:
    """What was measured of a model, and how.

    Attributes:
        figures: By name; None where it is not defined or not finite.
        conditions: All but the model that the figures depend on, by a name that people understand. Figures
            compare where all of them are equal.
    """

    figures: Mapping[str, float | None]
    conditions: Mapping[str, str]

    @classmethod
    def of(
        cls,
        metrics: Mapping[str, Any],
        samples: Mapping[str, Any],
        shots: str,
        domain: str,
        threshold: float,
    ) -> Self:
        """Gather what the stages have written.

        Args:
            metrics: `evaluation/<adaptation>/metrics.json`.
            samples: the manifest of the samples.
            shots: content hash of the training images.
            domain: content hash of the whole target domain.
            threshold: distance below which a sample counted as memorised.

        Raises:
            KeyError: the files lack something.
        """
        measured = {**metrics["samples"], **metrics.get("paired", {}).get("samples", {})}
        images = samples["images"]
        conditions = {
            "feature network": f"{metrics['features']} {metrics['features_digest'][:12]}",
            "number of samples": str(metrics["number"]),
            "seeds": span([image["seed"] for image in images]),
            "scheduler": str(samples["scheduler"]),
            "denoising steps": str(samples["steps"]),
            "guidance": f"{samples.get('guidance_scale', 1):g}",
            "negative": str(samples.get("negative", "")),
            "subjects": _short_hash([image.get("subject", "") for image in images]),
            "target domain": domain[:12],
            "training images": shots[:12],
            "memorised below": f"{threshold:g}",
        }
        return cls({name: _finite(measured.get(name)) for name in TITLES}, conditions)

    def figure(self, name: str) -> float | None:
        """Return a figure; None where it was not measured or is not finite."""
        return _finite(self.figures.get(name))

    @property
    def digest(self) -> str:
        """Hash that only the same measurement has."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` has written."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """Return the same text for the same measurement."""
        return json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)


@dataclass(frozen=True)
class Check:
    """A figure of both models, and what the gate makes of it.

    Attributes:
        name: Key in metrics.json.
        candidate: The new model's figure; None where it was not measured.
        champion: The champion's; None where there is none to compare with.
        allowed: The largest share of the champion's figure by which it may be worse; of `memorized_share` the
            largest value.
        passed: Whether it is not worse than allowed.
        improved: Whether it is better by the margin.
    """

    name: str
    candidate: float | None
    champion: float | None
    allowed: float
    passed: bool
    improved: bool = False

    @property
    def sentence(self) -> str:
        """The figures in words: `Fréchet distance 253 against 248.1 (+2.0%, allowed +5%)`."""
        title = TITLES[self.name]
        if self.candidate is None:
            return f"{title} not measured"
        shown = f"{title} {self._show(self.candidate)}"
        if self.champion is not None:
            shown += f" against {self._show(self.champion)}"
        if self.name == "memorized_share":
            return f"{shown} (allowed {_percent(self.allowed)})"
        if self.champion is None:
            return shown
        change = (
            f"{(self.candidate - self.champion) / abs(self.champion):+.1%}, " if self.champion != 0 else ""
        )
        sign = "-" if self.name in HIGHER_IS_BETTER else "+"
        return f"{shown} ({change}allowed {sign}{_percent(self.allowed)})"

    def _show(self, value: float) -> str:
        return _percent(value) if self.name in SHARES else f"{value:.4g}"


@dataclass(frozen=True)
class Verdict:
    """What the gate decided."""

    outcome: Outcome
    reason: str
    """One line for people."""
    checks: tuple[Check, ...]
    candidate: Measurement
    champion: Measurement | None

    @property
    def promoted(self) -> bool:
        """Whether the candidate takes the champion's place."""
        return self.outcome == "promoted"

    def to_json(self) -> dict[str, Any]:
        """Return the verdict with all that it was made of."""
        return {"format": 1, **asdict(self)}


def decide(candidate: Measurement, champion: Measurement | None, gate: GateSettings | None) -> Verdict:
    """Compare a candidate with the champion.

    It is promoted if it was measured whole, memorises no more than allowed, is in no figure worse than
    tolerated, and in at least one better by the margin. The first model needs no more than the first two. A
    figure that is missing or not finite never wins.

    Args:
        candidate: what was measured of the new model.
        champion: what was measured of the model whose place it would take; None where there is none. Without
            conditions it is known that there is one, and nothing of it.
        gate: the rules; None promotes whatever is new.
    """
    if gate is None:
        return Verdict(
            "promoted", "the newest result; registry.gate is null: no rules", (), candidate, champion
        )
    differing = [] if champion is None else _differences(candidate, champion, gate)
    checks = _checks(candidate, None if differing else champion, gate)
    outcome, head = _outcome(checks, champion is None, differing, gate)
    remedy = REMEDY if outcome == "not comparable" else ""
    reason = f"{head}: {'; '.join(check.sentence for check in checks)}{remedy}"
    return Verdict(outcome, reason, tuple(checks), candidate, champion)


def span(seeds: Sequence[int]) -> str:
    """Return seeds in short: `1000-1199` where they follow each other, else a hash."""
    first, last = seeds[0], seeds[-1]
    return f"{first}-{last}" if list(seeds) == list(range(first, last + 1)) else _short_hash(seeds)


def _outcome(
    checks: Sequence[Check], first: bool, differing: Sequence[str], gate: GateSettings
) -> tuple[Outcome, str]:
    if failed := [check for check in checks if not check.passed]:
        return "refused", ", ".join(_fault(check) for check in failed)
    if first:
        return "promoted", "there is no champion to compare with"
    if differing:
        return "not comparable", f"not comparable with the champion ({', '.join(differing)})"
    if better := [TITLES[check.name] for check in checks if check.improved]:
        return "promoted", f"better {' and '.join(better)}"
    titles = " or ".join(TITLES[check.name] for check in checks if check.name != "memorized_share")
    return "refused", f"not better by {_percent(gate.margin)} in {titles}"


def _fault(check: Check) -> str:
    title = TITLES[check.name]
    if check.candidate is None:
        return f"{title} is missing or not finite"
    return "memorises too much" if check.name == "memorized_share" else f"worse {title}"


def _differences(candidate: Measurement, champion: Measurement, gate: GateSettings) -> list[str]:
    """Say what keeps two measurements from being compared."""
    if not champion.conditions:
        return ["its figures are not known"]
    here, there = candidate.conditions, champion.conditions
    differing = [
        f"{name} {here.get(name) or 'none'}, there {there.get(name) or 'none'}"
        for name in sorted({*here, *there})
        if here.get(name) != there.get(name)
    ]
    tolerances = _tolerances(candidate, champion, gate)
    return differing + [f"no {TITLES[name]} there" for name in tolerances if champion.figure(name) is None]


def _checks(candidate: Measurement, champion: Measurement | None, gate: GateSettings) -> list[Check]:
    def both(name: str) -> tuple[str, float | None, float | None]:
        return name, candidate.figure(name), champion.figure(name) if champion else None

    tolerances = _tolerances(candidate, champion, gate)
    checks = [_relative(*both(name), tolerance, gate.margin) for name, tolerance in tolerances.items()]
    share, ceiling = candidate.figure("memorized_share"), gate.max_memorized_share
    passed = share is not None and share <= ceiling
    return [*checks, Check(*both("memorized_share"), ceiling, passed)]


def _relative(
    name: str, candidate: float | None, champion: float | None, tolerance: float, margin: float
) -> Check:
    if candidate is None or champion is None:
        return Check(name, candidate, champion, tolerance, passed=candidate is not None)
    gain = candidate - champion if name in HIGHER_IS_BETTER else champion - candidate
    scale = abs(champion)
    return Check(
        *(name, candidate, champion, tolerance),
        passed=gain >= -scale * (tolerance + ROUNDING),
        improved=gain > 0 and gain >= scale * (margin - ROUNDING),
    )


def _tolerances(candidate: Measurement, champion: Measurement | None, gate: GateSettings) -> dict[str, float]:
    """Return the tolerance of each figure that counts; `top_1` only where models are told subjects."""
    told = any(item is not None and item.figure("top_1") is not None for item in (candidate, champion))
    return {
        name: value
        for name, value in gate.tolerance.model_dump().items()
        if value is not None and (name != "top_1" or told)
    }


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _short_hash(values: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(list(values)).encode()).hexdigest()[:12] if any(values) else ""
