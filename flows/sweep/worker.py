"""One trial of a sweep, as a Ray task: trained, sampled and measured on whatever node Ray chooses.

A trial works in `.cache/sweeps/<key>/` and goes on where a killed one stopped. In the end that folder holds
what is kept of it, `record.json` and `grid.png`; the training's states and the samples are removed.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainstudio.storage.files import write_text
from flows.sweep import shipping

if TYPE_CHECKING:
    from domainstudio.config import Adaptation, Settings
    from domainstudio.tracking.runs import RunPlan
    from domainstudio.training.trainer import Tracker

FOLDER = Path(".cache/sweeps")


@dataclass(frozen=True)
class Order:
    """What a node has to know of a trial."""

    root: str
    """The project's folder, as the nodes see it."""
    key: str
    """Hash of all that decides the result."""
    settings: Settings
    adaptation: Adaptation
    plan: RunPlan
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


def run(
    order: Order, environment: Mapping[str, str], archives: Mapping[str, Any]
) -> tuple[dict[str, Any], bytes]:
    """Run a trial in this process, which is Ray's and ends with it.

    Args:
        order: what to do.
        environment: variables of the sweep's process. They come as an object of Ray's, and not as those of
            its runtime environment, which stand in its logs and on its dashboard.
        archives: the inputs by path, where this node does not see the project's folder.

    Returns:
        The fields of `Record`, and the grid of samples as PNG.
    """
    from domainstudio.errors import DataError

    os.environ.update(environment)
    root = shipping.unpack(archives) if archives else Path(order.root)
    if not root.is_dir():
        raise DataError(f"the node does not see {root}: share it among the nodes, or set send_inputs: true")
    os.chdir(root)

    from filelock import FileLock

    place = folder(order.key)
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / ".lock"):  # another sweep may have the same trial, or Ray lost sight of a node
        if (record := read(order.key)) is None:
            record = _run(order, place)
    return asdict(record), (place / "grid.png").read_bytes()


def _run(order: Order, place: Path) -> Record:
    import ray

    from domainstudio.tracking.tracker import tracked

    context, started = ray.get_runtime_context(), time.time()
    with tracked(order.plan) if order.live else nullcontext() as tracker:
        history, metrics = _train_and_measure(order, place, tracker)
    record = Record(
        key=order.key,
        metrics=metrics,
        history=history,
        node=ray.util.get_node_ip_address(),
        node_id=context.get_node_id(),
        gpus=context.get_accelerator_ids()["GPU"],
        started=started,
        ended=time.time(),
    )
    write(record, (place / "samples/grid.png").read_bytes())
    for done in ("samples", "states"):
        shutil.rmtree(place / done, ignore_errors=True)
    return record


def _train_and_measure(
    order: Order, place: Path, tracker: Tracker | None
) -> tuple[list[Mapping[str, float]], dict[str, Any]]:
    from filelock import FileLock

    from domainstudio.distributed import this_process
    from domainstudio.storage import checkpoint
    from domainstudio.storage.mirror import mirrored
    from domainstudio.sweep import measuring
    from domainstudio.training import recipe

    settings, adaptation, process = order.settings, order.adaptation, this_process()
    lock = FileLock(FOLDER / ".lock")  # the first trial draws what others need too
    with lock:
        source = measuring.draw_source(settings, adaptation.source, FOLDER)
    with lock if adaptation.weights.prior > 0 else nullcontext():
        given = recipe.load_inputs(adaptation, settings.sample, process)
    states = place / "states" / checkpoint.run_key(adaptation.model_dump(mode="json"), given.digests)
    with mirrored(states):
        trainer = recipe.make_trainer(
            given.denoiser,
            given.shots,
            given.prior,
            adaptation,
            states,
            latents=Path(".cache/latents"),
            tracker=tracker,
            drawing=settings.sample,
        )
        history = trainer.train()
    measuring.draw_adapted(given.denoiser, adaptation, settings, place / "samples")
    return history, measuring.measure(place / "samples", source, adaptation, settings)
