"""A small project of its own: random images, a tiny source model, settings that take seconds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from tests import warm

ROOT = Path(__file__).parents[1]
ADAPTATION = {"source": "noto", "target": "ink"}
COPIED = ("domainstudio", "stages", "demo", "dvc.yaml", ".dvcignore")


def make_project(root: Path, more: Sequence[str] = ()) -> Path:
    """Write a project with its own twelve images, tiny source models and git history; return its folder."""
    from tests.models import tiny_class_denoiser, tiny_denoiser, tiny_latent_denoiser, tiny_text_denoiser

    root.mkdir(parents=True, exist_ok=True)
    for name in (*COPIED, *more):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, root / name)
    write_images(root / "images", 12)
    (root / "subjects.txt").write_text("a house\n")
    tiny_denoiser().save(root / "models/sources/noto", half=True)
    tiny_latent_denoiser().save(root / "models/sources/avataaars", half=True)
    tiny_class_denoiser().save(root / "models/sources/noto-class", half=True)
    tiny_text_denoiser().save(root / "models/sources/noto-text", half=True)
    (root / "params.yaml").write_text(yaml.safe_dump(params()))
    (root / ".gitignore").write_text("__pycache__/\n.cache/\n.checkpoints/\nmlflow.db\nmlartifacts/\n")
    start_repository(root)
    return root


def start_repository(root):
    """Keep all files of a folder in a repository of git and DVC."""
    for command in (
        "git init -q",
        "git config user.name tester",
        "git config user.email tester@localhost",
        "dvc init -q",
        "dvc config core.analytics false",
        "git add .",
        "git commit -q -m start",
    ):
        run(root, *command.split())


def params():
    """Return the project's own settings for small models, in float32: not every processor has bfloat16."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["prepare"]["resolution"] = 8
    values["prepare"]["min_size"] = 8
    for section in ("pretrain", "pretrain_latent", "pretrain_class", "pretrain_text", "pretrain_flow"):
        values[section] |= {"images": "images", "number": None, "resolution": 8}
        del values[section]["training"]["mixed_precision"]
    values["sources"] = {"noto": {"subjects": "subjects.txt"}}
    values["source_images"] = {"noto": {"images": "images"}}
    values["targets"] = {"ink": {"shots": "images", "number": 5, "seed": 0, "domain": "images"}}
    for section in ("finetune", "sample"):
        del values[section]["mixed_precision"]
    values["finetune"] |= {"steps": 6, "batch_size": 4, "checkpoint_every": 2, "preview_every": 3}
    values["finetune"]["candidate_every"] = 0
    values["choose"] |= {"number": 8, "steps": 2}
    values["sample"] |= {"number": 6, "steps": 2, "batch_size": 3}
    values["evaluate"] |= {"neighbours": 2, "resamples": 4}
    values["registry"]["gate"] |= {"min_in_domain_share": 0.0, "min_samples": 1}
    values["sweeps"] = {}
    methods = ("finetune", "domainstudio")
    values["adaptations"] = {f"ink-{each}": ADAPTATION | {"method": each} for each in methods}
    values["registry"]["models"] = {name: f"domainstudio-{name}" for name in values["adaptations"]}
    return values


def changed_params(folder, change):
    """Write the project's params.yaml into a folder, changed; return its path."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    change(values)
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def write_images(folder, number):
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(number):
        pixels = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")


def environment(warmed: bool = True):
    """Return the environment of a subprocess, whose `python` and `dvc` are those of `tests.warm`."""
    folders = [warm.folder()] if warmed else []
    path = os.pathsep.join(map(str, [*folders, Path(sys.executable).parent, os.environ["PATH"]]))
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def run(root, *command, check=True):
    result = subprocess.run(
        command,
        cwd=root,
        env=environment(warmed=command[0] in ("python", "dvc")),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert not check or result.returncode == 0, result.stdout[-4000:]
    return result.stdout
