"""Stages `report` and `adaptation_report`: one HTML file with every adaptation side by side, or with one.

`python -m stages.report` reads the outputs of the stages below the current folder and writes report.html.
`python -m stages.report <adaptation>` writes reports/<adaptation>.html.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from domainstudio import config, git, report
from domainstudio.project import REPORT, REPORTS
from domainstudio.storage.files import write_text
from stages.cli import run


def main() -> None:
    """Parse the command line, read the outputs of the other stages, write the report."""
    parser = argparse.ArgumentParser(prog="python -m stages.report", description=__doc__)
    parser.add_argument("adaptation", nargs="?", help="a key of adaptations in params.yaml; default: all")
    parser.add_argument("--root", type=Path, default=Path(), help="folder with data/, samples/, training/, …")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="the settings")
    parser.add_argument("--output", type=Path, help="the file to write")
    arguments = parser.parse_args()
    settings = config.load(arguments.params)
    name = arguments.adaptation
    names = list(settings.adaptations) if name is None else [name]
    html = report.render(arguments.root, settings, git.state(arguments.root), names)
    output = arguments.output or (REPORT if name is None else REPORTS / f"{name}.html")
    write_text(output, html)
    print(f"{output}: {', '.join(names)}; {len(html.encode()) / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
