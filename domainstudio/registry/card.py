"""What people read of a registered model: its card, its summary and its headline figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from domainstudio.config import Adaptation
from domainstudio.models.kinds import Kind
from domainstudio.registry.artifacts import ADAPTERS, MERGED

HEADLINE = ("frechet_distance", "kid", "intra_distance", "memorized_share")
"""Metrics that are shown first, where they were measured."""

TOLD = ("top_1", "top_5", "clip_score", "intra_clip")
"""Metrics of models that are told something; they follow in the table."""


@dataclass(frozen=True)
class Usage:
    """How a registered model is loaded and asked for images."""

    model: str
    """The registered model's name."""
    label: str
    """What users should load: `@` and an alias, or `/` and a version."""
    adaptation: str
    kind: Kind
    lora: bool
    """Whether adapters were trained."""
    example: str = ""
    """A prompt or class; "" where the model is told nothing."""
    guidance_scale: float = 1.0
    """Guidance of the samples."""

    @property
    def uri(self) -> str:
        """The version, as MLflow names it."""
        return f"models:/{self.model}{self.label}"

    @property
    def folder(self) -> str:
        """The pipeline within the version's artifacts."""
        return MERGED if self.lora else self.adaptation

    @property
    def row(self) -> dict[str, str]:
        """A row of the pyfunc's input."""
        column = {"text-to-image": "prompt", "class-conditional": "label"}.get(self.kind)
        return {column: self.example} if column else {}

    @property
    def params(self) -> dict[str, Any]:
        """Parameters of the pyfunc."""
        guidance = {"guidance_scale": self.guidance_scale} if self.row else {}
        return {"number": 4, "seed": 0, "steps": 30, **guidance}


def summary(adaptation: Adaptation, alias: str) -> str:
    """Return the registered model's description: what all its versions have in common."""
    return (
        f"Source model `{adaptation.source}` adapted to the domain `{adaptation.target}` by DomainStudio's "
        f"method `{adaptation.method}` (adaptation `{adaptation.name}` of `params.yaml`). Use the version "
        f"with the alias `{alias}`; every version has its own card."
    )


def model_card(
    readme: str, metrics: Mapping[str, Any], usage: Usage, verdict: str, run_id: str, grid: str | None = None
) -> str:
    """Return a version's card, in Markdown: verdict, samples, figures, what the model's own card says, use.

    Args:
        readme: the model folder's README.md; its header for the hub and its code are left out.
        metrics: `evaluation/<adaptation>/metrics.json`.
        usage: how the version is loaded.
        verdict: the gate's, and its reason.
        run_id: the run whose artifact `grid` is.
        grid: path of the picture of samples within that run, or None.
    """
    body = readme.split("---\n", 2)[2] if readme.startswith("---\n") and readme.count("---\n") > 1 else readme
    title, _, rest = body.strip().partition("\n")
    # MLflow's list of versions shows the first line as it is, so it is no heading and holds the figures.
    figures = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in headline(metrics).items())
    first = title.lstrip("# ") + (f": {figures}" if figures else "")
    # The address is relative to MLflow's own pages, which serve the artifacts of runs there.
    picture = f"![samples](get-artifact?path={grid}&run_uuid={run_id})" if grid else ""
    own = rest.partition("```python")[0].strip()
    adapters = _adapters(usage) if usage.lora else ""
    parts = [first, f"**Gate**: {verdict}", picture, _figures(metrics), own, _usage(usage), adapters]
    return "\n\n".join(part for part in parts if part) + "\n"


def headline(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return the first metrics as tags, each with the feature network that the figure depends on."""
    network, samples = metrics.get("features", "unknown"), metrics.get("samples", {})
    return {name: f"{samples[name]:.4g} ({network})" for name in HEADLINE if _measured(samples, name)}


def _measured(values: Mapping[str, Any], name: str) -> bool:
    return isinstance(values.get(name), int | float)


def _figures(metrics: Mapping[str, Any]) -> str:
    columns: dict[str, dict[str, Any]] = {"this model": {}}
    for part in (metrics, metrics.get("paired") or {}, metrics.get("clip") or {}):
        for title, values in {"this model": part.get("samples", {}), **part.get("references", {})}.items():
            columns[title] = {**columns.get(title, {}), **values}
    names = [n for n in (*HEADLINE, *TOLD) if any(_measured(values, n) for values in columns.values())]
    if not names:
        return ""
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name in names:
        cells = [f"{v[name]:.4g}" if _measured(v, name) else "–" for v in columns.values()]
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
    number = f" of {metrics['number']} samples" if "number" in metrics else ""
    clip = (metrics.get("clip") or {}).get("model")
    also = f", CLIP's with `{clip}`" if clip else ""
    lines += ["", f"Measured{number} with the features of `{metrics.get('features', 'unknown')}`{also}."]
    return "\n".join(lines)


def _usage(usage: Usage) -> str:
    row, params = json.dumps(usage.row, ensure_ascii=False), json.dumps(usage.params)
    body = f'{{"dataframe_records": [{row}], "params": {{"number": 4, "seed": 0}}}}'
    call, same = "", "The same seed gives the same picture in both."
    if usage.kind == "text-to-image":
        example, guidance = json.dumps(usage.example, ensure_ascii=False), usage.guidance_scale
        call = f"\nimage = pipeline({example}, guidance_scale={guidance:g}, num_inference_steps=30).images[0]"
    elif usage.kind == "class-conditional":
        same = (
            "Diffusers' own pipelines pass no class: "
            "call the pipeline's `unet` with `class_labels`, rows of its `classes.json`."
        )
    return f"""```python
import mlflow
from diffusers import DiffusionPipeline

model = mlflow.pyfunc.load_model("{usage.uri}")
images = model.predict([{row}], params={params})  # columns seed, png (base64)

path = mlflow.artifacts.download_artifacts("{usage.uri}")
pipeline = DiffusionPipeline.from_pretrained(f"{{path}}/artifacts/{usage.folder}"){call}
```

{same} Over HTTP: `mlflow models serve -m {usage.uri}`, then
POST `{body}` to `/invocations`."""


def _adapters(usage: Usage) -> str:
    if usage.kind == "text-to-image":
        use = """base = DiffusionPipeline.from_pretrained("path/to/the/source/model")
base.load_lora_weights(folder)"""
        note = "`kohya.safetensors` in it is for ComfyUI, AUTOMATIC1111 and the like."
    else:
        use = "denoiser = models.load(folder)  # from domainstudio import models"
        note = "It needs the source model, at the `base` of its `adapter.json`."
    return f"""The adapters are fused into that pipeline. Alone they are a small file for the source model:

```python
folder = mlflow.artifacts.download_artifacts("{usage.uri}/artifacts/{ADAPTERS}")
{use}
```

{note}"""
