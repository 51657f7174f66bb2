"""Adapters that another program has trained: LoRA files of text-to-image models, as candidates.

Diffusers reads its own format, peft's and kohya's, which OneTrainer, SimpleTuner and ai-toolkit write too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from domainstudio.errors import CheckpointError
from domainstudio.models.text_to_image import TextToImageDenoiser
from domainstudio.selection.chooser import Candidate
from domainstudio.storage.checkpoint import run_key
from domainstudio.storage.files import sha256_of
from domainstudio.storage.weights import quiet

if TYPE_CHECKING:
    from domainstudio.models.denoiser import Denoiser

NAME = "chosen"  # diffusers' name of the one adapter


@dataclass(frozen=True)
class AdapterFile:
    """A LoRA file of a training.

    Attributes:
        path: The file.
        name: What to call it: its name, or that of its folder where files share one name.
        step: The number in its name: of steps or epochs, as the trainer counts.
    """

    path: Path
    name: str
    step: int


def list_adapters(folder: Path) -> list[AdapterFile]:
    """Return the LoRA files in a folder and its subfolders, in the order of training.

    The step is the first number after what all names begin with: 10 of `ink-000010`, 500 of
    `checkpoint-500/pytorch_lora_weights`. One file may have none, as kohya's last one: it comes last, as far
    from the others as they are from each other.

    Raises:
        CheckpointError: there is no such file, or names do not tell the order.
    """
    paths = sorted(folder.rglob("*.safetensors"))
    if not paths:
        raise CheckpointError(
            f"{folder} has no .safetensors file: name the folder of a training's LoRA files"
        )
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in paths]
    steps = _steps(names)
    unnumbered = [name for name, step in zip(names, steps, strict=True) if step is None]
    repeated = [step for step, number in Counter(steps).items() if number > 1 and step is not None]
    if len(unnumbered) > 1 or repeated:
        same = [name for name, step in zip(names, steps, strict=True) if step in repeated]
        raise CheckpointError(
            f"{folder}: the names {(same or unnumbered)[:2]} do not tell which is the later one: keep the "
            "files of one training there, with the step in each name"
        )
    known = sorted(step for step in steps if step is not None)
    last = known[-1] + (known[-1] - known[-2] if len(known) > 1 else 1) if known else 1
    found = [
        AdapterFile(path, _short(name), last if step is None else step)
        for path, name, step in zip(paths, names, steps, strict=True)
    ]
    return sorted(found, key=lambda file: file.step)


def usable(
    denoiser: Denoiser, files: Sequence[AdapterFile], source: str
) -> tuple[list[Candidate], Mapping[str, str]]:
    """Return the files as candidates, and the reason for each one that cannot be used.

    Each is loaded once before anything is drawn: damaged ones, and those of other models, are left out.

    Args:
        denoiser: Their source model. It is changed in place by whichever candidate was loaded last.
        files: The files.
        source: Hash of the source model.

    Raises:
        CheckpointError: the source model is of another kind, or no file can be used.
    """
    if (
        not isinstance(denoiser, TextToImageDenoiser)
        or not hasattr(denoiser.pipeline, "load_lora_weights")
        or denoiser.adapters is not None
    ):
        raise CheckpointError(
            f"{denoiser.name_or_path} is {denoiser.kind}: LoRA files of other trainers belong to pipelines "
            "such as Stable Diffusion's. For a training of DomainStudio set finetune.candidate_every"
        )
    candidates, left_out = [], {}
    for file in files:
        loaded = _Loaded(denoiser, file)
        try:
            loaded()
        except CheckpointError as error:
            left_out[file.name] = str(error)
            continue
        digest = run_key({"source": source}, {"adapters": sha256_of(file.path)})
        candidates.append(Candidate(file.step, file.name, digest, loaded))
    if not candidates:
        raise CheckpointError("no file can be used:\n  " + "\n  ".join(left_out.values()))
    return candidates, left_out


def without(denoiser: Denoiser) -> Denoiser:
    """Take a candidate's adapters off the model again, in place."""
    assert isinstance(denoiser, TextToImageDenoiser)
    denoiser.pipeline.unload_lora_weights()
    return denoiser


@dataclass(frozen=True)
class _Loaded:
    """Gives a model the adapters of a file, in place of those that it has."""

    denoiser: TextToImageDenoiser
    file: AdapterFile

    def __call__(self) -> Denoiser:
        pipeline, path = without(self.denoiser).pipeline, self.file.path  # type: ignore[attr-defined]
        try:
            with quiet("diffusers"):  # it warns of each file that leaves the text encoder as it is
                pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=NAME)
        except Exception as error:  # diffusers and peft raise whatever the keys and shapes lead to
            without(self.denoiser)
            raise CheckpointError(_unusable(path, _first_line(error))) from error
        if not any(pipeline.get_list_adapters().values()):
            raise CheckpointError(_unusable(path, "it changes no layer of it"))
        return self.denoiser


def _steps(names: Sequence[str]) -> list[int | None]:
    """Return the first number of each name after what all names begin with."""
    begin = _common(names) if len(names) > 1 else ""
    if any(name[len(begin) : len(begin) + 1].isdigit() for name in names):
        begin = begin.rstrip("0123456789")
    found = [re.search(r"\d+", name[len(begin) :]) for name in names]
    return [int(match[0]) if match else None for match in found]


def _common(names: Sequence[str]) -> str:
    """Return the characters that all names begin with."""
    columns = zip(*names, strict=False)
    return "".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))


def _short(name: str) -> str:
    """Return a name without the file name that diffusers gives to all, as one word."""
    return name.removesuffix("/pytorch_lora_weights").replace("/", "-")


def _unusable(path: Path, why: str) -> str:
    return f"{path} is no LoRA file of the source model: {why}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
