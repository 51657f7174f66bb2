"""Stage `pretrain_latent`: train the demo's source model of latents. Frozen in dvc.yaml."""

from __future__ import annotations

from pathlib import Path

from stages.cli import run
from stages.origins import prepared

FOLDER = Path("models/sources/avataaars")


def main() -> None:
    """Train the model of params.yaml, or go on with it, and write it in half precision."""
    from domainstudio import config
    from domainstudio.demo import pretraining

    settings = config.load()
    pretraining.pretrain_latent(settings, prepared(settings, settings.pretrain_latent), FOLDER)


if __name__ == "__main__":
    run(main)
