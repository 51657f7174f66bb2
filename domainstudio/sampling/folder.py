"""Folders of samples: drawn in batches, resumable, with a manifest that gives every image's seed."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from domainstudio.errors import DataError
from domainstudio.sampling.generate import Images, draw
from domainstudio.storage.files import write_json

if TYPE_CHECKING:
    from domainstudio.config import SampleSettings
    from domainstudio.models.denoiser import Denoiser
    from domainstudio.models.stored import StoredModel

logger = logging.getLogger(__name__)


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
        conditions: prompts or classes, which the images take in turn; `None` draws without them. An
            unconditional model ignores them and `subjects`.
        subjects: the subject of each condition, for the manifest.
        manifest: further entries of the manifest.
    """
    from tqdm import tqdm

    from domainstudio.data.pictures import save_png
    from domainstudio.distributed import this_process

    process = this_process()
    if not denoiser.conditional:
        conditions = subjects = None
    entries = _entries(settings, prompt=conditions, subject=subjects)
    title = f"sample {manifest.get('model', folder.name)}"
    quiet = not process.is_main_process
    with tqdm(total=settings.number, unit="image", desc=title, disable=quiet) as progress:
        for number, start in enumerate(range(0, settings.number, settings.batch_size)):
            batch = entries[start : start + settings.batch_size]
            paths = [folder / entry["file"] for entry in batch]
            mine = number % process.num_processes == process.process_index
            if mine and not _are_drawn(paths, denoiser.resolution):
                prompts = [entry["prompt"] for entry in batch] if conditions else None
                save_png(draw(denoiser, [entry["seed"] for entry in batch], prompts, settings), paths)
            progress.update(len(batch))
    process.wait_for_everyone()
    if process.is_main_process:
        _finish(folder, settings, entries, manifest)
    process.wait_for_everyone()


def sample_stored(
    stored: StoredModel,
    place: Path,
    name: str,
    settings: SampleSettings,
    conditions: Sequence[str],
    subjects: Sequence[str],
    **manifest: Any,
) -> Path:
    """Draw the samples of a stored model, as `sample_to_folder` does, unless they are drawn already.

    Args:
        stored: The model, alone or together with its source model; the manifest says so.
        place: Where the folder of samples is made.
        name: What its name begins with; the hash of all that decides the samples follows.
        settings: Number, seed, scheduler, steps, guidance and batch size.
        conditions: Prompts or classes.
        subjects: The subject of each condition.
        manifest: Further entries of the manifest.

    Returns:
        The folder of samples.
    """
    from domainstudio.distributed import this_process
    from domainstudio.models import lora
    from domainstudio.precision import DTYPES, usable_precision
    from domainstudio.storage.checkpoint import run_key

    params = {"sample": settings.model_dump(mode="json"), "told": conditions}
    folder = place / f"{name}-{run_key(params, {'model': stored.digest})}"
    if not (folder / "manifest.json").is_file():
        if stored.together is not None:
            manifest |= stored.together.facts
        device = this_process().device
        half = DTYPES[usable_precision(settings.mixed_precision, device)]
        denoiser = stored.load(half).to(device)
        lora.fuse(denoiser)
        sample_to_folder(denoiser, folder, settings, conditions, subjects, **manifest)
    return folder


def _entries(settings: SampleSettings, **columns: Sequence[str] | None) -> list[dict[str, Any]]:
    """Return the manifest's entry of each image; the values of a column take turns."""
    entries: list[dict[str, Any]] = [
        {"file": f"images/{i:06d}.png", "seed": settings.seed + i} for i in range(settings.number)
    ]
    for name, values in columns.items():
        for entry, value in zip(entries, cycle(values or ()), strict=False):
            entry[name] = value
    return entries


def _finish(
    folder: Path, settings: SampleSettings, entries: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]
) -> None:
    from domainstudio.data.pictures import grid, write_png

    for leftover in (folder / "images").glob(".*"):  # of a process that was killed
        leftover.unlink(missing_ok=True)
    shown = _read([folder / entry["file"] for entry in entries[:64]])
    write_png(grid(shown, columns=8), folder / "grid.png")
    guided = "prompt" in entries[0]
    content = {
        "format": 1,
        **manifest,
        "scheduler": settings.scheduler,
        "steps": settings.steps,
        **({"guidance_scale": settings.guidance_scale} if guided else {}),
        **({"negative": settings.negative} if guided and settings.negative else {}),
        "images": entries,
    }
    write_json(folder / "manifest.json", content)


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
    except (DataError, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} is not a complete set of samples: {error}. Delete that folder and run again"
        ) from error


def _are_drawn(paths: Sequence[Path], size: tuple[int, int]) -> bool:
    """Return whether images of a size are there and whole. One that is not is named in a warning."""
    from domainstudio.data.pictures import load_png

    for path in paths:
        try:
            if (found := load_png(path).shape[1:]) != size:
                raise DataError(f"{path} is an image of {found} pixels, not of {size}")
        except FileNotFoundError:
            return False
        except DataError as error:
            logger.warning("%s: it is drawn again", error)
            return False
    return True


def _read(paths: Sequence[Path]) -> Images:
    from domainstudio.data.pictures import load_png

    return np.stack([load_png(path) for path in paths])
