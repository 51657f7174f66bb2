"""The README's picture: the few training images, then every model's samples from the same noise.

    python -m benchmarks.picture --adaptations ink-finetune ink-domainstudio --output docs/images/result.png

Needs what `dvc repro` makes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from domainstudio import config
from domainstudio.datasets import ImageSet
from domainstudio.sampling import load_samples

SCALE, LABEL, GAP = 2, 150, 10


def main() -> None:
    """Draw the rows that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adaptations", nargs="+", required=True)
    parser.add_argument("--columns", type=int, default=14)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    settings = config.load()
    chosen = [settings.adaptation(name) for name in arguments.adaptations]
    shots = ImageSet.load(Path("data/targets") / chosen[0].target / "shots").images
    rows = [(f"{len(shots)} training images", shots), ("source model", _samples("sources", chosen[0].source))]
    rows += [(adaptation.method, _samples("adapted", adaptation.name)) for adaptation in chosen]
    picture = draw([(title, images[: arguments.columns]) for title, images in rows])
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(arguments.output, optimize=True)


def draw(rows: list[tuple[str, np.ndarray]]) -> Image.Image:
    """Return one labelled row per entry; images are uint8 with shape (N, 3, H, W), of one size."""
    side = rows[0][1].shape[-1] * SCALE
    columns = max(len(images) for _, images in rows)
    size = (LABEL + columns * (side + 2) + GAP, len(rows) * (side + GAP) + GAP)
    canvas = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=15)
    for index, (title, images) in enumerate(rows):
        top = GAP + index * (side + GAP)
        pen.text((GAP, top + side // 2), title, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            tile = Image.fromarray(image.transpose(1, 2, 0)).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(tile, (LABEL + column * (side + 2), top))
    return canvas


def _samples(kind: str, name: str) -> np.ndarray:
    return load_samples(Path("samples") / kind / name)


if __name__ == "__main__":
    main()
