"""What a step of each method costs, against plain fine-tuning: medians of steps taken in turn.

    python -m benchmarks.step_cost --adaptations sunglasses-finetune sunglasses-domainstudio --rounds 30

The first adaptation is the baseline. Steps are taken in turn, in one process, so a noisy machine slows
all of them alike.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from benchmarks import cli
from domainstudio import config
from domainstudio.config import Settings
from domainstudio.distributed import this_process
from domainstudio.training.recipe import Recipe
from domainstudio.training.trainer import Trainer
from stages.cli import run

WARMUP = 3


def main() -> None:
    """Measure the adaptations that the command line names, and print a table."""
    parser = cli.settings_parser("step_cost", __doc__)
    parser.add_argument("--adaptations", nargs="+", required=True)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    settings = config.load(*arguments.params)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: trainer(settings, name, Path(folder, name)) for name in arguments.adaptations}
        results = summarize(measure(trainers, arguments.rounds))
    print_table("step", results)
    if arguments.out:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        content = {"device": device, "rounds": arguments.rounds, "adaptations": results}
        arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


class Step(Protocol):
    """What takes a training step."""

    def take_step(self) -> object:
        """Take one."""
        ...


def print_table(what: str, results: Mapping[str, Mapping[str, float]]) -> None:
    """Print what `summarize` returns."""
    print(f"| | seconds per {what} | against {next(iter(results))} |\n|---|---:|---:|")
    for name, row in results.items():
        print(f"| {name} | {row['seconds']:.3f} | {row['ratio']:.2f} |")


def trainer(settings: Settings, name: str, folder: Path) -> Trainer:
    """Return the trainer of an adaptation as the stage `finetune` makes it, without previews."""
    recipe = Recipe.load(settings.adaptation(name), settings.sample, this_process())
    return replace(recipe, latents=None, sampling=None).trainer(folder)


def measure(trainers: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every step of each; the first steps do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for index in range(WARMUP + rounds):
        for name, each in trainers.items():
            started = time.perf_counter()
            each.take_step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if index >= WARMUP:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def summarize(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return medians, and the median of each round's ratio to the first adaptation."""
    baseline = next(iter(seconds.values()))
    return {
        name: {
            "seconds": round(statistics.median(values), 4),
            "ratio": round(statistics.median(v / b for v, b in zip(values, baseline, strict=True)), 3),
        }
        for name, values in seconds.items()
    }


if __name__ == "__main__":
    run(main)
