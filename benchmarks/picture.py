"""The README's picture: the few training images, then every model's samples from the same noise.

    python -m benchmarks.picture --adaptations sunglasses-finetune sunglasses-domainstudio \
        --output docs/images/result.png

Needs what `dvc repro` makes; with `--step`, what `benchmarks.compare` has drawn.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchmarks import cli
from benchmarks.compare import WORK, Run
from domainstudio import config
from domainstudio.config import Adaptation
from domainstudio.data import ImageSet, find_captions
from domainstudio.project import ADAPTED_SAMPLES, SOURCE_SAMPLES, TARGETS
from domainstudio.sampling import load_samples
from domainstudio.sampling.pairs import sample_source
from stages.cli import run

SCALE, LABEL, GAP, HEADING, TITLE = 2, 170, 10, 40, 20


def main() -> None:
    """Draw the rows that the command line names."""
    parser = cli.settings_parser("picture", __doc__)
    parser.add_argument("--adaptations", nargs="+", required=True)
    parser.add_argument("--columns", type=int, default=14)
    parser.add_argument(
        "--step", type=int, help="draw what benchmarks.compare drew at this step, not the stages"
    )
    parser.add_argument("--seed", type=int, default=0, help="training seed, with --step")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    settings = config.load(*arguments.params)
    chosen = [settings.adaptation(name) for name in arguments.adaptations]
    if arguments.step is None:
        source = SOURCE_SAMPLES / chosen[0].source
        adapted = [ADAPTED_SAMPLES / adaptation.name for adaptation in chosen]
    else:
        source = sample_source(settings, chosen[0].source, WORK)
        adapted = [Run(settings, each, arguments.seed).samples(arguments.step) for each in chosen]
    target = TARGETS / chosen[0].target
    shots = ImageSet.load(target / "shots").images
    rows = [(f"{len(shots)} training images", shots)]
    subjects = _subjects(source)[: arguments.columns]
    if subjects:
        rows.append(("real drawings", _own_drawings(ImageSet.load(target / "domain"), subjects)))
    rows.append(("source model", load_samples(source)))
    rows += [(_title(item), load_samples(folder)) for item, folder in zip(chosen, adapted, strict=True)]
    picture = draw([(title, images[: arguments.columns]) for title, images in rows], subjects)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(arguments.output, optimize=True)


def draw(rows: list[tuple[str, np.ndarray]], subjects: Sequence[str] = ()) -> Image.Image:
    """Return one labelled row per entry.

    Args:
        rows: titles and images, uint8 with shape (N, 3, H, W), all of one size.
        subjects: what each column shows, written above the second row.
    """
    side = rows[0][1].shape[-1] * SCALE
    columns = max(len(images) for _, images in rows)
    heading = HEADING if subjects else 0
    size = (LABEL + columns * (side + 2) + GAP, len(rows) * (side + GAP) + GAP + heading)
    canvas = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=15)
    for index, (title, images) in enumerate(rows):
        top = GAP + index * (side + GAP) + (heading if index else 0)
        words = "\n".join(textwrap.wrap(title, TITLE))
        pen.multiline_text((GAP, top + side // 2), words, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            tile = Image.fromarray(image.transpose(1, 2, 0)).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(tile, (LABEL + column * (side + 2), top))
    small = ImageFont.load_default(size=10)
    for column, subject in enumerate(subjects):
        words = "\n".join(textwrap.wrap(subject, 12)[:3])
        place = (LABEL + column * (side + 2) + side // 2, 2 * GAP + side + heading // 2)
        pen.multiline_text(place, words, fill="black", font=small, anchor="mm", align="center", spacing=1)
    return canvas


def _title(adaptation: Adaptation) -> str:
    how = adaptation.combine
    return adaptation.method if how is None else f"{adaptation.method}, {how.title}"


def _subjects(samples: Path) -> list[str]:
    images = json.loads((samples / "manifest.json").read_text(encoding="utf-8"))["images"]
    return [image["subject"] for image in images if "subject" in image]


def _own_drawings(domain: ImageSet, subjects: list[str]) -> np.ndarray:
    """Return the domain's own drawing of each subject, white where it has none."""
    white = np.full_like(domain.images[0], 255)
    known = find_captions(domain.records, subjects)
    return np.stack([white if index is None else domain.images[index] for index in known])


if __name__ == "__main__":
    run(main)
