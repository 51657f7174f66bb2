"""The gate: decides from the figures of two models whether the new one becomes the champion, and why."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from domainstudio.config import GateSettings

TITLES = {
    "frechet_distance_infinity": "Fréchet distance ∞",
    "frechet_distance": "Fréchet distance",
    "kid": "kernel distance",
    "intra_distance_in_domain": "intra distance in the domain",
    "intra_distance": "intra distance",
    "attributes_kept": "attributes kept",
    "top_1": "subject kept",
    "memorized_share": "memorised",
}
"""The compared figures by their key in metrics.json. All but the last have a tolerance."""

FLOORS = {"in_domain_share": "in the domain", "precision": "precision", "number": "samples"}
"""What a model needs at least, whatever the champion has."""

_TOO_LITTLE = {
    "in_domain_share": "too few samples in the domain",
    "precision": "too little precision",
    "number": "too few samples",
}

Outcome = Literal["promoted", "refused", "not comparable"]

HIGHER_IS_BETTER = frozenset({"intra_distance_in_domain", "intra_distance", "attributes_kept", "top_1"})
SHARES = frozenset({"attributes_kept", "top_1", "memorized_share", "in_domain_share", "precision"})

INSTEAD = {
    "frechet_distance": "frechet_distance_infinity",
    "intra_distance": "intra_distance_in_domain",
}
"""Figures that count only where a model lacks the sounder one, as models of older versions do."""

OPTIONAL = frozenset({"attributes_kept", "top_1"})
"""Figures that only some models have."""

REMEDY = ". Promote by hand, or register again where the champion can be drawn and measured in the same way"

ROUNDING = 1e-9
"""Tolerance for the rounding error of a figure that lies exactly on a limit, as a share of the figure."""


@dataclass(frozen=True)
class Measurement:
    """The figures of a model and their conditions.

    Attributes:
        figures: By name; None if a figure is not defined or not finite.
        conditions: Everything but the model that the figures depend on, named for people. Figures are
            comparable if all conditions are equal.
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
        """Take the figures and conditions from the outputs of the stages.

        Args:
            metrics: `evaluation/<adaptation>/metrics.json`.
            samples: The manifest of the samples.
            shots: Content hash of the training images.
            domain: Content hash of the whole target domain.
            threshold: Distance below which a sample counted as memorised.

        Raises:
            KeyError: the files lack a value.
        """
        parts = (metrics, metrics.get("attributes", {}), metrics.get("paired", {}))
        measured = {key: value for part in parts for key, value in part.get("samples", {}).items()}
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
        measured["number"] = metrics["number"]
        return cls({name: _finite(measured.get(name)) for name in (*TITLES, *FLOORS)}, conditions)

    def figure(self, name: str) -> float | None:
        """Return a figure; None if it was not measured or is not finite."""
        return _finite(self.figures.get(name))

    @property
    def digest(self) -> str:
        """Hash of figures and conditions."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the text of `to_json`."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """Return figures and conditions as JSON; equal measurements give equal texts."""
        return json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)


@dataclass(frozen=True)
class Check:
    """One figure of both models, compared.

    Attributes:
        name: Key in metrics.json.
        candidate: The new model's figure; None if it was not measured.
        champion: The champion's figure; None if there is none to compare with.
        allowed: How much worse the candidate may be, as a share of the champion's figure. For
            `memorized_share` it is the largest value, for those of `FLOORS` the smallest.
        passed: Whether the candidate is not worse than allowed.
        improved: Whether the candidate is better by the margin.
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
        title = _title(self.name)
        if self.candidate is None:
            return f"{title} not measured"
        against = "" if self.champion is None else f" against {self._show(self.champion)}"
        return f"{title} {self._show(self.candidate)}{against}{self._limit}"

    @property
    def fault(self) -> str:
        """What is wrong with the candidate's figure, if the check has not passed."""
        if self.candidate is None:
            return f"{_title(self.name)} is missing or not finite"
        if self.name in FLOORS:
            return _TOO_LITTLE[self.name]
        return "memorises too much" if self.name == "memorized_share" else f"worse {TITLES[self.name]}"

    @property
    def _limit(self) -> str:
        if self.name == "memorized_share":
            return f" (allowed {_percent(self.allowed)})"
        if self.name in FLOORS:
            return f" (at least {self._show(self.allowed)})"
        if self.champion is None or self.candidate is None:
            return ""
        change = (self.candidate - self.champion) / abs(self.champion) if self.champion else None
        shown = f"{change:+.1%}, " if change is not None else ""
        sign = "-" if self.name in HIGHER_IS_BETTER else "+"
        return f" ({shown}allowed {sign}{_percent(self.allowed)})"

    def _show(self, value: float) -> str:
        return _percent(value) if self.name in SHARES else f"{value:.4g}"


@dataclass(frozen=True)
class Verdict:
    """The gate's decision."""

    outcome: Outcome
    reason: str
    """One line for people."""
    checks: tuple[Check, ...]
    candidate: Measurement
    champion: Measurement | None

    @property
    def promoted(self) -> bool:
        """Whether the candidate becomes the champion."""
        return self.outcome == "promoted"

    def to_json(self) -> dict[str, Any]:
        """Return the verdict with both measurements."""
        return {"format": 1, **asdict(self)}


def decide(candidate: Measurement, champion: Measurement | None, gate: GateSettings | None) -> Verdict:
    """Compare a candidate with the champion.

    The candidate is promoted if all its figures were measured, it memorises no more than allowed, enough
    samples are in the domain, no figure is worse than tolerated, and at least one is better by the margin.
    The first model needs only the first three. A figure that is missing or not finite never wins.

    Args:
        candidate: Measurement of the new model.
        champion: Measurement of the present champion; None if there is none. An empty measurement stands for
            a champion of which nothing is known.
        gate: The rules; None promotes each new model.
    """
    if gate is None:
        reason = "the newest result; registry.gate is null: no rules"
        return Verdict("promoted", reason, (), candidate, champion)
    differing = [] if champion is None else _differences(candidate, champion, gate)
    checks = _checks(candidate, None if differing else champion, gate)
    outcome, head = _outcome(checks, champion is None, differing, gate)
    remedy = REMEDY if outcome == "not comparable" else ""
    reason = f"{head}: {'; '.join(check.sentence for check in checks)}{remedy}"
    return Verdict(outcome, reason, tuple(checks), candidate, champion)


def _outcome(
    checks: Sequence[Check], first: bool, differing: Sequence[str], gate: GateSettings
) -> tuple[Outcome, str]:
    if failed := [check for check in checks if not check.passed]:
        return "refused", ", ".join(check.fault for check in failed)
    if first:
        return "promoted", "there is no champion to compare with"
    if differing:
        return "not comparable", f"not comparable with the champion ({', '.join(differing)})"
    if better := [TITLES[check.name] for check in checks if check.improved]:
        return "promoted", f"better {' and '.join(better)}"
    titles = " or ".join(TITLES[check.name] for check in checks if check.name != "memorized_share")
    return "refused", f"not better by {_percent(gate.margin)} in {titles}"


def _differences(candidate: Measurement, champion: Measurement, gate: GateSettings) -> list[str]:
    """Return why two measurements cannot be compared; nothing if they can."""
    if not champion.conditions:
        return ["the champion's figures are not known"]
    own, other = candidate.conditions, champion.conditions
    differing = [
        f"{name} {own.get(name) or 'none'}, the champion's {other.get(name) or 'none'}"
        for name in sorted({*own, *other})
        if own.get(name) != other.get(name)
    ]
    missing = [name for name in _tolerances(candidate, champion, gate) if champion.figure(name) is None]
    return differing + [f"the champion has no {TITLES[name]}" for name in missing]


def _checks(candidate: Measurement, champion: Measurement | None, gate: GateSettings) -> list[Check]:
    def both(name: str) -> tuple[str, float | None, float | None]:
        return name, candidate.figure(name), champion.figure(name) if champion else None

    tolerances = _tolerances(candidate, champion, gate)
    checks = [_relative(*both(name), tolerance, gate.margin) for name, tolerance in tolerances.items()]
    share, ceiling = candidate.figure("memorized_share"), gate.max_memorized_share
    passed = share is not None and share <= ceiling
    return [*checks, Check(*both("memorized_share"), ceiling, passed), *_floors(candidate, gate)]


def _floors(candidate: Measurement, gate: GateSettings) -> list[Check]:
    """Check what a model needs at least; a check that passes is not worth a word."""
    floors = {
        "in_domain_share": gate.min_in_domain_share,
        "precision": gate.min_precision,
        "number": float(gate.min_samples),
    }
    found = {name: candidate.figure(name) for name in floors}
    return [
        Check(name, value, None, floors[name], passed=False)
        for name, value in found.items()
        if value is not None and value < floors[name]
    ]


def _relative(
    name: str, candidate: float | None, champion: float | None, tolerance: float, margin: float
) -> Check:
    if candidate is None or champion is None:
        return Check(name, candidate, champion, tolerance, passed=candidate is not None)
    gain = candidate - champion if name in HIGHER_IS_BETTER else champion - candidate
    scale = abs(champion)
    passed = gain >= -scale * (tolerance + ROUNDING)
    improved = gain > 0 and gain >= scale * (margin - ROUNDING)
    return Check(name, candidate, champion, tolerance, passed, improved)


def _tolerances(candidate: Measurement, champion: Measurement | None, gate: GateSettings) -> dict[str, float]:
    """Return the tolerance of each compared figure.

    A figure of `OPTIONAL` counts if one of the models has it. Of a pair in `INSTEAD` the sounder one counts
    if it has a tolerance and all models have it, otherwise the other one.
    """
    measurements = [candidate] if champion is None else [candidate, champion]
    tolerances = {name: value for name, value in gate.tolerance.model_dump().items() if value is not None}
    unused = {
        name for name in OPTIONAL if all(measurement.figure(name) is None for measurement in measurements)
    }
    for older, sounder in INSTEAD.items():
        known = all(measurement.figure(sounder) is not None for measurement in measurements)
        unused.add(older if known and sounder in tolerances else sounder)
    return {name: value for name, value in tolerances.items() if name not in unused}


def _title(name: str) -> str:
    return {**TITLES, **FLOORS}[name]


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def span(seeds: Sequence[int]) -> str:
    """Return seeds in short: `1000-1199` if they are consecutive, else a hash."""
    first, last = seeds[0], seeds[-1]
    return f"{first}-{last}" if list(seeds) == list(range(first, last + 1)) else _short_hash(seeds)


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _short_hash(values: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(list(values)).encode()).hexdigest()[:12] if any(values) else ""
