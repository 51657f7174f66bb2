"""The options that the benchmarks' commands share."""

from __future__ import annotations

import argparse


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a module's command; `description` is the module's docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def settings_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Return such a parser with the option `--params`."""
    made = parser(module, description)
    made.add_argument("--params", nargs="+", default=["params.yaml"], help="settings; later files win")
    return made
