"""What reading many images costs, against a PyTorch `DataLoader` with as many processes.

    python -m benchmarks.reading --number 3000

It draws photographs of its own, JPEG files of 400 × 320 pixels, and reads them in turn. `prepare` checks and
hashes them, and keeps their pixels on the disk. The loader decodes, crops and resizes them, no more.
`prepare` of the fewest images that several processes read shows what their start costs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import cli
from domainstudio.config import PrepareSettings
from domainstudio.data.packing import MANY, prepare
from domainstudio.data.workers import number_of_workers
from stages.cli import run

WIDTH, HEIGHT = 400, 320
BATCH = 128


def main() -> None:
    """Draw photographs, read them in turn, and print a table."""
    parser = cli.parser("reading", __doc__)
    parser.add_argument("--number", type=int, default=3000, help=f"of images, at least {MANY}")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.number < MANY:
        parser.error(f"--number {options.number}: give at least {MANY}, fewer are read by one process")

    # not above: each process that reads would import torch with this module
    from benchmarks.step_cost import measure, print_table, summarize

    settings = PrepareSettings(resolution=options.resolution)
    with tempfile.TemporaryDirectory() as folder:
        paths = draw_photographs(Path(folder), options.number)
        readers = {
            "DataLoader": Reading(lambda: load(paths, options.resolution)),
            "prepare": Reading(lambda: prepare(folder, settings)),
            f"prepare, {MANY} images": Reading(lambda: prepare(folder, settings, number=MANY)),
        }
        print_table("reading", summarize(measure(readers, options.rounds)))


def draw_photographs(folder: Path, number: int) -> list[Path]:
    """Write smooth colours with some noise as JPEG files, and return their paths."""
    generator = np.random.default_rng(0)
    paths = [folder / f"{index:06}.jpg" for index in range(number)]
    for path in paths:
        coarse = Image.fromarray(generator.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = smooth + generator.integers(-6, 6, smooth.shape, dtype=np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


@dataclass
class Reading:
    """Reads all images, in place of a training step."""

    read: Callable[[], object]

    def take_step(self) -> object:
        """Read them."""
        return self.read()


@dataclass
class Photographs:
    """What a `DataLoader` reads: the centre of each file, resized, as uint8 of the shape (3, R, R)."""

    paths: list[Path]
    resolution: int

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        image = Image.open(self.paths[index]).convert("RGB")
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        square = image.crop((left, top, left + side, top + side))
        resized = square.resize((self.resolution, self.resolution), Image.Resampling.LANCZOS)
        return np.asarray(resized).transpose(2, 0, 1).copy()


def load(paths: list[Path], resolution: int) -> int:
    """Read all files by a `DataLoader`, and return how many there were."""
    from torch.utils.data import DataLoader

    photographs = Photographs(paths, resolution)
    loader: Any = DataLoader(photographs, BATCH, num_workers=number_of_workers())  # type: ignore[arg-type]
    return sum(len(batch) for batch in loader)


if __name__ == "__main__":
    run(main)
