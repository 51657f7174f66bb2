"""What a node gets of a trial, and what is kept of it.

`.cache/sweeps/<key>/` has the `record.json` and `grid.png` of a finished trial.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainstudio.storage.files import write_text
from flows.sweep.search import Trial

if TYPE_CHECKING:
    from domainstudio.config import Adaptation, Settings
    from domainstudio.tracking.runs import RunPlan

FOLDER = Path(".cache/sweeps")


@dataclass(frozen=True)
class Order:
    """What a node has to know of a trial."""

    trial: Trial
    root: str
    """The project's folder, as the nodes see it."""
    key: str
    """Hash of all that decides the result."""
    settings: Settings
    adaptation: Adaptation
    run: RunPlan
    """The trial's run in MLflow."""
    live: bool
    """Whether the nodes can reach MLflow: then losses are there while it trains."""


@dataclass(frozen=True)
class Record:
    """What is kept of a finished trial."""

    key: str
    metrics: Mapping[str, Any]
    """Content of metrics.json."""
    history: Sequence[Mapping[str, float]]
    """The training's log."""
    node: str
    """Address of the node."""
    node_id: str
    """Ray's name for it."""
    gpus: Sequence[str]
    """Ids of the GPUs there."""
    started: float
    """Seconds since 1970."""
    ended: float

    @property
    def seconds(self) -> float:
        """What it took, without what an earlier attempt had done."""
        return self.ended - self.started

    @property
    def place(self) -> str:
        """Where it ran, for people."""
        return f"{self.node} GPU {','.join(self.gpus)}" if self.gpus else self.node


def folder(key: str) -> Path:
    """Return the folder of a trial, below the project's."""
    return FOLDER / key


def read(key: str) -> Record | None:
    """Return what is kept of a trial, or None."""
    try:
        content = json.loads((folder(key) / "record.json").read_text(encoding="utf-8"))
        return Record(**content) if content.pop("format") == 1 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(record: Record, grid: bytes) -> None:
    """Keep a trial, the record last."""
    place = folder(record.key)
    place.mkdir(parents=True, exist_ok=True)
    (place / "grid.png").write_bytes(grid)
    write_text(place / "record.json", json.dumps({"format": 1, **asdict(record)}) + "\n")
