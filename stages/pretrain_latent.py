"""Stage `pretrain_latent`: train the demo's source model of latents. Frozen in dvc.yaml."""

from __future__ import annotations

from pathlib import Path

from stages.cli import run
from stages.origins import prepared

FOLDER = Path("models/sources/avataaars")


def main() -> None:
    """Train VAE and model of params.yaml, or go on with them, and write them in half precision."""
    from domainstudio import config
    from domainstudio.demo import pretraining

    settings = config.load()
    section = settings.pretrain_latent
    styles = section.model_copy(update={"images": section.vae_images})
    pretraining.pretrain_latent(settings, prepared(settings, section), prepared(settings, styles), FOLDER)


if __name__ == "__main__":
    run(main)
