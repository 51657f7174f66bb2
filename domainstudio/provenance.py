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
    from domainstudio.datasets import ImageSet

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


def model_card(record: Provenance, shots: ImageSet) -> str:
    """Return an adapted model's card, in Markdown with the hub's header."""
    params, inputs = record.params, record.inputs
    training, weights = params["training"], params["weights"]
    active = ", ".join(f"{k} {v:g}" for k, v in weights.items() if isinstance(v, float) and v > 0)
    return f"""---
library_name: diffusers
tags: [domainstudio, few-shot, domain-adaptation]
---

# {record.adaptation}

Source model `{params["source"]}`, adapted to the domain `{params["target"]}` from {len(shots)} images by
the method `{params["method"]}`.

| | |
|---|---|
| loss weights | {active} |
| pairwise reduction | {weights["pairwise_reduction"]} |
| steps, batch, learning rate | {record.steps}, {training["batch_size"]}, {training["learning_rate"]:g} |
| training images | {shots.origin}, SHA-256 `{inputs["shots"]}` |
| licence of the images | {shots.licence or "not stated"} |
| attribution | {shots.attribution or "not stated"} |
| source model | SHA-256 `{inputs["source"]}` |
| run key | `{record.key}` |

```python
from diffusers import DiffusionPipeline

images = DiffusionPipeline.from_pretrained("path/to/this/folder")(batch_size=4, num_inference_steps=30).images
```
"""


def source_card(params: Mapping[str, Any], images: ImageSet, history: Sequence[Mapping[str, float]]) -> str:
    """Return the pretrained source model's card, in Markdown with the hub's header."""
    unet, noise, training = params["unet"], params["noise"], params["training"]
    tail = [record["simple"] for record in history[-500:]]
    return f"""---
library_name: diffusers
tags: [domainstudio, unconditional-image-generation]
---

# Source model of the demo

An unconditional pixel-space UNet of {images.resolution}x{images.resolution} pixels, trained from scratch on
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
