"""What a result came from: its record, its training log and its model card."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from domainstudio.data import ImageSet
    from domainstudio.models.kinds import Kind

_TRACKED = ("domainstudio", "torch", "diffusers", "accelerate")


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that a result depends on."""
    found = {}
    for name in _TRACKED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Provenance:
    """Everything that decided an adapted model, stored beside it as `provenance.json`."""

    adaptation: str
    key: str
    """SHA-256 of parameters and inputs; the same key means the same result."""
    params: Mapping[str, Any]
    """The resolved adaptation."""
    inputs: Mapping[str, str]
    """Content hashes of the source model and of the training images."""
    steps: int
    versions: Mapping[str, str] = field(default_factory=versions)

    def as_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return {"format": 1, **asdict(self)}


def write_history(folder: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Write `losses.csv` for `dvc plots`, and `history.jsonl` as trackers replay it."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = [name for name in history[-1] if name != "timestamp"]
    with (folder / "losses.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
    lines = "".join(json.dumps(dict(record)) + "\n" for record in history)
    (folder / "history.jsonl").write_text(lines, encoding="utf-8")


_NO_TERMS = frozenset({"pairwise_temperature", "min_snr_gamma"})
"""Numbers among a method's settings that are no weights of loss terms."""

_LOAD = 'DiffusionPipeline.from_pretrained("path/to/this/folder")'

_PLAIN = f"""from diffusers import DiffusionPipeline

images = {_LOAD}(batch_size=4, num_inference_steps=30).images"""

_TEXT = f"""from diffusers import DiffusionPipeline

pipeline = {_LOAD}
images = pipeline(prompt={{told}}, num_images_per_prompt=4, num_inference_steps=30).images"""

_TEXT_LORA = """from diffusers import DiffusionPipeline

base = DiffusionPipeline.from_pretrained("path/to/the/source/model")
base.load_lora_weights("path/to/this/folder")
images = base(prompt={told}, num_images_per_prompt=4, num_inference_steps=30).images"""

_CLASS = """import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

folder = Path("path/to/this/folder")
pipeline = DiffusionPipeline.from_pretrained(folder)  # its own call passes no class
unet, scheduler = pipeline.unet, pipeline.scheduler
row = json.loads((folder / "classes.json").read_text("utf-8")).index({told})
labels, size = torch.tensor([row] * 4), unet.config.sample_size
x = torch.randn(4, 3, size, size)
scheduler.set_timesteps(30)
for t in scheduler.timesteps:
    with torch.no_grad():
        x = scheduler.step(unet(x, t, class_labels=labels).sample, t, x).prev_sample
images = pipeline.numpy_to_pil((x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())"""

_PIXEL_LORA = """from domainstudio import models
from domainstudio.sampling import sample

denoiser = models.load("path/to/this/folder")  # needs the source model, at `base` of adapter.json
images = sample(denoiser, range(4){told})  # uint8, with shape (4, 3, height, width)"""


def model_card(record: Provenance, shots: ImageSet, kind: Kind = "unconditional") -> str:
    """Return an adapted model's card, in Markdown with the hub's header.

    Args:
        record: what decided the model.
        shots: the training images.
        kind: what the model is told.
    """
    params, inputs = record.params, record.inputs
    training, weights = params["training"], params["weights"]
    terms = ((k, v) for k, v in weights.items() if isinstance(v, float) and v > 0 and k not in _NO_TERMS)
    active = ", ".join(f"{k} {v:g}" for k, v in terms)
    lora = weights["lora"] is not None
    tags = ["domainstudio", "few-shot", "domain-adaptation"]
    tags += ([] if kind == "unconditional" else [kind]) + (["lora"] if lora else [])
    rows = "".join(f"| {name} | {value} |\n" for name, value in _own_rows(record, kind).items())
    return f"""---
library_name: diffusers
tags: [{", ".join(tags)}]
---

# {record.adaptation}

Source model `{params["source"]}`, adapted to the domain `{params["target"]}` from {len(shots)} images by
the method `{params["method"]}`.

| | |
|---|---|
{rows}| loss weights | {active} |
| pairwise reduction | {weights["pairwise_reduction"]} |
| steps, batch, learning rate | {record.steps}, {training["batch_size"]}, {training["learning_rate"]:g} |
| training images | {shots.origin}, SHA-256 `{inputs["shots"]}` |
| licence of the images | {shots.licence or "not stated"} |
| attribution | {shots.attribution or "not stated"} |
| source model | SHA-256 `{inputs["source"]}` |
| run key | `{record.key}` |

```python
{_snippet(kind, lora, _first_told(params["prompts"], shots))}
```
"""


def trigger(prompts: Mapping[str, Any]) -> str:
    """Return the words of the target prompt that its source prompt lacks: they call up the target domain.

    >>> trigger({"source": "a {label}", "target": "a {label} in [V] style"})
    'in [V] style'
    """
    known = prompts["source"].split()
    return " ".join(word for word in prompts["target"].split() if word not in known)


def _own_rows(record: Provenance, kind: Kind) -> dict[str, str]:
    """Return the rows that only some models have: what they are told, prior preservation, adapters."""
    prompts, prior, weights = (record.params[name] for name in ("prompts", "prior", "weights"))
    rows: dict[str, str] = {}
    if kind != "unconditional":
        noun = "prompt" if kind == "text-to-image" else "class"
        rows[f"{noun} of a training image"] = _pair(prompts)
        for label, pair in prompts["by_label"].items():
            rows[f"{noun} of an image of {_code(label)}"] = _pair(pair)
        if kind == "text-to-image" and (words := trigger(prompts)):
            rows["trigger"] = _code(words)
        if new := prompts["new_tokens"]:
            rows["new words"] = ", ".join(f"{_code(word)}, begun as {first}" for word, first in new.items())
    if weights["prior"] > 0:
        drawn = "drawn from the source model"
        origin = (
            drawn if prior["images"] == "generated" else "of the source domain, or all where it has fewer"
        )
        digest = f"; SHA-256 `{record.inputs['prior']}`" if "prior" in record.inputs else ""
        rows["prior preservation"] = f"weight {weights['prior']:g}, {prior['number']} images {origin}{digest}"
    if (lora := weights["lora"]) is not None:
        also = ", text encoder too" if lora["text_encoder"] else ""
        layers = ", ".join(_code(name) for name in lora["modules"])
        alpha = lora["alpha"] or lora["rank"]
        rows["adapters (LoRA)"] = f"rank {lora['rank']}, alpha {alpha:g}, of the layers {layers}{also}"
    return rows


def _pair(pair: Mapping[str, Any]) -> str:
    return f"{_code(pair['target'])}; for the source model {_code(pair['source'])}"


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")  # a bare | would end the table's cell


def _first_told(prompts: Mapping[str, Any], shots: ImageSet) -> str:
    """Return what the model is told of the first training image."""
    image = shots.records[0]
    template: str = prompts["by_label"].get(image.label, prompts)["target"]
    return template.format(caption=image.caption, label=image.label or "")


def _snippet(kind: Kind, lora: bool, told: str) -> str:
    text = json.dumps(told, ensure_ascii=False)
    if kind == "text-to-image":
        return (_TEXT_LORA if lora else _TEXT).format(told=text)
    if lora:
        return _PIXEL_LORA.format(told="" if kind == "unconditional" else f", [{text}] * 4")
    return _PLAIN if kind == "unconditional" else _CLASS.format(told=text)


def source_card(
    kind: str,
    params: Mapping[str, Any],
    images: ImageSet,
    history: Sequence[Mapping[str, float]],
    start: str = "from scratch",
) -> str:
    """Return a pretrained source model's card, in Markdown with the hub's header.

    Args:
        kind: what the model is, for example "unconditional pixel-space UNet".
        params: the section of params.yaml that it was trained by.
        images: the training images.
        history: the training log.
        start: what training began with.
    """
    unet, noise, training = params.get("unet", params.get("model")), params["noise"], params["training"]
    tail = [record["simple"] for record in history[-500:]]
    return f"""---
library_name: diffusers
tags: [domainstudio]
---

# Source model of the demo

{kind} of {images.resolution}x{images.resolution} pixels, trained {start} on
{len(images)} images of `{images.origin}`. Weights are stored in half precision.

| | |
|---|---|
| licence of the images | {images.licence or "not stated"} |
| attribution | {images.attribution or "not stated"} |
| image set | SHA-256 `{images.digest}` |
| channels, attention | {unet["block_out_channels"]}, {unet["attention"]} |
| noise | {noise["beta_schedule"]}, {noise["prediction_type"]} |
| zero terminal signal-to-noise | {noise["rescale_betas_zero_snr"]} |
| steps, batch | {training["steps"]}, {training["batch_size"]} |
| learning rate | {training["learning_rate"]:g}, {training["lr_schedule"]} |
| weight average, precision | {training["ema_decay"]}, {training["mixed_precision"]} |
| mean loss of the last 500 steps | {sum(tail) / len(tail):.4f} |
| training time | {history[-1]["seconds"] / 60:.0f} minutes |
"""
