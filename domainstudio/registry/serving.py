"""The code that MLflow stores with each registered model, and runs to serve it.

MLflow copies this one file beside the model ("models from code", hence no pickle), so it must work where
DomainStudio is not installed: it imports MLflow, pandas, torch and diffusers, and nothing else. It is not
meant to be imported elsewhere.
"""

from __future__ import annotations

import base64
import copy
import inspect
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow.models
import pandas as pd  # type: ignore[import-untyped]
from mlflow.pyfunc.model import PythonModel, PythonModelContext

BATCH = 16
"""Images per forward pass, so that a large `number` does not run out of memory."""

MAX_NUMBER = 1000
"""Images per row; more would be one request of hours."""


class ImageModel(PythonModel):  # type: ignore[misc]
    """Draws images from the diffusers pipeline that is stored as the artifact `pipeline`.

    Image i of a row is the pipeline's own for `torch.Generator().manual_seed(seed + i)`. Models of classes
    are drawn here, since diffusers' pipelines pass no class to their network.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load the pipeline, to the GPU where there is one, and the names of its classes."""
        import torch
        from diffusers import DiffusionPipeline

        folder = Path(context.artifacts["pipeline"])
        self.pipeline = DiffusionPipeline.from_pretrained(
            folder, use_safetensors=True, local_files_only=True
        ).to("cuda" if torch.cuda.is_available() else "cpu")
        self.pipeline.set_progress_bar_config(disable=True)
        self.classes = class_names(folder, self.pipeline)
        self.takes_text = "prompt" in inspect.signature(self.pipeline.__call__).parameters
        # The prompt's template in training and an example of it, for messages.
        self.hints = dict(context.model_config or {})

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None
    ) -> pd.DataFrame:
        """Draw `number` images for each row.

        Args:
            context: not used; the pipeline is loaded already.
            model_input: a row per request. Column `seed` replaces the parameter of that name. Models of text
                need a column `prompt` and take a `negative_prompt`; models of classes need a column `label`,
                the name of a class. Without columns, as in `[{}]`, it is one request.
            params: `number` of images per row, `seed` of the first, denoising `steps`, and `scheduler`:
                `saved` (the one in the model's folder), `ddim`, `ddpm` or `dpm-solver++`; for models of text
                and classes also `guidance_scale`, where 1 is without guidance.

        Returns:
            A row per image, in order: `seed`, and `png`, an image file in base64.

        Raises:
            ValueError: a parameter is out of range, or a column is missing that the model needs.
        """
        params = dict(params or {})
        number, steps = int(params.get("number", 1)), int(params.get("steps", 30))
        if not 1 <= number <= MAX_NUMBER:
            raise ValueError(f"number must be between 1 and {MAX_NUMBER}, got {number}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        pipeline = with_scheduler(self.pipeline, str(params.get("scheduler", "saved")))
        # MLflow makes a table without columns one without rows.
        requests = model_input.to_dict("records") or [{}]
        told = [self.told(request, float(params.get("guidance_scale", 1.0))) for request in requests]
        rows: list[dict[str, Any]] = []
        for request, options in zip(requests, told, strict=True):
            first = int(value_of(request, "seed", params.get("seed", 0)))
            seeds = range(first, first + number)
            for start in range(0, number, BATCH):
                rows += draw(pipeline, seeds[start : start + BATCH], steps, options)
        return pd.DataFrame(rows, columns=["seed", "png"])

    def told(self, request: Mapping[str, Any], guidance_scale: float) -> dict[str, Any]:
        """Return what the model is told for a row, as options of `draw`."""
        if guidance_scale < 0:
            raise ValueError(f"guidance_scale must be at least 0, got {guidance_scale:g}")
        if self.takes_text:
            if not (prompt := value_of(request, "prompt", "")):
                raise ValueError(f"this model draws from text: give a column `prompt`{self.prompt_hint()}")
            negative = value_of(request, "negative_prompt", "")
            return {"prompt": prompt, "negative_prompt": negative, "guidance_scale": guidance_scale}
        if self.classes is None:
            return {}
        label, known = value_of(request, "label", ""), ", ".join(self.classes)
        if not label:
            raise ValueError(f"this model draws classes: give a column `label`, one of {known}")
        if label not in self.classes:
            raise ValueError(f"column `label`: the model has no class {label!r}; there are {known}")
        null = len(self.classes)
        if null == self.pipeline.unet.config.num_class_embeds:
            if guidance_scale != 1:
                raise ValueError(
                    f"guidance_scale must be 1, got {guidance_scale:g}: the model was not trained without "
                    "its classes"
                )
            null = -1
        return {"row": self.classes.index(label), "null": null, "guidance_scale": guidance_scale}

    def prompt_hint(self) -> str:
        """Return how prompts of this model look, as the end of a sentence."""
        example, template = self.hints.get("example"), self.hints.get("template")
        such_as = f", such as {example!r}" if example else ""
        return such_as + (f". It was trained on prompts {template!r}" if template else "")


def value_of(request: Mapping[str, Any], column: str, default: Any) -> Any:
    """Return a row's value, or the default where the column is missing or the cell is empty (None or NaN)."""
    value = request.get(column)
    return default if value is None or value != value else value


def class_names(folder: Path, pipeline: Any) -> list[str] | None:
    """Return the names of the embedding's rows, None for a model without classes; unnamed rows are numbered.

    An embedding with one more row than there are names has the null class of guidance last.
    """
    rows = getattr(pipeline.unet.config, "num_class_embeds", None)
    if set(pipeline.components) != {"unet", "scheduler"} or not rows:
        return None
    if not (path := folder / "classes.json").is_file():
        return [str(row) for row in range(rows)]
    names: list[str] = json.loads(path.read_text(encoding="utf-8"))
    return names


def draw(
    pipeline: Any, seeds: Sequence[int], steps: int, told: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Draw one image per seed in one batch; return a record of `seed` and `png` for each."""
    import torch

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    told = told or {}
    if "row" in told:
        images = draw_class(pipeline, generators, steps, **told)
    elif "prompt" in told:
        names = [name for name in ("prompt", "negative_prompt") if told[name]]
        images = pipeline(
            **{name: [told[name]] * len(seeds) for name in names},
            guidance_scale=told["guidance_scale"],
            generator=generators,
            num_inference_steps=steps,
        ).images
    else:
        images = pipeline(batch_size=len(seeds), generator=generators, num_inference_steps=steps).images
    return [{"seed": s, "png": encode(image)} for s, image in zip(seeds, images, strict=True)]


def draw_class(
    pipeline: Any, generators: Sequence[Any], steps: int, row: int, null: int, guidance_scale: float
) -> list[Any]:
    """Draw images of a class by the pipeline's own UNet and scheduler.

    Args:
        pipeline: gives both.
        generators: of each image's noise.
        steps: denoising steps.
        row: the class's row of the embedding.
        null: the null class's row.
        guidance_scale: w of classifier-free guidance, null + w·(class - null) (arXiv 2207.12598; 1 + w
            there); 1 is without.
    """
    import torch

    unet, scheduler = pipeline.unet, pipeline.scheduler
    channels, size = unet.config.in_channels, unet.config.sample_size
    shape = (1, channels, *((size, size) if isinstance(size, int) else size))
    guided = guidance_scale != 1
    rows = [null] * len(generators) * guided + [row] * len(generators)
    labels = torch.tensor(rows, device=unet.device)
    learned = str(getattr(scheduler.config, "variance_type", "")).startswith("learned")
    scheduler.set_timesteps(steps)
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    xt = noise.to(unet.device, unet.dtype) * scheduler.init_noise_sigma
    with torch.inference_mode():
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(xt, timestep)
            output = unet(torch.cat([scaled] * (1 + guided)), timestep, class_labels=labels).sample
            if guided:
                away, towards = output.chunk(2)
                mean = away + guidance_scale * (towards - away)
                output = torch.cat([mean[:, :channels], towards[:, channels:]], dim=1)
            if not (learned and type(scheduler).__name__ == "DDPMScheduler"):
                output = output[:, :channels]  # a learned variance, which only DDPM's sampler uses
            xt = scheduler.step(output, timestep, xt, generator=list(generators)).prev_sample
        images = (xt / 2 + 0.5).clamp(0, 1).float().cpu().permute(0, 2, 3, 1).numpy()
    found: list[Any] = pipeline.numpy_to_pil(images)
    return found


def with_scheduler(pipeline: Any, name: str) -> Any:
    """Return the pipeline with another sampler of the same noise levels, or itself for `saved`."""
    import diffusers

    kinds: dict[str, tuple[str, dict[str, str]]] = {
        "ddim": ("DDIMScheduler", {}),
        "ddpm": ("DDPMScheduler", {}),
        "dpm-solver++": (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"},
        ),
    }
    if name == "saved":
        return pipeline
    if name not in kinds:
        raise ValueError(f"scheduler must be saved, {', '.join(kinds)}, got {name!r}")
    kind, options = kinds[name]
    scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config, **options)
    # DDIMPipeline hands its scheduler arguments that only DDIM takes; DDPMPipeline's loop suits them all.
    if set(pipeline.components) == {"unet", "scheduler"}:
        loop = diffusers.DDIMPipeline if name == "ddim" else diffusers.DDPMPipeline
        changed = loop(unet=pipeline.unet, scheduler=scheduler)
        changed.set_progress_bar_config(disable=True)
        return changed
    # A new pipeline of the same parts would lose options such as force_zeros_for_empty_prompt.
    changed = copy.copy(pipeline)
    changed.scheduler = scheduler
    return changed


def encode(image: Any) -> str:
    """Return an image as the text of a PNG file in base64."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


mlflow.models.set_model(ImageModel())
