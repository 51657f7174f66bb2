"""Train the demo's flow-matching source model. No stage of dvc.yaml: its result is not in git."""

from __future__ import annotations

from pathlib import Path

from stages.cli import run
from stages.origins import prepared

FOLDER = Path("models/sources/noto-flow")


def main() -> None:
    """Train the model of params.yaml, or go on with it, and write it in half precision."""
    from domainstudio import config
    from domainstudio.demo import pretraining

    settings = config.load()
    pretraining.pretrain_flow(settings, prepared(settings, settings.pretrain_flow), FOLDER)


if __name__ == "__main__":
    run(main)
