"""Stage `release`: see whether the tracking server has what is released; `register` adds what it lacks.

DVC cannot know that MLFLOW_TRACKING_URI names another server, or that its database is new. So this stage runs
at each `dvc repro`; it takes a moment. `python -m stages.release <adaptation>` writes
registry/models/<adaptation>.json, which the adaptation's `register` reads.
"""

from __future__ import annotations

import argparse

from domainstudio import config
from domainstudio.project import REGISTRY
from domainstudio.registry import releases
from domainstudio.storage.files import write_json
from domainstudio.tracking.server import TrackingUnavailableError, shown_uri
from stages.cli import run


def main() -> None:
    """Compare what was registered with the server, and say if it lacks that."""
    parser = argparse.ArgumentParser(prog="python -m stages.release", description=__doc__)
    parser.add_argument("adaptation", help="a key of adaptations in params.yaml")
    name = parser.parse_args().adaptation
    settings = config.load()
    model = settings.registry.models.get(settings.adaptation(name).name)
    write_json(REGISTRY / "models" / f"{name}.json", {"format": 1, "model": model})
    try:
        if releases.withdraw_lacking(name, settings):
            print(f"MLflow at {shown_uri()} lacks {name}: to be registered")
    except TrackingUnavailableError as error:  # which must not stop what needs no server
        print(f"{error}. Whether it has {name} is not known")


if __name__ == "__main__":
    run(main)
