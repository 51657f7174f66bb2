r"""Measure adaptations along their training, over seeds: one JSON record per adaptation, seed and step.

    python -m benchmarks.compare --adaptations ink-finetune ink-domainstudio --seeds 0 1 2 \
        --steps 100 200 400 800 --out benchmarks/results/ink.jsonl

Needs what `dvc repro prepare_target@ink` makes. Goes on where it was interrupted; measured points are kept.
`python -m benchmarks.curves` draws the result.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from domainstudio import checkpoint, config, models
from domainstudio.config import Adaptation, Settings
from domainstudio.datasets import ImageSet, grid
from domainstudio.metrics import evaluation, features
from domainstudio.models.denoiser import Denoiser
from domainstudio.sampling import default_device, sample
from domainstudio.training import Trainer

CACHE = Path(".cache/features")
WORK = Path(".checkpoints/compare")


def main() -> None:
    """Measure every point of the command line that the output file lacks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--adaptations", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", nargs="+", type=int, default=[100, 200, 400, 800])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    settings = config.load(arguments.params)
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
    target = Path("data/targets") / adaptation.target
    shots, domain = (ImageSet.load(target / part).images for part in ("shots", "domain"))
    source_folder = Path("models/sources") / adaptation.source
    training = adaptation.training.model_copy(update={"seed": seed, "preview_every": 0})
    key = checkpoint.run_key(
        {
            **adaptation.model_dump(mode="json"),
            "training": training.model_dump(mode="json", exclude={"steps"}),
        },
        {"source": models.digest(source_folder)},
    )
    for step in steps:
        denoiser = models.load(source_folder)
        reference = models.load(source_folder) if adaptation.weights.needs_source else None
        trainer = Trainer(
            denoiser,
            shots,
            training.model_copy(update={"steps": step, "checkpoint_every": step}),
            adaptation.weights,
            WORK / key,
            source=reference,
        )
        history = trainer.train()
        images = draw(denoiser, settings)
        grid(images[:32], columns=16).save(WORK / key / f"grid-{step:05d}.png")
        scores, references = score(images, draw_source(source_folder, settings), shots, domain, settings)
        if step == steps[0]:
            for name, reference_scores in references.items():
                yield {"reference": name, "target": adaptation.target, **reference_scores}
        yield {
            "adaptation": adaptation.name,
            "method": adaptation.method,
            "seed": seed,
            "step": step,
            "seconds": round(history[-1]["seconds"], 3),
            "target": adaptation.target,
            "features": settings.evaluate.features,
            "features_digest": features.load_network(settings.evaluate.features).digest,
            **scores,
        }


def draw(denoiser: Denoiser, settings: Settings) -> np.ndarray:
    """Return `sample.number` images of the sampling stage's seeds, with shape (N, 3, H, W)."""
    denoiser.to(default_device())
    how = settings.sample
    seeds = range(how.seed, how.seed + how.number)
    batches = [seeds[start : start + how.batch_size] for start in range(0, how.number, how.batch_size)]
    return np.concatenate(
        [
            sample(
                denoiser, batch, scheduler=how.scheduler, steps=how.steps, mixed_precision=how.mixed_precision
            )
            for batch in batches
        ]
    )


def draw_source(folder: Path, settings: Settings) -> np.ndarray:
    """Return the source model's images of the same seeds, drawn once and kept."""
    key = checkpoint.run_key(settings.sample.model_dump(mode="json"), {"model": models.digest(folder)})
    path = WORK / f"source-{key}.npy"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, draw(models.load(folder), settings), allow_pickle=False)
    return np.load(path, allow_pickle=False)


def score(
    images: np.ndarray, source: np.ndarray, shots: np.ndarray, domain: np.ndarray, settings: Settings
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the scores of images, and those of the references by name."""
    how = settings.evaluate
    network = features.load_network(how.features)

    def encode(part: np.ndarray, cache: Path | None = CACHE) -> features.Features:
        return features.extract(part, network, how.batch_size, cache, progress=None)

    report = evaluation.evaluate(
        samples=encode(images, None),
        shots=encode(shots),
        domain=encode(domain[evaluation.held_out(domain, shots)]),
        source=encode(source),
        settings=how,
        mirrored=encode(shots[..., ::-1]),
    )
    metrics = report.metrics()
    return metrics["samples"], metrics["references"]


def _done(path: Path) -> set[tuple[str, int, int]]:
    if not path.is_file():
        return set()
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(r["adaptation"], r["seed"], r["step"]) for r in records if "adaptation" in r}


def _line(record: dict[str, Any]) -> str:
    name = record.get("adaptation", f"({record.get('reference')})")
    where = f"seed {record['seed']} step {record['step']:4d}" if "step" in record else ""
    shown = ("frechet_distance", "intra_distance", "precision", "recall", "coverage", "memorized_share")
    values = "  ".join(f"{key} {record[key]:.4g}" for key in shown if record.get(key) is not None)
    return f"{name:24} {where}  {values}"


if __name__ == "__main__":
    main()
