"""Measure an adaptation's samples: `python -m stages.evaluate <adaptation>`.

Reads its samples, its source model's samples, its target's image sets, and real images of its source's
domain where there are some. Writes evaluation/<adaptation>/metrics.json and nearest.json, and the figures to
compare first, main.json, which `dvc metrics show` shows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from domainstudio import config
from domainstudio.storage.files import read_json, write_json
from stages.cli import run
from stages.launch import launch

MAIN = {
    "frechet_distance_infinity": "fd_infinity",
    "kid": "kid",
    "in_domain_share": "in_domain",
    "intra_distance_in_domain": "intra",
    "memorized_share": "memorized",
    "attributes_kept": "kept",
    "top_1": "top_1",
}
"""The figures to compare first, and names that keep a table of them on a screen."""


def main() -> None:
    """Parse the command line and measure the adaptation that it names."""
    parser = argparse.ArgumentParser(prog="python -m stages.evaluate", description=__doc__)
    parser.add_argument("adaptation", help="key of `adaptations` in params.yaml")
    name = parser.parse_args().adaptation
    settings = config.load()
    launch("stages.evaluate", settings.launch)
    adaptation = settings.adaptation(name)

    from domainstudio.distributed import this_process
    from domainstudio.metrics.measure import measure_folders
    from domainstudio.project import SOURCE_IMAGES

    process = this_process()  # before a network chooses its device
    metrics, nearest = measure_folders(
        Path("samples/adapted", name),
        Path("samples/sources", adaptation.source),
        Path("data/targets", adaptation.target),
        settings.evaluate,
        source_images=SOURCE_IMAGES / adaptation.source,
    )
    if not process.is_main_process:
        return
    drawn = read_json(Path("samples/adapted", name, "manifest.json"), f"Run dvc repro sample@{name}")
    if "step" in drawn:
        metrics = {"step": drawn["step"], **metrics}
    folder = Path("evaluation", name)
    write_json(folder / "nearest.json", nearest)
    write_json(folder / "metrics.json", metrics)
    write_json(
        folder / "main.json", {MAIN[key]: value for key, value in _scores(metrics).items() if key in MAIN}
    )
    print(f"{folder}: {_summary(metrics)}")


def _scores(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of the samples, of all parts."""
    scores = dict(metrics["samples"])
    for part in ("attributes", "paired", "clip"):
        scores |= metrics.get(part, {}).get("samples", {})
    return scores


def _summary(metrics: dict[str, Any]) -> str:
    scores = _scores(metrics)
    shown = (
        *("frechet_distance_infinity", "kid", "intra_distance_in_domain", "in_domain_share"),
        *("recall", "memorized_share", "attributes_kept", "top_1", "top_5", "clip_score", "intra_clip"),
    )
    values = ", ".join(f"{key} {scores[key]:.4g}" for key in shown if key in scores)
    return f"{metrics['number']} samples by {metrics['features']}: {values}"


if __name__ == "__main__":
    run(main)
