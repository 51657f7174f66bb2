"""Folders of samples: drawn in batches, resumable, with a manifest that gives every image's seed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from domainstudio.errors import DataError
from domainstudio.sampling.generate import Images, draw
from domainstudio.storage.files import write_json

if TYPE_CHECKING:
    from domainstudio.config import SampleSettings
    from domainstudio.models.denoiser import Denoiser


def sample_to_folder(
    denoiser: Denoiser,
    folder: Path,
    settings: SampleSettings,
    conditions: Sequence[str] | None = None,
    subjects: Sequence[str] | None = None,
    **manifest: Any,
) -> None:
    """Draw `settings.number` images into `folder`, going on where an interrupted call stopped.

    Batches are always the same images, so an interrupted call ends with the same pictures. Several processes
    of accelerate take turns with the batches. Writes `images/NNNNNN.png`, `grid.png` of the first 64 and,
    last, `manifest.json` with every image's seed.

    Args:
        denoiser: the model.
        folder: where to write.
        settings: number, seed, scheduler, steps, guidance and batch size.
        conditions: what the model is told, a prompt or class for each image in turn; `None`: nothing.
            Ignored, as `subjects` are, where the model cannot be told anything.
        subjects: what each of them is about, for the manifest.
        manifest: further entries of the manifest.
    """
    from tqdm import tqdm

    from domainstudio.data.pictures import save_png
    from domainstudio.distributed import this_process

    process = this_process()
    if not denoiser.conditional:
        conditions = subjects = None
    seeds = [settings.seed + i for i in range(settings.number)]
    paths = [folder / "images" / f"{i:06d}.png" for i in range(settings.number)]
    told = list(islice(cycle(conditions), settings.number)) if conditions else None
    (folder / "images").mkdir(parents=True, exist_ok=True)
    title = f"sample {manifest.get('model', folder.name)}"
    starts = range(0, settings.number, settings.batch_size)
    quiet = not process.is_main_process
    with tqdm(total=settings.number, unit="image", desc=title, disable=quiet) as progress:
        for number, start in enumerate(starts):
            batch = slice(start, start + settings.batch_size)
            mine = number % process.num_processes == process.process_index
            if mine and not all(path.is_file() for path in paths[batch]):
                images = draw(denoiser, seeds[batch], told[batch] if told else None, settings)
                save_png(images, paths[batch])
            progress.update(len(paths[batch]))
    process.wait_for_everyone()
    if process.is_main_process:
        _finish(folder, settings, paths, seeds, told, subjects, manifest)
    process.wait_for_everyone()


def _finish(
    folder: Path,
    settings: SampleSettings,
    paths: Sequence[Path],
    seeds: Sequence[int],
    told: Sequence[str] | None,
    subjects: Sequence[str] | None,
    manifest: Mapping[str, Any],
) -> None:
    from domainstudio.data.pictures import grid

    for leftover in (folder / "images").glob(".*"):  # of a process that was killed
        leftover.unlink(missing_ok=True)
    grid(_read(paths[:64]), columns=8).save(folder / "grid.png")
    content = {
        "format": 1,
        **manifest,
        "scheduler": settings.scheduler,
        "steps": settings.steps,
        **({"guidance_scale": settings.guidance_scale} if told else {}),
        **({"negative": settings.negative} if told and settings.negative else {}),
        "images": _entries(paths, seeds, told, subjects),
    }
    write_json(folder / "manifest.json", content)


def _entries(
    paths: Sequence[Path], seeds: Sequence[int], told: Sequence[str] | None, subjects: Sequence[str] | None
) -> list[dict[str, Any]]:
    """Return the manifest's entry of each image."""
    entries: list[dict[str, Any]] = [
        {"file": f"images/{path.name}", "seed": seed} for path, seed in zip(paths, seeds, strict=True)
    ]
    for name, values in ("prompt", told), ("subject", subjects):
        for entry, value in zip(entries, cycle(values or ()), strict=False):
            entry[name] = value
    return entries


def load_samples(folder: str | Path) -> Images:
    """Read the images of a samples folder, in the manifest's order, with shape (N, 3, H, W).

    Raises:
        DataError: the manifest or an image is missing or damaged.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        paths = [folder / "images" / Path(entry["file"]).name for entry in manifest["images"]]
        return _read(paths)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} is not a complete set of samples: {error}. Delete that folder and run again"
        ) from error


def _read(paths: Sequence[Path]) -> Images:
    from PIL import Image

    arrays = []
    for path in paths:
        with Image.open(path) as image:
            arrays.append(np.asarray(image.convert("RGB")).transpose(2, 0, 1))
    return np.stack(arrays)
