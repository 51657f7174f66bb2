r"""How well a text model draws what it was trained on: how often the real drawing of a name is nearest.

    python -m benchmarks.retrieval --source noto-text --subjects demo/subjects.txt \
        --images data/sources/noto --out benchmarks/results/retrieval.json

draws one image per subject, with the subject as the prompt, and ranks the real drawings that carry it as a
caption among all of --images. Writes the figures, and the first 64 images as a picture of the same name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import cli
from domainstudio import config, models
from domainstudio.config import SampleSettings, Settings
from domainstudio.data import ImageSet, grid
from domainstudio.data.prompts import read_subjects
from domainstudio.errors import ConfigError
from domainstudio.metrics.features import FEATURES, extract
from domainstudio.metrics.networks import load_network
from domainstudio.metrics.pairing import TOP, Drawings, drawing_names, retrieval
from domainstudio.models.denoiser import Denoiser
from domainstudio.project import SOURCE_MODELS
from domainstudio.sampling import default_device, draw
from stages.cli import run

SHOWN, COLUMNS = 64, 8


def main() -> None:
    """Draw the subjects, measure the images, write figures and picture."""
    parser = cli.settings_parser("retrieval", __doc__)
    parser.add_argument("--source", required=True, help="a name in models/sources, a folder, or a hub id")
    parser.add_argument("--subjects", type=Path, required=True, help="a text file with a subject per line")
    parser.add_argument("--images", type=Path, required=True, help="an image set with captions")
    parser.add_argument("--out", type=Path, required=True, help="the .json file to write")
    arguments = parser.parse_args()
    settings = config.load(*arguments.params)
    named = SOURCE_MODELS / arguments.source
    location = named if named.is_dir() else arguments.source
    subjects, drawings = read_subjects(arguments.subjects), ImageSet.load(arguments.images)
    drawn = draw_subjects(models.load(location).to(default_device()), subjects, settings.sample)
    record = measure(drawn, subjects, drawings, settings) | {"model": str(location)}
    if Path(location).is_dir():
        record["model_digest"] = models.digest(location)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    grid(drawn[:SHOWN], COLUMNS).save(arguments.out.with_suffix(".png"))
    print(f"{location}: {line(record)}")


def draw_subjects(denoiser: Denoiser, subjects: list[str], settings: SampleSettings) -> np.ndarray:
    """Return an image of each subject, with shape (N, 3, H, W); image i is drawn from seed `seed + i`.

    Raises:
        ConfigError: the model is unconditional.
    """
    if not denoiser.conditional:
        raise ConfigError("the model is unconditional, so it cannot draw a given subject: name a text model")
    seeds = range(settings.seed, settings.seed + len(subjects))
    return draw(denoiser, seeds, subjects, settings)


def measure(drawn: np.ndarray, subjects: list[str], drawings: ImageSet, settings: Settings) -> dict[str, Any]:
    """Return the record: what was found, by which features, and how the images were drawn.

    Raises:
        ConfigError: no image carries a subject as its caption.
    """
    network = load_network(settings.evaluate.features)
    ours, theirs = (
        extract(images, network, settings.evaluate.batch_size, FEATURES)
        for images in (drawn, drawings.images)
    )
    names = drawing_names(drawings.images, [record.caption for record in drawings.records])
    found = retrieval(ours.perceptual, subjects, Drawings(theirs.perceptual, names))
    if not found.number:
        raise ConfigError(
            f"none of the {len(subjects)} subjects is the caption of an image of {drawings.origin}"
        )
    return {
        **found.to_json(),
        "features": ours.network,
        "features_digest": ours.digest,
        "images": drawings.origin,
        "images_digest": drawings.digest,
        "sample": settings.sample.model_dump(mode="json", exclude={"number"}),
    }


def line(record: dict[str, Any]) -> str:
    """Return the figures of a record in a line."""
    return (
        f"{record['number']} subjects among {record['drawings']} drawings by {record['features']}: "
        f"nearest {record['top_1']:.1%} (chance {record['top_1_chance']:.1%}), "
        f"among {TOP} {record['top_5']:.1%} (chance {record['top_5_chance']:.1%}), "
        f"median rank {record['median_rank']:g}"
    )


if __name__ == "__main__":
    run(main)
