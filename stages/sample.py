"""Stage `sample`: draw images from a source or an adapted model, the same noise for every model."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from stages.cli import run


def main() -> None:
    """Draw the samples of one model, going on where an interrupted call stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["source", "adapted"])
    parser.add_argument("name", help="a key of sources or of adaptations in params.yaml")
    arguments = parser.parse_args()

    from domainstudio import checkpoint, config, models
    from domainstudio.sampling import default_device, sample_to_folder

    settings = config.load().sample
    place = Path("sources" if arguments.kind == "source" else "adapted") / arguments.name
    model_folder = Path("models") / place
    digest = models.digest(model_folder)
    key = checkpoint.run_key(settings.model_dump(mode="json"), {"model": digest})
    partial = Path(".checkpoints") / f"samples-{key}"
    denoiser = models.load(model_folder).to(default_device())
    sample_to_folder(denoiser, partial, settings, model=model_folder.as_posix(), model_digest=digest)
    final = Path("samples") / place
    shutil.rmtree(final, ignore_errors=True)
    final.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(partial, final)


if __name__ == "__main__":
    run(main)
