"""Seeded, batched and resumable generation from a model of any kind."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from domainstudio.errors import DataError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from domainstudio.config import SampleSettings
    from domainstudio.models.denoiser import Condition, Denoiser, Prediction

Images = NDArray[np.uint8]

DECODED_PIXELS = 4 * 512 * 512
"""Pixels per pass of a decoder, which holds a few hundred channels of each."""


def sample(
    denoiser: Denoiser,
    seeds: Sequence[int],
    conditions: Sequence[str] | None = None,
    *,
    negative: str = "",
    guidance_scale: float = 1.0,
    scheduler: str = "ddim",
    steps: int = 30,
    mixed_precision: str = "no",
) -> Images:
    """Draw one image per seed, in one batch.

    Args:
        denoiser: the model; its network is put into eval mode.
        seeds: the seed of each image's initial noise, and of the noise that `ddpm` adds.
        conditions: what the model is told for each image: prompts, or names of classes; `None`: nothing.
        negative: what guidance leads away from; "" is the model without a condition.
        guidance_scale: w of classifier-free guidance, negative + w·(condition - negative); 1 is without
            (arXiv 2207.12598; 1 + w there).
        scheduler: `ddpm`, `ddim` (η = 0) or `dpm-solver++` (second order).
        steps: denoising steps.
        mixed_precision: autocast type, `no`, `bf16` or `fp16`.

    Returns:
        Images, with shape (len(seeds), 3, H, W).
    """
    import torch

    from domainstudio.models.conditions import join
    from domainstudio.seeding import initial_noise

    denoiser.network.eval()
    device = next(denoiser.network.parameters()).device
    stepper = make_scheduler(denoiser, scheduler)
    stepper.set_timesteps(steps)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options: dict[str, Any] = {} if scheduler == "ddim" else {"generator": generators}
    xt = initial_noise(generators, denoiser.shape).to(device) * stepper.init_noise_sigma
    with torch.inference_mode():
        told = denoiser.condition(list(conditions) if conditions is not None else [""] * len(seeds))
        guided = guidance_scale != 1 and bool(told)
        if guided:
            told = join(denoiser.condition([negative] * len(seeds)), told)
        for timestep in stepper.timesteps:
            scaled = stepper.scale_model_input(xt, timestep)
            with _autocast(device, mixed_precision):
                prediction = _guided(denoiser, scaled, timestep, told, guidance_scale if guided else None)
            output = prediction.output
            if prediction.variance is not None and scheduler == "ddpm":
                output = torch.cat([output, prediction.variance], dim=1)
            xt = stepper.step(output, timestep, xt, **options).prev_sample
        parts = torch.split(xt, max(1, DECODED_PIXELS // (denoiser.resolution[0] * denoiser.resolution[1])))
        images = torch.cat([denoiser.decode(part) for part in parts]).clamp(-1, 1)
    return ((images + 1) * 127.5).round().to(torch.uint8).cpu().numpy()


def _guided(
    denoiser: Denoiser, xt: Tensor, timestep: Tensor, told: Condition, guidance_scale: float | None
) -> Prediction:
    """Return the prediction in float32; with guidance `told` holds the negative condition's rows first."""
    from dataclasses import replace

    import torch

    if guidance_scale is not None:
        xt = torch.cat([xt, xt])
    prediction = denoiser.predict(xt, timestep.expand(len(xt)).to(xt.device), told)
    output, variance = prediction.output.float(), prediction.variance
    if guidance_scale is not None:
        away, towards = output.chunk(2)
        output = away + guidance_scale * (towards - away)
    if variance is not None:
        variance = variance.float()[-len(output) :]  # with guidance the condition's own
    return replace(prediction, output=output, variance=variance)


def draw(
    denoiser: Denoiser, seeds: Sequence[int], conditions: Sequence[str] | None, settings: SampleSettings
) -> Images:
    """Draw one image per seed by the sampling stage's settings, in its batches; see `sample`."""
    batches = range(0, len(seeds), settings.batch_size)
    return np.concatenate(
        [
            sample(
                denoiser,
                seeds[start : start + settings.batch_size],
                conditions[start : start + settings.batch_size] if conditions else None,
                negative=settings.negative,
                guidance_scale=settings.guidance_scale,
                scheduler=settings.scheduler,
                steps=settings.steps,
                mixed_precision=settings.mixed_precision,
            )
            for start in batches
        ]
    )


def make_scheduler(denoiser: Denoiser, name: str) -> Any:
    """Return a diffusers scheduler of that name with the model's own noise levels."""
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

    config = dict(denoiser.noise_scheduler.config)
    if name == "ddpm":
        return DDPMScheduler.from_config(config)
    config.pop("variance_type", None)
    if name == "ddim":
        return DDIMScheduler.from_config(config)
    return DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++")


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

    from domainstudio.datasets.pictures import save_png
    from domainstudio.processes import this_process

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
    from domainstudio.datasets.pictures import grid

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
    _write_manifest(folder, content)


def _write_manifest(folder: Path, content: dict[str, Any]) -> None:
    partial = folder / f".manifest.json.{os.getpid()}"
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / "manifest.json")


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


def _autocast(device: torch.device, mixed_precision: str) -> Any:
    import torch

    if mixed_precision == "no":
        return nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision])


def default_device() -> torch.device:
    """Return the accelerator where there is one, else the CPU."""
    import torch

    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
