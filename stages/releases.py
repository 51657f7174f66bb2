"""Stage `releases`: see whether the tracking server has what is released; `register` adds what it lacks.

DVC cannot know that MLFLOW_TRACKING_URI names another server, or that its database is new. So this stage runs
at each `dvc repro`; it takes a moment. It writes registry/models.json, which every `register` reads.
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
    """Compare what was registered with the server, and say what it lacks."""
    argparse.ArgumentParser(prog="python -m stages.releases", description=__doc__).parse_args()
    settings = config.load()
    write_json(REGISTRY / "models.json", {"format": 1, "models": settings.registry.models})
    try:
        lacking = releases.withdraw_lacking(settings)
    except TrackingUnavailableError as error:  # which must not stop what needs no server
        print(f"{error}. Whether it has the released models is not known")
        return
    if lacking:
        print(f"MLflow at {shown_uri()} lacks {', '.join(lacking)}: to be registered")


if __name__ == "__main__":
    run(main)
