"""Choose among the LoRA files of another trainer: `python -m stages.choose`.

    python -m stages.choose --adapters output/ink --shots images --source models/sources/sd15 --out chosen \
        --prompt "a dog in ink style" --prompt "a house in ink style"

Reads a folder of LoRA files (kohya, diffusers, peft, OneTrainer, SimpleTuner, ai-toolkit) and the images they
were trained on. Writes the file to take, selection.json and report.html. docs/choose.md explains the rule.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from stages.cli import run

if TYPE_CHECKING:
    from domainstudio.config import ChooseSettings, SampleSettings
    from domainstudio.data import ImageSet


def main() -> None:
    """Parse the command line, measure the files, copy the chosen one and write the report."""
    arguments = _arguments()
    from domainstudio import models
    from domainstudio.report import selection as pages
    from domainstudio.sampling.generate import default_device
    from domainstudio.selection import adapters
    from domainstudio.selection.chooser import SOURCE, Candidate, Chooser
    from domainstudio.storage.files import write_text

    files = adapters.list_adapters(arguments.adapters)
    denoiser = models.load(arguments.source).to(default_device())
    shots = _shots(arguments.shots, denoiser.resolution[0])
    prompts = _prompts(arguments.prompt, shots)
    digest = models.digest(models.local_folder(arguments.source))
    candidates, left_out = adapters.usable(denoiser, files, digest)
    for reason in left_out.values():
        print(f"left out: {reason}", file=sys.stderr)

    rule, sampling = _rule(arguments), _sampling(arguments)
    samples = arguments.out / "samples"
    chooser = Chooser(shots.images, rule, sampling, arguments.features, samples, True, samples / "features")
    source = Candidate(0, SOURCE, digest, lambda: adapters.without(denoiser))
    drawn_source = chooser.draw(source, arguments.source_prompt or prompts)
    drawn = [(candidate, chooser.draw(candidate, prompts)) for candidate in candidates]
    found = chooser.choose(drawn_source, drawn).model_copy(update={"left_out": left_out})
    found.write(
        arguments.out, drawn_source, {candidate.name: folder for candidate, folder in drawn}, shots.images
    )
    chosen = next(file.path for file in files if file.step == found.chosen)
    shutil.copyfile(chosen, arguments.out / f"{found.best.name}.safetensors")
    write_text(
        arguments.out / "report.html", pages.page(arguments.out, f"{arguments.adapters.name}: when to stop")
    )
    print(f"{arguments.out / found.best.name}.safetensors: {found.summary}")
    if found.warning:
        print(f"warning: {found.warning}", file=sys.stderr)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m stages.choose",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--adapters", type=Path, required=True, help="folder of the training's LoRA files")
    parser.add_argument("--shots", required=True, help="the training images: a folder, or s3://bucket/prefix")
    parser.add_argument("--source", required=True, help="the pipeline they change: a folder or a hub id")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write; a second call goes on there"
    )
    parser.add_argument("--prompt", action="append", default=[], help="to draw with; by default the captions")
    parser.add_argument("--source-prompt", action="append", default=[], help="the same for the source model")
    parser.add_argument("--number", type=int, default=64, help="samples of each file")
    parser.add_argument("--steps", type=int, default=12, help="denoising steps of each sample")
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--max-copies", type=float, default=0.1, help="largest share of copies")
    parser.add_argument("--gain-per-loss", type=float, default=1.0, help="fidelity that diversity must buy")
    parser.add_argument("--features", default="efficientnet-lite0", help="the network that measures")
    return parser.parse_args()


def _rule(arguments: argparse.Namespace) -> ChooseSettings:
    from domainstudio.config import ChooseSettings
    from domainstudio.config.base import validated

    names = ("number", "steps", "max_copies", "gain_per_loss")
    return validated(ChooseSettings, {name: getattr(arguments, name) for name in names}, "the command line")


def _sampling(arguments: argparse.Namespace) -> SampleSettings:
    from domainstudio.config import SampleSettings
    from domainstudio.config.base import validated

    names = ("number", "guidance_scale", "batch_size", "mixed_precision")
    values = {name: getattr(arguments, name) for name in names} | {"scheduler": "dpm-solver++"}
    return validated(SampleSettings, values, "the command line")


def _shots(origin: str, resolution: int) -> ImageSet:
    from domainstudio.config import PrepareSettings
    from domainstudio.data.packing import prepare
    from stages.origins import LISTERS

    return prepare(origin, PrepareSettings(resolution=resolution), LISTERS)


def _prompts(given: list[str], shots: ImageSet) -> list[str]:
    from domainstudio.errors import ConfigError

    prompts = given or [record.caption for record in shots.records if record.caption]
    if not prompts:
        raise ConfigError(
            f"{shots.origin} has no captions to draw with: give --prompt, once for each prompt, with the "
            "words that the training used"
        )
    return prompts


if __name__ == "__main__":
    run(main)
