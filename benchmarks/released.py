"""What a step costs here, in diffusers' DreamBooth script and in the released algorithm, on one model.

    python -m benchmarks.released --params params.yaml benchmarks/ink.yaml benchmarks/text.yaml \
        --baseline text-dreambooth --adaptations text-domainstudio --rounds 10

Steps are taken in turn in one process, so a noisy machine slows all of them alike. Then images are drawn in
turn, here and by diffusers' pipeline: in float32, and in bfloat16 where the device computes it. What the same
steps cost at real size says `benchmarks.plan`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from benchmarks import cli
from benchmarks.loops import DiffusersLoop, ReleasedLoop
from benchmarks.step_cost import Step, measure, print_table, summarize, trainer
from domainstudio import config, models
from domainstudio.distributed import this_process
from domainstudio.errors import ConfigError
from domainstudio.precision import DTYPES, usable_precision
from domainstudio.project import SOURCE_MODELS
from domainstudio.sampling import sample
from domainstudio.training.examples import texts_of
from domainstudio.training.recipe import Recipe
from stages.cli import run

if TYPE_CHECKING:
    from domainstudio.config import Settings

SAMPLING_STEPS, GUIDANCE = 10, 2.0


def main() -> None:
    """Measure steps and drawing, and print a table of each."""
    parser = cli.settings_parser("released", __doc__)
    parser.add_argument("--baseline", required=True, help="an adaptation with a prior: DreamBooth")
    parser.add_argument("--adaptations", nargs="+", required=True, help="others of the same model and batch")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    settings, results = config.load(*options.params), {}
    with tempfile.TemporaryDirectory() as folder:
        made = steps(settings, options.baseline, options.adaptations, Path(folder))
        results["step"] = summarize(measure(made, options.rounds))
    print_table("step", results["step"])
    device = this_process().device
    for precision in dict.fromkeys(usable_precision(each, device) for each in ("no", "bf16")):
        name = "float32" if precision == "no" else precision
        drawn = summarize(measure(drawing(settings, options.baseline, precision), options.rounds))
        results[f"draw, {name}"] = drawn
        print_table(f"batch of images, {name}", drawn)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def steps(settings: Settings, baseline: str, adaptations: list[str], folder: Path) -> dict[str, Step]:
    """Return what takes steps: our trainers, diffusers' loop and the released one, the baseline first."""
    ours = {name: trainer(settings, name, folder / name) for name in (baseline, *adaptations)}
    return {
        **ours,
        "diffusers": _loop(settings, baseline, None),
        "released": _loop(settings, baseline, folder),
    }


def _loop(settings: Settings, name: str, folder: Path | None) -> Step:
    """Return a loop over a batch of an adaptation's images and its prior's; the released one has a folder."""
    adaptation = settings.adaptation(name)
    recipe = Recipe.load(adaptation, settings.sample, this_process())
    if recipe.prior is None or recipe.prior.texts is None:
        raise ConfigError(f"adaptations.{name} is not one of a text model with prior preservation")
    number, target = (
        adaptation.training.batch_size,
        texts_of(recipe.denoiser, adaptation, "target", recipe.shots),
    )
    pixels = torch.from_numpy(recipe.shots.images[:number])
    pixels = torch.cat([pixels, torch.from_numpy(recipe.prior.images[: len(pixels)])])
    prompts = [*(target or ())[:number], *recipe.prior.texts[:number]]
    images = (pixels.float() / 127.5 - 1).to(this_process().device)
    with torch.no_grad():
        condition = recipe.denoiser.condition(prompts)
    common, rate = (recipe.denoiser, images, condition), adaptation.training.learning_rate
    if folder is None:
        return DiffusersLoop(*common, prompts=prompts, learning_rate=rate)
    files = [folder / f"{index}.png" for index in range(len(pixels))]
    for path, each in zip(files, pixels.numpy().transpose(0, 2, 3, 1), strict=True):
        Image.fromarray(each).save(path)
    return ReleasedLoop(*common, files=files, learning_rate=rate)


@dataclass
class Drawing:
    """Draws a batch of images, in place of a training step."""

    draw: Callable[[], Any]

    def take_step(self) -> object:
        """Draw."""
        return self.draw()


def drawing(settings: Settings, name: str, precision: str) -> dict[str, Step]:
    """Return what draws the same batch from an adaptation's source model: diffusers' pipeline, and we.

    Args:
        settings: of the adaptation.
        name: the adaptation.
        precision: `no`, or `bf16`: then both read their weights in that type too.
    """
    adaptation, device = settings.adaptation(name), this_process().device
    folder, dtype = SOURCE_MODELS / adaptation.source, DTYPES[precision]
    prompts = ["a house"] * adaptation.training.batch_size
    denoiser = models.load(folder, dtype).to(device)
    pipeline = DiffusionPipeline.from_pretrained(
        folder, torch_dtype=dtype or torch.float32, use_safetensors=True
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    options = {"guidance_scale": GUIDANCE, "num_inference_steps": SAMPLING_STEPS, "output_type": "np"}
    seeds = list(range(len(prompts)))
    return {
        "diffusers": Drawing(lambda: pipeline(prompts, **options)),
        "ours": Drawing(
            lambda: sample(
                denoiser,
                seeds,
                prompts,
                guidance_scale=GUIDANCE,
                steps=SAMPLING_STEPS,
                mixed_precision=precision,
            )
        ),
    }


if __name__ == "__main__":
    run(main)
