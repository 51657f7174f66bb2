"""A team's servers on this machine: `python -m services start | status | stop | env`."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from domainstudio.errors import DomainStudioError
from services import credentials
from services.layout import DATABASES, FIRST_PORT, FOLDER
from services.team import TIMEOUT_SECONDS, Team

_FOREIGN = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3")
"""Variables that would lead boto3 elsewhere."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; the exit status of `status` is 0 only if every service answers."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.call(options))
    except DomainStudioError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: started services keep running, until `stop`", file=sys.stderr)
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m services", description=__doc__)
    place = os.environ.get("DOMAINSTUDIO_SERVICES_FOLDER", FOLDER)
    parser.add_argument("--folder", default=place, help=f"data, logs, secrets (default: {FOLDER})")
    commands = parser.add_subparsers(required=True)

    def command(call: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(call.__name__.strip("_"), help=help)
        added.set_defaults(call=call)
        return added

    start = command(_start, "start the services, and wait until each answers")
    start.add_argument("names", nargs="*", metavar="service", help="default: all")
    ports = os.environ.get("DOMAINSTUDIO_SERVICES_PORTS")
    start.add_argument(
        "--ports", type=int, default=ports, metavar="N", help=f"first of 8 ports (default: {FIRST_PORT})"
    )
    start.add_argument("--database", choices=DATABASES, help="default: postgres")
    start.add_argument("--timeout", type=float, default=TIMEOUT_SECONDS, metavar="S", help="seconds")
    stop = command(_stop, "stop the services; their data stays")
    stop.add_argument("names", nargs="*", metavar="service", help="default: all")
    command(_status, "print a table of the services")
    command(_env, 'for a shell: eval "$(python -m services env)"; prints secrets')
    secrets = command(_secrets, "write a file with new passwords for deploy/compose.yaml")
    secrets.add_argument("file", type=Path)
    run = command(_run, "become one service (for supervisord)")
    run.add_argument("name")
    return parser


def _start(options: argparse.Namespace) -> int:
    team = Team(options.folder, first_port=options.ports, database=options.database)
    team.start(*options.names, timeout=options.timeout, log=lambda line: print(line, flush=True))
    _status(options)
    return 0


def _stop(options: argparse.Namespace) -> int:
    Team(options.folder).stop(*options.names)
    print(f"stopped {' '.join(options.names) or 'all services'}; data stays in {options.folder}")
    return 0


def _status(options: argparse.Namespace) -> int:
    team = Team(options.folder)
    states = team.states()
    rows = [
        (each.name, each.state, team.layout.address(each.name), _short(team.layout.log(each.name)))
        for each in states
    ]
    print(_table([("service", "state", "address", "log"), *rows]))
    if ready := all(each.state == "ready" for each in states):
        print(f"Passwords: {_short(team.layout.secrets)}. For a shell: {_evaluate(options)}")
    return 0 if ready else 1


def _env(options: argparse.Namespace) -> int:
    print(f"unset {' '.join(_FOREIGN)}")
    for name, value in Team(options.folder).environment.items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


def _secrets(options: argparse.Namespace) -> int:
    credentials.ensure(options.file)
    print(f"{options.file} holds all passwords and keys; only you can read it")
    return 0


def _run(options: argparse.Namespace) -> int:
    Team(options.folder).run(options.name)


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _evaluate(options: argparse.Namespace) -> str:
    folder = "" if options.folder == FOLDER else f"--folder {shlex.quote(options.folder)} "
    return f'eval "$(python -m services {folder}env)"'


if __name__ == "__main__":
    sys.exit(main())
