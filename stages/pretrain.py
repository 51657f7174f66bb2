"""Train the demo's source models, which are in git: `python -m stages.pretrain pretrain_text`.

No stage of dvc.yaml: DVC would train them again, or warn at each run that they are frozen.
"""

from __future__ import annotations

import argparse

from stages.cli import run

FOLDERS = {
    "pretrain": "noto",
    "pretrain_class": "noto-class",
    "pretrain_flow": "noto-flow",
    "pretrain_latent": "avataaars",
    "pretrain_text": "noto-text",
}
"""Names of the models below models/sources, by their sections of params.yaml."""


def main() -> None:
    """Train the model of each section, or go on with it, and write it in half precision."""
    parser = argparse.ArgumentParser(prog="python -m stages.pretrain", description=__doc__.partition("\n")[0])
    parser.add_argument("sections", nargs="+", choices=FOLDERS, metavar="SECTION", help=", ".join(FOLDERS))
    sections = parser.parse_args().sections

    from domainstudio import config
    from domainstudio.demo import pretraining
    from domainstudio.project import SOURCE_MODELS
    from stages.origins import prepared

    settings = config.load()
    for section in sections:
        train = getattr(pretraining, section)
        train(settings, prepared(settings, getattr(settings, section)), SOURCE_MODELS / FOLDERS[section])


if __name__ == "__main__":
    run(main)
