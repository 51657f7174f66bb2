"""The code that MLflow stores with each registered model and runs to serve it.

MLflow copies this one file beside the model ("models from code", so nothing is pickled). It must work
without DomainStudio, so it imports MLflow, pandas, torch and diffusers only. Nothing else imports it.
"""

from __future__ import annotations

import base64
import copy
import inspect
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow.models
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext

BATCH = 16
"""Images per forward pass, so that a large `number` fits into memory."""

MAX_NUMBER = 1000
"""Images per row. A request for more would take hours."""


class RequestError(MlflowException, ValueError):  # type: ignore[misc]
    """A request that cannot be done. Over HTTP the answer is status 400 and the sentence, no stack trace."""

    def __init__(self, message: str) -> None:
        MlflowException.__init__(self, message, error_code=INVALID_PARAMETER_VALUE)


class ImageModel(PythonModel):  # type: ignore[misc]
    """Draws images from the diffusers pipeline that is stored as the artifact `pipeline`.

    That artifact may be two pipelines, `adapted` and `source`, and `combination.json`, which says how they
    draw together (see `Partner`).

    Image i of a row is the one that the pipeline draws for `torch.Generator().manual_seed(seed + i)`. Class
    conditional models are drawn by this file, because diffusers' pipelines pass no class to their network.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load the pipeline, onto a GPU if there is one, and the names of its classes."""
        import torch
        from diffusers import DiffusionPipeline

        def load(folder: Path) -> Any:
            options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
            index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
            # a text encoder that was left out must be named, or diffusers looks for it
            options |= {name: None for name, value in index.items() if value == [None, None]}
            pipeline = DiffusionPipeline.from_pretrained(folder, **options)
            # transformers keeps a text encoder in the precision of its file
            return pipeline.to("cuda" if torch.cuda.is_available() else "cpu", torch.float32)

        folder = Path(context.artifacts["pipeline"])
        record = folder / "combination.json"
        own = folder / "adapted" if record.is_file() else folder
        self.pipeline = load(own)
        self.pipeline.set_progress_bar_config(disable=True)
        self.classes = class_names(own, self.pipeline)
        self.partner: Partner | None = None
        if record.is_file():
            content = json.loads(record.read_text(encoding="utf-8"))
            self.partner = Partner(self.pipeline, load(folder / "source"), content, self.classes or ())
        self.takes_text = "prompt" in inspect.signature(self.pipeline.__call__).parameters
        # The prompt template of the training and an example of a prompt, for error messages.
        self.hints = dict(context.model_config or {})

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None
    ) -> pd.DataFrame:
        """Return `number` images for each row, in order: `seed`, and `png`, an image file in base64.

        Args:
            context: Not used; the pipeline is loaded already.
            model_input: A row per request. Column `seed` replaces the parameter of that name. Text-to-image
                models need a column `prompt` and accept `negative_prompt`; class-conditional models need a
                column `label`, the name of a class. A table without columns, as in `[{}]`, is one request.
            params: `number` of images per row, `seed` of the first, denoising `steps`, and `scheduler`:
                `saved` (the one in the model's folder), `ddim`, `ddpm` or `dpm-solver++`. Models with prompts
                or classes also have `guidance_scale`; 1 means no guidance.

        Raises:
            RequestError: a parameter is out of range, or a column is missing.
        """
        params = dict(params or {})
        number, steps = int(params.get("number", 1)), int(params.get("steps", 30))
        if not 1 <= number <= MAX_NUMBER:
            raise RequestError(f"number must be between 1 and {MAX_NUMBER}, got {number}")
        most = self.pipeline.scheduler.config.num_train_timesteps
        if not 1 <= steps <= most:
            raise RequestError(f"steps must be between 1 and {most}, got {steps}")
        pipeline = with_scheduler(self.pipeline, str(params.get("scheduler", "saved")))
        # MLflow turns a table without columns into one without rows.
        requests = model_input.to_dict("records") or [{}]
        scale = float(params.get("guidance_scale", 1.0))
        conditions = [self.condition(request, scale) for request in requests]
        rows: list[dict[str, Any]] = []
        for request, condition in zip(requests, conditions, strict=True):
            first = int(value_of(request, "seed", params.get("seed", 0)))
            seeds = range(first, first + number)
            for start in range(0, number, BATCH):
                batch = seeds[start : start + BATCH]
                if self.partner is not None:
                    self.partner.tell(condition, len(batch))
                rows += draw(pipeline, batch, steps, condition)
        return pd.DataFrame(rows, columns=["seed", "png"])

    def condition(self, request: Mapping[str, Any], guidance_scale: float) -> dict[str, Any]:
        """Return a row's prompt or class and the guidance; RequestError where they do not fit the model."""
        if guidance_scale < 0:
            raise RequestError(f"guidance_scale must be at least 0, got {guidance_scale:g}")
        if self.takes_text:
            if not (prompt := value_of(request, "prompt", "")):
                raise RequestError(
                    f"this is a text-to-image model: give a column `prompt`{self.prompt_hint()}"
                )
            negative = value_of(request, "negative_prompt", "")
            return {"prompt": prompt, "negative_prompt": negative, "guidance_scale": guidance_scale}
        if self.classes is None:
            return {}
        row, null = self.embedding_rows(value_of(request, "label", ""), self.classes)
        if null is None and guidance_scale != 1:
            raise RequestError(
                f"guidance_scale must be 1, got {guidance_scale:g}: the model was trained without the null "
                "class that guidance needs"
            )
        return {"row": row, "null": null, "guidance_scale": guidance_scale}

    def embedding_rows(self, label: str, classes: Sequence[str]) -> tuple[int, int | None]:
        """Return the embedding's rows of a class and of the null class, if any; RequestError if unknown."""
        known = ", ".join(classes)
        if not label:
            raise RequestError(f"this is a class-conditional model: give a column `label`, one of {known}")
        if label not in classes:
            raise RequestError(f"column `label`: the model has no class {label!r}; there are {known}")
        has_null = len(classes) < network_of(self.pipeline).config.num_class_embeds
        return classes.index(label), len(classes) if has_null else None

    def prompt_hint(self) -> str:
        """Return an example of a prompt for this model, as the end of a sentence."""
        example, template = self.hints.get("example"), self.hints.get("template")
        such_as = f", such as {example!r}" if example else ""
        return such_as + (f". It was trained on prompts {template!r}" if template else "")


class Partner:
    """The source model, which takes part in the forward pass of the adapted model's network.

    Guided: source + weight·(adapted - source), with the adapted model's variance. Switched: one of the two at
    each timestep. DomainStudio's `models.combined` computes the same. `record` is `combination.json`.
    """

    def __init__(self, pipeline: Any, source: Any, record: Mapping[str, Any], classes: Sequence[str]) -> None:
        self.source, self.classes = source, classes
        self.combine, self.wording = record["combine"], record["wording"]
        at, number = self.combine.get("at", 0), pipeline.scheduler.config.num_train_timesteps
        self.first = math.ceil(round(at * number, 6))
        self.told: dict[str, Any] = {}
        network = network_of(pipeline)
        self.names = list(inspect.signature(network.forward).parameters)
        self.own, network.forward = network.forward, self.forward

    def tell(self, condition: Mapping[str, Any], number: int) -> None:
        """Give the source model its own condition of the next `number` images; `draw` takes the other's."""
        import torch

        if "row" in condition:
            row = self.classes.index(self.text(self.classes[condition["row"]]))
            rows = [condition["null"]] * number * (condition["guidance_scale"] != 1) + [row] * number
            self.told = {"class_labels": torch.tensor(rows, device=network_of(self.source).device)}
        elif "prompt" in condition:
            self.told = self.embeddings(condition, number)

    def embeddings(self, condition: Mapping[str, Any], number: int) -> dict[str, Any]:
        """Return the source's embeddings of prompts by its network's names, in diffusers' order of rows."""
        import torch

        encode = self.source.encode_prompt
        parameters = inspect.signature(encode).parameters
        more: dict[str, Any] = {name: None for name in ("prompt_2", "prompt_3") if name in parameters}
        masked = "prompt_attention_mask" in parameters  # PixArt: each text and its mask
        guided, negative = condition["guidance_scale"] > 1, condition["negative_prompt"]
        with torch.inference_mode():
            found = encode(
                prompt=[self.text(condition["prompt"])] * number,
                negative_prompt=[negative] * number if negative or masked else None,
                device=network_of(self.source).device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=guided,
                **more,
                **length_of(self.source),
            )
        pairs = [found[::2], found[1::2]] if masked else [found[:2], found[2:]]
        joined = [torch.cat([pair[1], pair[0]]) if guided else pair[0] for pair in pairs if pair]
        pooled = "pooled_projections" if "pooled_projections" in self.names else "text_embeds"
        second = "encoder_attention_mask" if masked else pooled  # pooled: of XL and SD3
        return dict(zip(("encoder_hidden_states", second), joined, strict=False))

    def text(self, text: str) -> str:
        """Return what the source model is told in place of a prompt or a class."""
        for pattern, template in self.wording:
            if match := re.fullmatch(pattern, text, re.DOTALL):
                return str(template.format(**match.groupdict()))
        return text

    def forward(self, *args: Any, return_dict: bool = True, **named: Any) -> Any:
        """Return what the adapted model's network would, of both models together."""
        import torch

        given = dict(zip(self.names, args, strict=False)) | named
        sample, timestep = given[self.names[0]], given["timestep"]
        if self.combine["mode"] == "switch":
            above = float(torch.as_tensor(timestep).flatten()[0]) >= self.first
            asks_source = above == (self.combine["source"] == "above")
            output = self.predict(given) if asks_source else self.own(**given).sample
        else:
            channels, second = sample.shape[1], self.own(**given).sample
            first = self.predict(given)[:, :channels]
            mixed = torch.lerp(first.float(), second[:, :channels].float(), self.combine["weight"])
            output = torch.cat([mixed.to(second.dtype), second[:, channels:]], dim=1)
        return SimpleNamespace(sample=output) if return_dict else (output,)

    def predict(self, given: Mapping[str, Any]) -> Any:
        """Return the source's prediction for its own condition."""
        own = {**given, **self.told}
        if (pooled := own.pop("text_embeds", None)) is not None:
            own["added_cond_kwargs"] = {**own["added_cond_kwargs"], "text_embeds": pooled}
        return network_of(self.source)(**own).sample


def network_of(pipeline: Any) -> Any:
    """Return the part of a pipeline that denoises."""
    return getattr(pipeline, "unet", None) or pipeline.transformer


def length_of(pipeline: Any) -> dict[str, int]:
    """Return a prompt's tokens: those of the pipeline, or fewer where its last tokenizer says so."""
    own = inspect.signature(pipeline.__call__).parameters.get("max_sequence_length")
    tokenizer = own and getattr(pipeline, max(name for name in pipeline.components if "tokenizer" in name))
    return {"max_sequence_length": min(own.default, tokenizer.model_max_length)} if own and tokenizer else {}


def value_of(request: Mapping[str, Any], column: str, default: Any) -> Any:
    """Return a cell of a row, or the default if the column is missing or the cell is empty (None or NaN)."""
    value = request.get(column)
    return default if value is None or value != value else value


def class_names(folder: Path, pipeline: Any) -> list[str] | None:
    """Return the names of the class embedding's rows, or their numbers; None for a model without classes."""
    rows = network_of(pipeline).config.get("num_class_embeds")
    if set(pipeline.components) != {"unet", "scheduler"} or not rows:
        return None
    if not (path := folder / "classes.json").is_file():
        return [str(row) for row in range(rows)]
    return list(json.loads(path.read_text(encoding="utf-8")))


def draw(pipeline: Any, seeds: Sequence[int], steps: int, condition: Mapping[str, Any]) -> list[Any]:
    """Return `seed` and `png` of one image per seed, drawn in one batch."""
    import torch

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if "row" in condition:
        images = draw_class(pipeline, generators, steps, **condition)
    else:
        options = prompted(pipeline, len(seeds), **condition) if condition else {"batch_size": len(seeds)}
        images = pipeline(**options, generator=generators, num_inference_steps=steps).images
    return [{"seed": s, "png": encode(image)} for s, image in zip(seeds, images, strict=True)]


def prompted(pipeline: Any, number: int, prompt: str, negative_prompt: str, guidance_scale: float) -> Any:
    """Return what a pipeline is called with for a prompt; guidance is negative + w·(prompt - negative)."""
    length = length_of(pipeline)
    options: dict[str, Any] = {"prompt": [prompt] * number, "guidance_scale": guidance_scale, **length}
    parameters = inspect.signature(pipeline.__call__).parameters
    if negative_prompt and "negative_prompt" in parameters:
        options["negative_prompt"] = [negative_prompt] * number
    elif negative_prompt:  # Flux.2 takes it encoded
        options["negative_prompt_embeds"] = pipeline.encode_prompt([negative_prompt] * number, **length)[0]
    if "true_cfg_scale" in parameters and not network_of(pipeline).config.guidance_embeds:
        options["true_cfg_scale"] = options.pop("guidance_scale")
        options["negative_prompt"] = [negative_prompt] * number
    elif "true_cfg_scale" in parameters and negative_prompt:
        raise RequestError("the model is distilled for guidance: leave the column negative_prompt empty")
    if "use_resolution_binning" in parameters:
        options["use_resolution_binning"] = False  # it knows the published models' sizes alone
    if "sample_size" not in network_of(pipeline).config:  # a network of any size
        options |= dict.fromkeys(("height", "width"), pipeline.vae.config.sample_size)
    if type(pipeline).__name__ == "ZImagePipeline":  # whose guidance is prompt + w·(prompt - negative)
        options["guidance_scale"] = max(guidance_scale - 1, 0.0)
    return options


def draw_class(
    pipeline: Any, generators: Sequence[Any], steps: int, row: int, null: int | None, guidance_scale: float
) -> list[Any]:
    """Draw an image of a class for each generator, with the pipeline's own UNet and scheduler.

    `row` and `null` are rows of the embedding; without guidance there may be no null class, which is a row
    beyond the names. Guidance is null + w·(class - null) (arXiv 2207.12598, where it is 1 + w).
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
    return list(pipeline.numpy_to_pil(images))


def with_scheduler(pipeline: Any, name: str) -> Any:
    """Return the pipeline with another scheduler of the same noise levels, or itself for `saved`."""
    import diffusers

    config = pipeline.scheduler.config
    # another sampler was saved: latents have no range to clip to
    plain = {} if "clip_sample" in config else {"clip_sample": False, "variance_type": "fixed_small"}
    solver = {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "ddim": ("DDIMScheduler", plain),
        "ddpm": ("DDPMScheduler", plain),
        "dpm-solver++": ("DPMSolverMultistepScheduler", solver),
    }
    if "shift" in config or config.get("use_flow_sigmas"):
        kinds = flow_schedulers(float(config.get("flow_shift", config.get("shift", 1.0))))
    if name == "saved":
        return pipeline
    if name not in kinds:
        raise RequestError(f"scheduler must be saved, {', '.join(kinds)}, got {name!r}")
    kind, options = kinds[name]
    scheduler = getattr(diffusers, kind).from_config(config, **options)
    # DDIMPipeline passes arguments that only DDIM takes. DDPMPipeline's loop works with every scheduler.
    if set(pipeline.components) == {"unet", "scheduler"}:
        loop = diffusers.DDIMPipeline if name == "ddim" else diffusers.DDPMPipeline
        changed = loop(unet=pipeline.unet, scheduler=scheduler)
        changed.set_progress_bar_config(disable=True)
        return changed
    # A new pipeline made of the same parts would lose options such as force_zeros_for_empty_prompt.
    changed = copy.copy(pipeline)
    changed.scheduler = scheduler if "flow_shift" not in options else any_steps(scheduler)
    return changed


def any_steps(solver: Any) -> Any:
    """Return DPM-Solver++ as pipelines of flow matching call it: with Euler's σ, and a shift to ignore."""
    own, by_size = solver.set_timesteps, solver.config.use_dynamic_shifting

    def set_timesteps(steps: int = 0, device: Any = None, sigmas: Any = (), mu: float | None = None) -> None:
        own(steps or len(sigmas), device=device, mu=mu if by_size else None)

    solver.set_timesteps = set_timesteps
    return solver


def flow_schedulers(shift: float) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return class and options of each scheduler for flow matching, where Euler's method is DDIM."""
    solver = {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": "flow_prediction"}
    return {
        "ddim": ("FlowMatchEulerDiscreteScheduler", {"shift": shift, "stochastic_sampling": False}),
        "ddpm": ("FlowMatchEulerDiscreteScheduler", {"shift": shift, "stochastic_sampling": True}),
        "dpm-solver++": ("DPMSolverMultistepScheduler", solver),
    }


def encode(image: Any) -> str:
    """Return an image as the text of a PNG file in base64."""
    image.save(buffer := io.BytesIO(), format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


mlflow.models.set_model(ImageModel())
