"""Stage `chooser`: note what would choose among the states of a training, if one is to be chosen.

The stage `finetune` depends on this note, training/<adaptation>/chooser.json, instead of that code and those
settings. Without candidates they change no model, and the note says so: no training begins again because a
metric was edited.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from domainstudio import config
from domainstudio.project import TRAINING
from domainstudio.storage.files import sha256_of, write_json
from stages.cli import run


def main() -> None:
    """Write the note of one adaptation of params.yaml."""
    parser = argparse.ArgumentParser(prog="python -m stages.chooser", description=__doc__)
    parser.add_argument("adaptation", help="a key of adaptations in params.yaml")
    name = parser.parse_args().adaptation
    settings = config.load()
    adaptation = settings.adaptation(name)
    note: dict[str, Any] = {"chooses": False}
    if adaptation.training.candidate_every:
        note = {
            "chooses": True,
            "choose": settings.choose.model_dump(mode="json"),
            "features": settings.evaluate.features,
            "code": {path.as_posix(): sha256_of(path) for path in _code()},
        }
    write_json(TRAINING / name / "chooser.json", note)


def _code() -> Iterator[Path]:
    """Yield the files that this stage depends on in dvc.yaml: those that choose."""
    stages = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"]
    for path in map(Path, stages["chooser"]["do"]["deps"]):
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]


if __name__ == "__main__":
    run(main)
