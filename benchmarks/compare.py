r"""Measure adaptations along their training, over seeds: one JSON record per adaptation, seed and step.

    python -m benchmarks.compare --adaptations ink-finetune ink-domainstudio --seeds 0 1 2 \
        --steps 100 200 400 800 --out benchmarks/results/ink.jsonl

Needs what `dvc repro prepare_target@ink` makes. Goes on where it was interrupted; measured points are kept.
`python -m benchmarks.curves` draws the result.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import cli
from benchmarks.memory import peak_memory, reset_peak_memory
from domainstudio import config, models
from domainstudio.config import Adaptation, Settings
from domainstudio.distributed import this_process
from domainstudio.metrics.measure import measure_folders
from domainstudio.project import SOURCE_MODELS, TARGETS
from domainstudio.sampling.pairs import sample_adapted, sample_source
from domainstudio.storage import checkpoint
from domainstudio.training.recipe import Recipe
from stages.cli import run

WORK = Path(".checkpoints/compare")


def main() -> None:
    """Measure every point of the command line that the output file lacks."""
    parser = cli.settings_parser("compare", __doc__)
    parser.add_argument("--adaptations", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", nargs="+", type=int, default=[100, 200, 400, 800])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    settings = config.load(*arguments.params)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    done = _done(arguments.out)
    for seed in arguments.seeds:
        for name in arguments.adaptations:
            missing = [step for step in sorted(arguments.steps) if (name, seed, step) not in done]
            if missing:
                for record in measure(settings, settings.adaptation(name), seed, missing):
                    with arguments.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")
                    print(_line(record), flush=True)


def measure(
    settings: Settings, adaptation: Adaptation, seed: int, steps: list[int]
) -> Iterator[dict[str, Any]]:
    """Yield the record of an adaptation at each step, and the references before the first.

    Args:
        settings: all settings; `sample` and `evaluate` decide how points are measured.
        adaptation: what to train.
        seed: replaces the training's seed.
        steps: where to measure, ascending.
    """
    adaptation = _with(adaptation, seed=seed, preview_every=0)
    folder = _folder(adaptation)
    if folder.is_dir():  # an earlier call may have trained beyond the first missing step
        shutil.rmtree(folder)
    source = sample_source(settings, adaptation.source, WORK)
    for step in steps:
        samples = _samples(folder, step)
        scheduled = _with(adaptation, steps=step, checkpoint_every=step)
        seconds, peak = _train(settings, scheduled, folder, samples)
        target = TARGETS / adaptation.target
        report, _ = measure_folders(samples, source, target, settings.evaluate)
        paired = report.get("paired", {"samples": {}, "references": {}})
        if step == steps[0]:
            for name, scores in report["references"].items():
                scores |= paired["references"].get(name, {})
                yield {"reference": name, "target": adaptation.target, **scores}
        yield {
            "adaptation": adaptation.name,
            "method": adaptation.method,
            "seed": seed,
            "step": step,
            "seconds": seconds,
            "seconds_per_step": round(seconds / step, 4),
            "peak_memory_mib": peak,
            "target": adaptation.target,
            "features": report["features"],
            "features_digest": report["features_digest"],
            **report["samples"],
            **paired["samples"],
        }


def samples_at(adaptation: Adaptation, seed: int, step: int) -> Path:
    """Return the folder of what `measure` drew at a step."""
    return _samples(_folder(_with(adaptation, seed=seed, preview_every=0)), step)


def _folder(adaptation: Adaptation) -> Path:
    """Return the folder of checkpoints and samples, whatever the number of steps."""
    params = adaptation.model_dump(mode="json", exclude={"training": {"steps"}})
    if adaptation.combine is not None:  # it decides the samples, which lie in the same folder
        params["combine"] = adaptation.combine.model_dump(mode="json")
    digest = models.digest(SOURCE_MODELS / adaptation.source)
    return WORK / checkpoint.run_key(params, {"source": digest})


def _samples(folder: Path, step: int) -> Path:
    return folder / f"samples-{step:05d}"


def _train(settings: Settings, adaptation: Adaptation, folder: Path, samples: Path) -> tuple[float, int]:
    """Train to the last step and draw its samples; return the seconds so far and the peak memory in MiB."""
    recipe = Recipe.load(adaptation, settings.sample, this_process())
    reset_peak_memory()
    history, peak = replace(recipe, latents=None, sampling=None).trainer(folder).train(), peak_memory()
    sample_adapted(recipe.denoiser, adaptation, settings, samples)
    return round(history[-1]["seconds"], 3), peak


def _with(adaptation: Adaptation, **training: Any) -> Adaptation:
    changed = adaptation.training.model_copy(update=training)
    return adaptation.model_copy(update={"training": changed})


def _done(path: Path) -> set[tuple[str, int, int]]:
    if not path.is_file():
        return set()
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(r["adaptation"], r["seed"], r["step"]) for r in records if "adaptation" in r}


def _line(record: dict[str, Any]) -> str:
    name = record.get("adaptation", f"({record.get('reference')})")
    where = f"seed {record['seed']} step {record['step']:4d}" if "step" in record else ""
    shown = (
        "frechet_distance",
        "intra_distance",
        "precision",
        "recall",
        "coverage",
        "memorized_share",
        "top_1",
        "top_5",
    )
    values = "  ".join(f"{key} {record[key]:.4g}" for key in shown if record.get(key) is not None)
    return f"{name:24} {where}  {values}"


if __name__ == "__main__":
    run(main)
