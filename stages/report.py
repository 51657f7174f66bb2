"""Stage `report`: one HTML file with every adaptation side by side.

`python -m stages.report` reads the outputs of the stages below the current folder and writes report.html.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from domainstudio import config, git, report
from domainstudio.storage.files import write_text
from stages.cli import run


def main() -> None:
    """Parse the command line, read the outputs of the other stages, write the report."""
    parser = argparse.ArgumentParser(prog="python -m stages.report", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(), help="folder with data/, samples/, training/, …")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="the settings")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the file to write")
    arguments = parser.parse_args()
    settings = config.load(arguments.params)
    html = report.render(arguments.root, settings, git.state(arguments.root))
    write_text(arguments.output, html)
    print(f"{arguments.output}: {len(settings.adaptations)} adaptations, {len(html.encode()) / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
