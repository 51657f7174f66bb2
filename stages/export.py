"""Write an adaptation's model as it is drawn: `python -m stages.export <adaptation> <folder>`.

The folder is a plain diffusers pipeline: adapters are fused into it, and weights interpolated as the
adaptation's `combine` says. Two models that draw together are no plain pipeline; `--both` writes a folder of
both for DomainStudio.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stages.cli import run


def main() -> None:
    """Parse the command line and write the folder."""
    parser = argparse.ArgumentParser(prog="python -m stages.export", description=__doc__)
    parser.add_argument("adaptation", help="a key of adaptations in params.yaml")
    parser.add_argument("folder", type=Path, help="where to write; it must not be there yet")
    parser.add_argument("--half", action="store_true", help="store float16")
    parser.add_argument("--both", action="store_true", help="write both models where two draw together")
    arguments = parser.parse_args()

    from domainstudio import config
    from domainstudio.errors import CheckpointError, ConfigError
    from domainstudio.models.stored import StoredModel, Together
    from domainstudio.project import ADAPTED_MODELS
    from domainstudio.storage.files import output_folder

    adaptation = config.load().adaptation(arguments.adaptation)
    stored = StoredModel(ADAPTED_MODELS / adaptation.name, Together.of(adaptation))
    if not stored.folder.is_dir():
        raise CheckpointError(f"{stored.folder} is missing: run dvc repro finetune@{adaptation.name} first")
    if arguments.folder.exists():
        raise ConfigError(f"{arguments.folder} is there already: name another folder, or delete that one")
    write = stored.store if arguments.both else stored.export
    with output_folder(arguments.folder) as partial:
        write(partial, half=arguments.half)
    print(f"{arguments.folder}: {'a diffusers pipeline' if stored.is_plain else 'two models'}")


if __name__ == "__main__":
    run(main)
