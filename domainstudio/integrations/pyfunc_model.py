"""The code that MLflow stores with each registered model, and runs to serve it.

MLflow copies this one file beside the model ("models from code", hence no pickle), so it must work where
DomainStudio is not installed: it imports MLflow, pandas, torch and diffusers, and nothing else. It is not
meant to be imported elsewhere.
"""

from __future__ import annotations

import base64
import inspect
import io
from collections.abc import Mapping
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

    Image i of a row is the pipeline's own for `torch.Generator().manual_seed(seed + i)`.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load the pipeline, to the GPU where there is one."""
        import torch
        from diffusers import DiffusionPipeline

        self.pipeline = DiffusionPipeline.from_pretrained(
            context.artifacts["pipeline"], use_safetensors=True, local_files_only=True
        ).to("cuda" if torch.cuda.is_available() else "cpu")
        self.pipeline.set_progress_bar_config(disable=True)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None
    ) -> pd.DataFrame:
        """Draw `number` images for each row.

        Args:
            context: not used; the pipeline is loaded already.
            model_input: a row per request. Column `seed` replaces the parameter of that name; column
                `prompt` is for models of text. Without columns, as in `[{}]`, it is one request.
            params: `number` of images per row, `seed` of the first, denoising `steps`, and `scheduler`:
                `saved` (the one in the model's folder), `ddim`, `ddpm` or `dpm-solver++`.

        Returns:
            A row per image, in order: `seed`, and `png`, an image file in base64.

        Raises:
            ValueError: a parameter is out of range.
        """
        params = dict(params or {})
        number, steps = int(params.get("number", 1)), int(params.get("steps", 30))
        if not 1 <= number <= MAX_NUMBER:
            raise ValueError(f"number must be between 1 and {MAX_NUMBER}, got {number}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        pipeline = with_scheduler(self.pipeline, str(params.get("scheduler", "saved")))
        rows: list[dict[str, Any]] = []
        # MLflow makes a table without columns one without rows.
        for request in model_input.to_dict("records") or [{}]:
            first = int(request.get("seed", params.get("seed", 0)))
            seeds = range(first, first + number)
            for start in range(0, number, BATCH):
                rows += draw(pipeline, list(seeds[start : start + BATCH]), steps, request.get("prompt"))
        return pd.DataFrame(rows, columns=["seed", "png"])


def draw(pipeline: Any, seeds: list[int], steps: int, prompt: str | None = None) -> list[dict[str, Any]]:
    """Draw one image per seed in one batch; return a record of `seed` and `png` for each."""
    import torch

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options: dict[str, Any] = {"batch_size": len(seeds)}
    if "prompt" in inspect.signature(pipeline.__call__).parameters:
        if not prompt:
            raise ValueError("this model draws from text: give a column `prompt`")
        options = {"prompt": [prompt] * len(seeds)}
    images = pipeline(generator=generators, num_inference_steps=steps, **options).images
    return [{"seed": s, "png": encode(image)} for s, image in zip(seeds, images, strict=True)]


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
    else:
        changed = type(pipeline)(**{**pipeline.components, "scheduler": scheduler})
    changed.set_progress_bar_config(disable=True)
    return changed


def encode(image: Any) -> str:
    """Return an image as the text of a PNG file in base64."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


mlflow.models.set_model(ImageModel())
