"""Seeded, batched and resumable generation from a model of any kind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from domainstudio.errors import DataError

if TYPE_CHECKING:
    import torch

    from domainstudio.config import SampleSettings
    from domainstudio.models.denoiser import Denoiser

Images = NDArray[np.uint8]


def sample(
    denoiser: Denoiser,
    seeds: Sequence[int],
    *,
    scheduler: str = "ddim",
    steps: int = 30,
    mixed_precision: str = "no",
) -> Images:
    """Draw one image per seed, in one batch.

    Args:
        denoiser: the model; its network is put into eval mode.
        seeds: the seed of each image's initial noise, and of the noise that `ddpm` adds.
        scheduler: `ddpm`, `ddim` (η = 0) or `dpm-solver++` (second order).
        steps: denoising steps.
        mixed_precision: autocast type, `no`, `bf16` or `fp16`.

    Returns:
        Images, with shape (len(seeds), 3, H, W).
    """
    import torch

    from domainstudio.seeding import initial_noise

    denoiser.network.eval()
    device = next(denoiser.network.parameters()).device
    stepper = make_scheduler(denoiser, scheduler)
    stepper.set_timesteps(steps)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options: dict[str, Any] = {} if scheduler == "ddim" else {"generator": generators}
    xt = initial_noise(generators, denoiser.shape).to(device) * stepper.init_noise_sigma
    with torch.inference_mode():
        for timestep in stepper.timesteps:
            scaled = stepper.scale_model_input(xt, timestep)
            with _autocast(device, mixed_precision):
                prediction = denoiser.predict(scaled, timestep.expand(len(xt)).to(device))
            output = prediction.output.float()
            if prediction.variance is not None and scheduler == "ddpm":
                output = torch.cat([output, prediction.variance.float()], dim=1)
            xt = stepper.step(output, timestep, xt, **options).prev_sample
        images = denoiser.decode(xt).clamp(-1, 1)
    return ((images + 1) * 127.5).round().to(torch.uint8).cpu().numpy()


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


def sample_to_folder(denoiser: Denoiser, folder: Path, settings: SampleSettings, **manifest: Any) -> None:
    """Draw `settings.number` images into `folder`, going on where an interrupted call stopped.

    Batches are always the same images, so an interrupted call ends with the same pictures. Writes
    `images/NNNNNN.png`, `grid.png` of the first 64 and, last, `manifest.json` with every image's seed.

    Args:
        denoiser: the model.
        folder: where to write.
        settings: number, seed, scheduler, steps and batch size.
        manifest: further entries of the manifest.
    """
    from tqdm import tqdm

    from domainstudio.datasets.pictures import grid, save_png

    seeds = [settings.seed + i for i in range(settings.number)]
    paths = [folder / "images" / f"{i:06d}.png" for i in range(settings.number)]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    title = f"sample {manifest.get('model', folder.name)}"
    with tqdm(total=settings.number, unit="image", desc=title) as progress:
        for start in range(0, settings.number, settings.batch_size):
            batch = slice(start, start + settings.batch_size)
            if not all(path.is_file() for path in paths[batch]):
                images = sample(
                    denoiser,
                    seeds[batch],
                    scheduler=settings.scheduler,
                    steps=settings.steps,
                    mixed_precision=settings.mixed_precision,
                )
                save_png(images, paths[batch])
            progress.update(len(paths[batch]))
    grid(_read(paths[:64]), columns=8).save(folder / "grid.png")
    content = {
        "format": 1,
        **manifest,
        "scheduler": settings.scheduler,
        "steps": settings.steps,
        "images": [{"file": f"images/{p.name}", "seed": s} for p, s in zip(paths, seeds, strict=True)],
    }
    (folder / "manifest.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


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
            f"{folder} is not a complete set of samples: {error}. Draw it again: stage sample"
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
