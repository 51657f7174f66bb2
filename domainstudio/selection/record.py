"""What a choice leaves behind: `selection.json`, and a row of pictures of each candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from domainstudio.config import ChooseSettings
from domainstudio.data import grid
from domainstudio.data.pictures import write_png
from domainstudio.errors import DataError
from domainstudio.metrics.distances import Float64s
from domainstudio.sampling import Images, load_samples
from domainstudio.selection.figures import Curve, Yardstick
from domainstudio.selection.rule import Choice, Reason
from domainstudio.storage.files import write_text

FILE = "selection.json"
SHOWN = 10
"""Samples of each candidate that are shown, from the same noise."""


class Interval(BaseModel):
    """A figure with its 95% interval over resamples of the seeds; None where it is not defined."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Float64s) -> Self:
        """Return the first value, with the 2.5th and 97.5th percentile of the others."""
        drawn = values[1:][np.isfinite(values[1:])]
        low, high = np.percentile(drawn, (2.5, 97.5)).tolist() if len(drawn) else (None, None)
        return cls(value=_finite(values[0]), low=low, high=high)


class Measured(BaseModel):
    """A candidate's figures (see `selection.figures.Curve`), and its value by the rule."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    name: str
    fidelity: Interval
    diversity: Interval
    copies: Interval
    in_domain: Interval
    value: float | None

    @classmethod
    def of(cls, step: int, name: str, curve: Curve, choice: Choice) -> Self:
        """Return a candidate's record."""
        figures = {
            key: Interval.of(getattr(curve, key)) for key in ("fidelity", "diversity", "copies", "in_domain")
        }
        return cls(step=step, name=name, value=_finite(choice.values[step]), **figures)


class Selection(BaseModel):
    """`selection.json`: the chosen candidate, why it was chosen, and what was measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    chosen: int
    """The chosen step."""
    reason: Reason
    why: str
    """The reason in words."""
    warning: str | None
    rule: ChooseSettings
    features: str
    """The network that measured."""
    copies_below: float
    """Perceptual distance to a training image below which a sample is a copy."""
    false_alarms: float
    """Share of the training images that would count as copies of another one."""
    probe_accuracy: float
    """How surely the probe tells the domain from the source: by cross-validation, 0.5 is chance."""
    candidates: tuple[Measured, ...]
    left_out: Mapping[str, str] = {}
    """Files that cannot be used, each with the reason."""

    @classmethod
    def of(
        cls,
        choice: Choice,
        rule: ChooseSettings,
        yardstick: Yardstick,
        features: str,
        candidates: Sequence[Measured],
    ) -> Self:
        """Return the record of a choice."""
        return cls(
            chosen=choice.step,
            reason=choice.reason,
            why=WHY[choice.reason],
            warning=choice.warning,
            rule=rule,
            features=features,
            copies_below=yardstick.threshold,
            false_alarms=yardstick.false_alarms,
            probe_accuracy=yardstick.probe.accuracy,
            candidates=tuple(candidates),
        )

    @property
    def best(self) -> Measured:
        """The chosen candidate."""
        return next(each for each in self.candidates if each.step == self.chosen)

    @property
    def summary(self) -> str:
        """The choice in one line."""
        best, number = self.best, len(self.candidates)
        figures = {"fidelity": best.fidelity, "diversity": best.diversity, "copies": best.copies}
        shown = ", ".join(
            f"{name} {each.value:.2f}" for name, each in figures.items() if each.value is not None
        )
        return f"{best.name} of {number} candidates ({self.why}): {shown}"

    @property
    def origin(self) -> dict[str, Any]:
        """What a model's provenance says of the choice."""
        return {
            "step": self.chosen,
            "reason": self.reason,
            "why": self.why,
            "candidates": len(self.candidates),
        }

    def write(
        self, folder: Path, source: Path, samples: Mapping[str, Path], shots: Images | None = None
    ) -> None:
        """Write the record, and the first samples of the source model and of each candidate in a row.

        Args:
            folder: Where to write.
            source: Folder of the source model's samples.
            samples: Folder of samples of each candidate, by its name.
            shots: The training images, for a row of their own.
        """
        folder.mkdir(parents=True, exist_ok=True)
        rows = {name: load_samples(drawn) for name, drawn in {"source": source, **samples}.items()}
        for name, images in (rows if shots is None else {**rows, "shots": shots}).items():
            write_png(grid(images[:SHOWN], SHOWN), folder / f"{name}.png")
        write_text(folder / FILE, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read a folder's record; None where there is none.

        Raises:
            DataError: it cannot be understood.
        """
        path = folder / FILE
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValidationError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path} cannot be understood: {error}. Run the stage that writes it again"
            ) from error


WHY: Mapping[Reason, str] = {
    "knee": "further training loses more diversity than its fidelity is worth",
    "copies": "further training copies training images",
    "copying": "all that came nearer to the domain copy training images, and this is the first",
    "last": "still the best at the last step: train longer to see the knee",
    "only": "there is no other",
    "never": "none came nearer to the domain than the source model is, or too few samples did to compare",
}
"""The reasons in words."""


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
