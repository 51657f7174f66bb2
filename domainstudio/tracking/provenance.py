"""What a result came from: its record and its training log."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from domainstudio.config import Adaptation
from domainstudio.storage.files import output_file, write_text

_TRACKED = ("domainstudio", "torch", "diffusers", "accelerate")


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that a result depends on."""
    found = {}
    for name in _TRACKED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class Provenance(BaseModel):
    """Everything that decided an adapted model, stored beside it as `provenance.json`."""

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    adaptation: str
    key: str
    """SHA-256 of parameters and inputs; the same key means the same result."""
    params: dict[str, Any]
    """The resolved adaptation as it was when the model was trained, and the number of processes."""
    inputs: Mapping[str, str]
    """Content hashes of the source model and of the training images."""
    steps: int
    """Steps of the training."""
    chosen: Mapping[str, Any] | None = None
    """Which `step` of it the model is, and the `reason`, where one of several was chosen."""
    digest: str | None = None
    """SHA-256 of the model's files (`models.digest`), by which damage is noticed."""
    versions: dict[str, str] = Field(default_factory=versions)

    @property
    def step(self) -> int:
        """The step of the training that the model is."""
        return self.steps if self.chosen is None else int(self.chosen["step"])

    @property
    def settings(self) -> Adaptation:
        """The resolved adaptation.

        Raises:
            ValidationError: `params` have another format.
        """
        return Adaptation.model_validate({k: v for k, v in self.params.items() if k != "processes"})


def write_history(folder: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Write `losses.csv` for `dvc plots`, and `history.jsonl` as trackers replay it."""
    columns = [name for name in history[-1] if name != "timestamp"]
    with output_file(folder / "losses.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
    lines = "".join(json.dumps(dict(record)) + "\n" for record in history)
    write_text(folder / "history.jsonl", lines)
