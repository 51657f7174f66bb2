r"""Adapt one class of a class-conditional model: what becomes of that class, and of the others.

    SETTINGS="params.yaml benchmarks/ink.yaml benchmarks/class.yaml"
    python -m stages.prepare source noto-class --params $SETTINGS
    python -m stages.prepare target ink-animals --params $SETTINGS
    python -m benchmarks.classes --params $SETTINGS --steps 300 600 \
        --adaptations animals-finetune animals-prior animals-domainstudio --output benchmarks/results/class

Trains what `benchmarks.compare` has not trained yet. Writes a record per adaptation, seed, step and class
(.jsonl), a table (.md), and a picture of the first seed's last samples, from the same noise (.png).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import cli
from benchmarks.compare import WORK, Run
from benchmarks.picture import draw
from domainstudio import config
from domainstudio.config import Adaptation, Settings
from domainstudio.data import ImageSet
from domainstudio.metrics.diversity import intra_distance
from domainstudio.metrics.evaluation import held_out
from domainstudio.metrics.features import FEATURES, Features, extract
from domainstudio.metrics.frechet import frechet_distance
from domainstudio.metrics.memorization import memorization
from domainstudio.metrics.networks import load_network
from domainstudio.project import SOURCE_IMAGES, TARGETS
from domainstudio.sampling import load_samples
from domainstudio.sampling.pairs import sample_source
from stages.cli import run

SHOWN = 5
FIGURES = ("frechet_distance", "changed", "colourless", "intra_distance", "memorized_share")
COLOURLESS = 0.03
"""Mean difference of a pixel's largest and smallest channel, of 1, below which an image is without colour."""


def main() -> None:
    """Train and draw what is missing, measure each class, write records, table and picture."""
    parser = cli.settings_parser("classes", __doc__)
    parser.add_argument("--adaptations", nargs="+", required=True, help="of one source and one target")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", nargs="+", type=int, default=[300, 600])
    parser.add_argument("--output", type=Path, required=True, help="path without suffix")
    arguments = parser.parse_args()
    settings = config.load(*arguments.params)
    chosen = [settings.adaptation(name) for name in arguments.adaptations]
    source = sample_source(settings, chosen[0].source, WORK)
    before = measure_classes(source, source, chosen[0], settings)
    records: list[dict[str, Any]] = [{"reference": "source", **found} for found in before]
    for seed in arguments.seeds:
        for adaptation in chosen:
            records += _records(adaptation, seed, sorted(arguments.steps), source, settings)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    arguments.output.with_suffix(".jsonl").write_text(lines, encoding="utf-8")
    arguments.output.with_suffix(".md").write_text(table(records), encoding="utf-8")
    seed, step = arguments.seeds[0], max(arguments.steps)
    rows = {"source model": source} | {
        each.method: Run(settings, each, seed).samples(step) for each in chosen
    }
    _picture(rows, _shots(chosen[0])).save(arguments.output.with_suffix(".png"), optimize=True)
    print(table(records), end="")


def _records(
    adaptation: Adaptation, seed: int, steps: list[int], source: Path, settings: Settings
) -> Iterator[dict[str, Any]]:
    training = Run(settings, adaptation, seed)
    for step in steps:
        folder = training.samples(step)
        about = {"adaptation": adaptation.name, "method": adaptation.method, "seed": seed, "step": step}
        yield from (about | found for found in measure_classes(folder, source, adaptation, settings))


def measure_classes(
    samples: Path, source: Path, adaptation: Adaptation, settings: Settings
) -> list[dict[str, Any]]:
    """Return the figures of each class.

    An adapted class is measured against the target domain, another one against images of the source domain.

    Args:
        samples: folder of the adapted model's samples.
        source: folder of the source model's, of the same classes from the same noise.
        adaptation: names the target; its shots' labels are the adapted classes.
        settings: how to measure.

    Raises:
        DataError: a folder is missing or damaged.
    """
    shots, domain = _shots(adaptation), ImageSet.load(_target(adaptation) / "domain")
    domain, others = (
        domain.take(held_out(domain.images, shots.images)),
        ImageSet.load(SOURCE_IMAGES / adaptation.source),
    )
    adapted, classes = {record.label for record in shots.records}, _classes(samples)
    images, images_before = load_samples(samples), load_samples(source)
    ours, before = _features(images, settings), _features(images_before, settings)
    found = []
    for name in sorted(set(classes)):
        rows = np.flatnonzero(classes == name)
        real = _of_class(domain if name in adapted else others, name)
        scores = {
            "class": name,
            "adapted": name in adapted,
            "number": len(rows),
            "real": len(real),
            **kept(ours.take(rows), before.take(rows), _features(real.images, settings)),
            "colourless": colourless(images[rows]),
        }
        if name in adapted:
            scores |= _copies(ours.take(rows), _of_class(shots, name), settings)
        found.append({**scores, "features": ours.network, "features_digest": ours.digest})
    return found


def kept(samples: Features, before: Features, real: Features) -> dict[str, float]:
    """Return how far samples are from real images, and from the source model's samples of the same noise.

    `changed` is the mean perceptual distance of a sample to that of the source model, divided by the mean
    distance of two samples of the source model: 0 for the same pictures, about 1 for unrelated ones.

    Args:
        samples: of one class.
        before: the source model's of that class, from the same noise in the same order; at least 2.
        real: of the domain that the samples should be like.
    """
    moved = ((samples.perceptual.astype(float) - before.perceptual) ** 2).sum(axis=1).mean()
    unrelated = intra_distance(before.perceptual, before.perceptual[:1]).mean
    assert unrelated is not None
    return {
        "frechet_distance": frechet_distance(samples.pooled, real.pooled),
        "changed": float(moved / unrelated),
    }


def colourless(images: np.ndarray) -> float:
    """Return the share of images without colour, such as black lines on white; see `COLOURLESS`.

    Args:
        images: uint8 with shape (N, 3, H, W).
    """
    colours = (images.max(axis=1) - images.min(axis=1)).mean(axis=(1, 2)) / 255
    return float((colours < COLOURLESS).mean())


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return means ± standard deviations over seeds, a row per class, method and step, as Markdown."""
    groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for record in records:
        name = record.get("adaptation") or f"*{record['reference']} model*"
        groups.setdefault((record["class"], name, record.get("step", 0)), []).append(record)
    lines = ["| class | | steps | " + " | ".join(name.replace("_", " ") for name in FIGURES) + " |"]
    lines.append("|---|---|---:|" + "---:|" * len(FIGURES))
    for (kind, name, step), found in sorted(groups.items(), key=lambda item: item[0][0]):
        cells = [_spread([record[figure] for record in found if figure in record]) for figure in FIGURES]
        kind += " (adapted)" * found[0]["adapted"]
        lines.append(f"| {kind} | {name} | {step or '–'} | " + " | ".join(cells) + " |")
    network = f"{records[0]['features']}, weights {records[0]['features_digest']}"
    return f"Feature network: {network}. Figures of different networks are not comparable.\n\n" + (
        "\n".join(lines) + "\n"
    )


def _copies(samples: Features, shots: ImageSet, settings: Settings) -> dict[str, Any]:
    few, mirrored = (_features(part, settings) for part in (shots.images, shots.images[..., ::-1]))
    threshold = settings.evaluate.memorized_below
    near = memorization(samples.perceptual, few.perceptual, threshold, mirrored.perceptual)
    intra = intra_distance(samples.perceptual, few.perceptual)
    return {"intra_distance": intra.mean, "memorized_share": near.share}


def _features(images: np.ndarray, settings: Settings) -> Features:
    network = load_network(settings.evaluate.features)
    return extract(images, network, settings.evaluate.batch_size, FEATURES)


def _spread(values: list[float | None]) -> str:
    known = np.array([value for value in values if value is not None], dtype=float)
    if not len(known):
        return "–"
    places = 0 if known.mean() >= 10 else 2
    return f"{known.mean():.{places}f}" + (f" ± {known.std(ddof=1):.{places}f}" if len(known) > 1 else "")


def _picture(rows: Mapping[str, Path], shots: ImageSet) -> Any:
    """Return the few training images, then a row per model: the first samples of each class, side by side."""
    classes = _classes(next(iter(rows.values())))
    columns = [row for name in sorted(set(classes)) for row in np.flatnonzero(classes == name)[:SHOWN]]
    drawn = [(title, load_samples(folder)[columns]) for title, folder in rows.items()]
    return draw([(f"{len(shots)} training images", shots.images), *drawn], list(classes[columns]))


def _classes(samples: Path) -> np.ndarray:
    images = json.loads((samples / "manifest.json").read_text(encoding="utf-8"))["images"]
    return np.array([image["subject"] for image in images])


def _of_class(images: ImageSet, name: str) -> ImageSet:
    return images.take([index for index, record in enumerate(images.records) if record.label == name])


def _target(adaptation: Adaptation) -> Path:
    return TARGETS / adaptation.target


def _shots(adaptation: Adaptation) -> ImageSet:
    return ImageSet.load(_target(adaptation) / "shots")


if __name__ == "__main__":
    run(main)
