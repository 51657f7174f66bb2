"""Measure an adaptation's samples: `python -m stages.evaluate <adaptation>`.

Reads its samples, its source model's samples and its target's image sets; writes
evaluation/<adaptation>/metrics.json and nearest.json. Features are kept in .cache/features, so that the
domain and the source are encoded once for all adaptations.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from domainstudio import config
from stages.cli import run

CACHE = Path(".cache/features")


def main() -> None:
    """Parse the command line and measure the adaptation that it names."""
    parser = argparse.ArgumentParser(prog="python -m stages.evaluate", description=__doc__)
    parser.add_argument("adaptation", help="key of `adaptations` in params.yaml")
    name = parser.parse_args().adaptation
    settings = config.load()
    adaptation = settings.adaptation(name)
    metrics, nearest = measure(
        Path("samples/adapted", name),
        Path("samples/sources", adaptation.source),
        Path("data/targets", adaptation.target),
        settings.evaluate,
    )
    folder = Path("evaluation", name)
    _write(folder / "nearest.json", nearest)
    _write(folder / "metrics.json", metrics)
    print(f"{folder}: {_summary(metrics)}")


def measure(
    samples: Path, source: Path, target: Path, settings: config.EvaluateSettings
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the contents of metrics.json and nearest.json.

    Args:
        samples: Folder of the adapted model's samples.
        source: Folder of the source model's samples.
        target: Folder with the image sets `shots` and `domain`.
        settings: How to measure.
    """
    from domainstudio.datasets import ImageSet
    from domainstudio.metrics import evaluation, features
    from domainstudio.sampling import load_samples

    shots, domain = (ImageSet.load(target / part).images for part in ("shots", "domain"))
    rest = evaluation.held_out(domain, shots)
    network = features.load_network(settings.features)

    def encode(images: Any, title: str) -> features.Features:
        return features.extract(images, network, settings.batch_size, CACHE, progress=f"encode {title}")

    report = evaluation.evaluate(
        samples=encode(load_samples(samples), "samples"),
        shots=encode(shots, "shots"),
        domain=encode(domain[rest], "domain") if rest else None,
        source=encode(load_samples(source), "source"),
        settings=settings,
        mirrored=encode(shots[..., ::-1], "mirrored shots"),
    )
    manifest = json.loads((samples / "manifest.json").read_text(encoding="utf-8"))
    return report.metrics(), report.nearest_pairs([image["seed"] for image in manifest["images"]])


def _summary(metrics: dict[str, Any]) -> str:
    scores = metrics["samples"]
    shown = ("frechet_distance", "kid", "precision", "recall", "intra_distance", "memorized_share")
    values = ", ".join(f"{key} {scores[key]:.4g}" for key in shown if key in scores)
    return f"{metrics['number']} samples by {metrics['features']}: {values}"


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    run(main)
