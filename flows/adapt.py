"""Run the pipeline as a Prefect flow: `python -m flows.adapt [adaptation ...]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from domainstudio.errors import ConfigError
from flows import cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the flow as the command line says; the exit status is 0 only if every stage is up to date."""
    options = _parser().parse_args(arguments)
    if options.cron and not options.serve:
        _parser().error("--cron needs --serve")
    return cli.run(lambda: _serve(options) if options.serve else _run(options), "every stage was ended")


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("flows.adapt", __doc__)
    parser.add_argument("adaptations", nargs="*", metavar="adaptation", help="default: the whole pipeline")
    parser.add_argument("--force", action="store_true", help="run stages even if nothing changed")
    parser.add_argument("--pull", action="store_true", help="take from the DVC remote what was made before")
    parser.add_argument(
        "--gpus", type=_positive, metavar="N", help="GPU slots (default: the machine's GPUs, or 1)"
    )
    parser.add_argument(
        "--retries", type=int, default=1, metavar="N", help="attempts after a failure (default: 1)"
    )
    parser.add_argument(
        "--retry-delay",
        type=float,
        default=10.0,
        metavar="S",
        help="seconds before a further attempt (default: 10)",
    )
    parser.add_argument(
        "--serve", action="store_true", help="stay, and run when the Prefect server asks for it"
    )
    parser.add_argument("--cron", metavar="'0 3 * * *'", help="with --serve: also at these times")
    return parser


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _run(options: argparse.Namespace) -> int:
    from flows.run import graph

    known = graph.read()
    stages = graph.select(known, options.adaptations)  # a misspelt name is an error before a server starts
    if not options.force and not cli.may_have_server() and graph.unchanged(known, stages).issuperset(stages):
        # Prefect's imports and its temporary server take many times as long as this look.
        print(f"{len(stages)} cached: nothing to run, so Prefect was not started")
        return 0
    cli.start_server()

    from flows.run.pipeline import adapt

    return cli.show_end(adapt(**_parameters(options), return_state=True))


def _serve(options: argparse.Namespace) -> int:
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        raise ConfigError(
            "--serve needs a Prefect server that stays: start `prefect server start`, and set "
            "PREFECT_API_URL=http://127.0.0.1:4200/api"
        )
    from flows.run.pipeline import adapt

    # limit: two runs in one clone would wait for each other's locks.
    adapt.serve(name="adapt", cron=options.cron, parameters=_parameters(options), limit=1)
    return 0


def _parameters(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name not in ("serve", "cron")}


if __name__ == "__main__":
    sys.exit(main())
