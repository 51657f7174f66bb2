"""Measure what the source model's part in drawing changes: `python -m stages.tradeoff <adaptation>`.

Draws the adapted model alone and in every combination of the section `tradeoff`, and measures each. Writes
tradeoff/<adaptation>/tradeoff.json, and a file with the first samples of each. An interrupted call goes on
with what it has drawn.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from stages.cli import run
from stages.launch import launch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from domainstudio.metrics.tradeoff import Measurement

SHOWN = 10
"""Samples of each point to look at."""

SHARED = ("features", "features_digest", "number", "domain_number", "domain_is_shots", "references")
"""What all points have in common in metrics.json."""


def main() -> None:
    """Parse the command line and measure the adaptation that it names."""
    parser = argparse.ArgumentParser(prog="python -m stages.tradeoff", description=__doc__)
    parser.add_argument("adaptation", help="key of `adaptations` in params.yaml")
    name = parser.parse_args().adaptation

    from domainstudio import config

    settings = config.load()
    adaptation = settings.adaptation(name)
    if not settings.tradeoff.combinations:
        _write(Path("tradeoff", name), [])
        return
    launch("stages.tradeoff", settings.launch)

    from domainstudio.distributed import this_process
    from domainstudio.metrics.tradeoff import measure_tradeoff

    process = this_process()  # before a network chooses its device
    measured = []
    for point in measure_tradeoff(adaptation, settings):
        measured.append(point)
        if process.is_main_process:
            print(f"{name}, {_summary(point)}", flush=True)
    if process.is_main_process:
        _write(Path("tradeoff", name), measured)


def _summary(point: Measurement) -> str:
    scores = point.metrics["samples"]
    values = ", ".join(
        f"{key} {scores[key]:.4g}" for key in ("kid", "intra_distance_in_domain") if key in scores
    )
    return f"{point.combination.title if point.combination else 'alone'}: {values}"


def _write(folder: Path, measured: Sequence[Measurement]) -> None:
    from domainstudio.data.pictures import grid
    from domainstudio.sampling import load_samples
    from domainstudio.storage.files import output_folder, write_json

    with output_folder(folder) as partial:
        points = []
        for index, point in enumerate(measured):
            name = f"{index:02d}.png"
            grid(load_samples(point.samples)[:SHOWN], columns=SHOWN).save(partial / name)
            points.append(point.to_json(name))
        shared = {key: measured[0].metrics[key] for key in SHARED} if measured else {}
        write_json(partial / "tradeoff.json", {"format": 1, **shared, "points": points})


if __name__ == "__main__":
    run(main)
