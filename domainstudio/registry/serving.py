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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
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

    That may be two, `adapted` and `source`, and `combination.json` says how they draw (see `Partner`).

    Image i of a row is the one that the pipeline draws for `torch.Generator().manual_seed(seed + i)`. Class
    conditional models are drawn by this file, because diffusers' pipelines pass no class to their network.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load the pipeline, onto a GPU if there is one, and the names of its classes."""
        import torch
        from diffusers import DiffusionPipeline

        def load(folder: Path) -> Any:
            index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
            # a text encoder that was left out must be named, or diffusers looks for it
            options: dict[str, Any] = {name: None for name, value in index.items() if value == [None, None]}
            options |= {"use_safetensors": True, "local_files_only": True}
            pipeline = DiffusionPipeline.from_pretrained(folder, **options)
            pipeline.set_progress_bar_config(disable=True)
            # transformers keeps a text encoder in the precision of its file
            return pipeline.to("cuda" if torch.cuda.is_available() else "cpu", torch.float32)

        folder = Path(context.artifacts["pipeline"])
        record = folder / "combination.json"
        own = folder / "adapted" if record.is_file() else folder
        self.pipeline = load(own)
        self.classes = class_names(own, self.pipeline)
        source = load(folder / "source") if record.is_file() else None
        self.partner = Partner(self.pipeline, source, record, self.classes or ()) if source else None
        self.takes_text = "prompt" in inspect.signature(self.pipeline.__call__).parameters
        hints = dict(context.model_config or {})
        self.hint = f", such as {hints['example']!r}" if hints.get("example") else ""
        self.hint += f". It was trained on prompts {hints['template']!r}" if hints.get("template") else ""
        self.lock = Lock()  # MLflow's server answers each request in a thread

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
        scheduler = str(params.get("scheduler", "saved"))
        pipeline = with_scheduler(self.pipeline, scheduler)
        drawing = partial(self.partner.draw, scheduler) if self.partner else draw
        requests = model_input.to_dict("records") or [{}]  # a table without columns has no rows
        scale = float(params.get("guidance_scale", 1.0))
        conditions = [self.condition(request, scale) for request in requests]
        rows: list[dict[str, Any]] = []
        for request, condition in zip(requests, conditions, strict=True):
            first = int(value_of(request, "seed", params.get("seed", 0)))
            seeds = range(first, first + number)
            for start in range(0, number, BATCH):
                with self.lock:
                    rows += drawing(pipeline, seeds[start : start + BATCH], steps, condition)
        return pd.DataFrame(rows, columns=["seed", "png"])

    def condition(self, request: Mapping[str, Any], guidance_scale: float) -> dict[str, Any]:
        """Return a row's prompt or class and the guidance; RequestError where they do not fit the model."""
        if guidance_scale < 0:
            raise RequestError(f"guidance_scale must be at least 0, got {guidance_scale:g}")
        if self.takes_text:
            if not (prompt := value_of(request, "prompt", "")):
                raise RequestError(f"this is a text-to-image model: give a column `prompt`{self.hint}")
            negative = value_of(request, "negative_prompt", "")
            return {"prompt": prompt, "negative_prompt": negative, "guidance_scale": guidance_scale}
        if self.classes is None:
            return {}
        row, null = self.embedding_rows(value_of(request, "label", ""), self.classes)
        if null is None and guidance_scale != 1:
            lacking = "the model was trained without the null class that guidance needs"
            raise RequestError(f"guidance_scale must be 1, got {guidance_scale:g}: {lacking}")
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


class Partner:
    """The source model, which takes part in what the adapted model's network predicts.

    Guided: source + weight·(adapted - source), with the adapted model's variance. Switched: one of the two at
    each timestep. DomainStudio's `models.combined` computes the same. `record` is `combination.json`.

    The source's own pipeline draws beside, in a thread, from its own prompt or class. Where it asks its
    network it waits, and gets the answer that the adapted model's pipeline gets: what both predict together.
    So both go on from the same noisy images, however a family asks its network.
    """

    def __init__(self, pipeline: Any, source: Any, record: Path, classes: Sequence[str]) -> None:
        self.source, self.classes = source, classes
        content = json.loads(record.read_text(encoding="utf-8"))
        self.combine, self.wording = content["combine"], content["wording"]
        at, number = self.combine.get("at", 0), pipeline.scheduler.config.num_train_timesteps
        self.first = math.ceil(round(at * number, 6))
        source.scheduler = copy.deepcopy(pipeline.scheduler)
        network, other = network_of(pipeline), network_of(source)
        self.own, network.forward = network.forward, self.forward
        self.other, other.forward = other.forward, self.ask
        if decoder := getattr(source, "vae", None) or getattr(source, "vqvae", None):
            decoder.decode = self.ask  # nothing answers: the adapted model's pipeline decodes

    def draw(self, scheduler: str, pipeline: Any, seeds: Any, steps: int, condition: Any) -> list[Any]:
        """Return what the function `draw` does, of both models; the pipeline's scheduler has that name."""
        self.asked, self.answers = SimpleQueue[Any](), SimpleQueue[Any]()
        source = with_scheduler(self.source, scheduler)
        thread = Thread(target=self.follow, args=(source, seeds, steps, self.told(condition)))
        thread.start()
        try:
            return draw(pipeline, seeds, steps, condition)
        finally:
            self.answers.put(None)
            thread.join()

    def follow(self, *what: Any) -> None:
        """Draw with the source's pipeline as far as answers come, then say why it is over."""
        try:
            draw(*what)
            raise EOFError("the source model's pipeline ended before the adapted model's")
        except Exception as reason:
            self.asked.put(reason)

    def ask(self, *args: Any, **named: Any) -> Any:
        """Stand for the source's network, and let the adapted model's answer; without an answer, stop."""
        self.asked.put((args, named))
        if (answer := self.answers.get()) is None:
            raise EOFError
        return answer

    def forward(self, *args: Any, **named: Any) -> Any:
        """Return what the adapted model's network would, of both models together."""
        asked = self.asked.get()
        if isinstance(asked, Exception):
            raise asked
        given = inspect.signature(self.own).bind(*args, **named).arguments
        output = self.together(given, lambda: self.other(*asked[0], **asked[1])[0])
        answer = SimpleNamespace(sample=output) if named.get("return_dict", True) else (output,)
        self.answers.put(answer)
        return answer

    def together(self, given: Mapping[str, Any], source: Callable[[], Any]) -> Any:
        """Return what draws at this timestep; channels that the noisy images lack are a variance."""
        if self.combine["mode"] == "switch":
            above = self.timestep(given) >= self.first
            return source() if above == (self.combine["source"] == "above") else self.own(**given)[0]
        parts = source(), self.own(**given)[0], next(iter(given.values()))
        listed = zip(*parts, strict=True) if isinstance(parts[0], list) else [parts]  # Z-Image has lists
        for first, second, noisy in listed:
            away, towards = (each[:, : noisy.shape[1]] for each in (first, second))
            towards[:] = away.float().lerp(towards.float(), self.combine["weight"])
        return parts[1]

    def timestep(self, given: Mapping[str, Any]) -> float:
        """Return the timestep: networks are told it, or the noise level, or what that is from 1."""
        if "t" in given:  # Z-Image
            return round(1000 * (1 - float(given["t"].flatten()[0])), 3)
        told = float(given["timestep"].flatten()[0])
        return round(1000 * told, 3) if {"img_ids", "img_shapes"} & given.keys() else told  # Flux, Qwen-Image

    def told(self, condition: Mapping[str, Any]) -> dict[str, Any]:
        """Return the source model's own condition."""
        if "row" in condition:
            return {**condition, "row": self.classes.index(self.text(self.classes[condition["row"]]))}
        texts = ("prompt", "negative_prompt")
        return {name: self.text(value) if name in texts else value for name, value in condition.items()}

    def text(self, text: str) -> str:
        """Return what the source model is told in place of a prompt or a class."""
        for pattern, template in self.wording:
            if text and (match := re.fullmatch(pattern, text, re.DOTALL)):
                return str(template.format(**match.groupdict()))
        return text


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
    negative, guided = [negative_prompt] * number, "true_cfg_scale" in parameters
    if guided and not network_of(pipeline).config.guidance_embeds:
        options |= {"negative_prompt": negative, "true_cfg_scale": options.pop("guidance_scale")}
    elif guided and negative_prompt:
        raise RequestError("the model is distilled for guidance: leave the column negative_prompt empty")
    elif negative_prompt and "negative_prompt" in parameters:
        options["negative_prompt"] = negative
    elif negative_prompt:  # Flux.2 takes it encoded
        options["negative_prompt_embeds"] = pipeline.encode_prompt(negative, **length)[0]
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

    `row` and `null` are rows of the embedding; without guidance there may be no null class, beyond the names.
    Guidance is null + w·(class - null) (arXiv 2207.12598, where it is 1 + w).
    """
    import torch

    unet, scheduler = pipeline.unet, pipeline.scheduler
    channels, size = unet.config.in_channels, unet.config.sample_size
    shape = (1, channels, *((size, size) if isinstance(size, int) else size))
    guided = guidance_scale != 1
    labels = torch.tensor([null] * guided + [row], device=unet.device).repeat_interleave(len(generators))
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
    return list(pipeline.numpy_to_pil((xt / 2 + 0.5).clamp(0, 1).float().cpu().permute(0, 2, 3, 1).numpy()))


def with_scheduler(pipeline: Any, name: str) -> Any:
    """Return the pipeline with another scheduler of the same noise levels, or itself for `saved`."""
    import diffusers

    kinds = schedulers(config := pipeline.scheduler.config)
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


def schedulers(config: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return class and options of each scheduler by its name; for flow matching Euler's method is DDIM."""
    if "shift" in config or config.get("use_flow_sigmas"):
        shift = float(config.get("flow_shift", config.get("shift", 1.0)))
        ddim: dict[str, Any] = {"shift": shift, "stochastic_sampling": False}
        ddpm, names = {**ddim, "stochastic_sampling": True}, ("FlowMatchEulerDiscreteScheduler",) * 2
        solver: dict[str, Any] = {
            "use_flow_sigmas": True,
            "flow_shift": shift,
            "prediction_type": "flow_prediction",
        }
    else:  # where another sampler was saved, latents have no range to clip to
        ddim = {} if "clip_sample" in config else {"clip_sample": False, "variance_type": "fixed_small"}
        ddpm, solver = ddim, {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
        names = ("DDIMScheduler", "DDPMScheduler")
    solving = ("DPMSolverMultistepScheduler", solver)
    return {"ddim": (names[0], ddim), "ddpm": (names[1], ddpm), "dpm-solver++": solving}


def encode(image: Any) -> str:
    """Return an image as the text of a PNG file in base64."""
    image.save(buffer := io.BytesIO(), format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


mlflow.models.set_model(ImageModel())
