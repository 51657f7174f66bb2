"""Run the pipeline as a Prefect flow: `python -m flows.adapt [adaptation ...]`."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from domainstudio import telemetry
from domainstudio.errors import DomainStudioError

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

SETTINGS = {
    **telemetry.OFF,
    # A busy laptop needs more than the default 20 s to start the temporary server for the first time.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the flow as the command line says; the exit status is 0 only if every stage is up to date."""
    options = _parser().parse_args(arguments)
    if options.cron and not options.serve:
        _parser().error("--cron needs --serve")
    return run_command(lambda: _serve(options) if options.serve else _run(options), "every stage was ended")


def run_command(action: Callable[[], int], ended: str) -> int:
    """Do what a command line asks for, and return the exit status.

    Args:
        action: calls a flow.
        ended: what is told after Ctrl-C.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        return action()
    except DomainStudioError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: {ended}", file=sys.stderr)
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flows.adapt", description=__doc__)
    parser.add_argument("adaptations", nargs="*", metavar="adaptation", help="default: the whole pipeline")
    parser.add_argument("--force", action="store_true", help="run stages even if nothing changed")
    parser.add_argument("--pull", action="store_true", help="take from the DVC remote what was made before")
    parser.add_argument(
        "--gpus", type=_positive, metavar="N", help="GPU slots (default: the machine's GPUs, or 1)"
    )
    parser.add_argument(
        "--retries", type=int, default=1, metavar="N", help="attempts after a failure (default: 1)"
    )
    parser.add_argument("--retry-delay", type=float, default=10.0, metavar="S", help="seconds before each")
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

    # A misspelt name is told at once, not after a server has started.
    graph.select(graph.read(), options.adaptations)

    start_server()

    from flows.run.pipeline import adapt

    return tell(adapt(**_parameters(options), return_state=True))


def start_server() -> None:
    """Start the temporary server if no other is set."""
    from prefect.client.orchestration import get_client
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()  # Prefect may have been imported before SETTINGS were set
    with _interrupts_blocked():
        # Ctrl-C goes to the whole foreground group: blocked here, it does not reach the server, which must
        # live until the run has told it how it ended.
        get_client(sync_client=True)


def tell(state: State[Any]) -> int:
    """Print how a flow run ended, and return the exit status."""
    print(state.message or state.name, file=sys.stdout if state.is_completed() else sys.stderr)
    return 0 if state.is_completed() else 1


def _parameters(options: argparse.Namespace) -> dict[str, Any]:
    names = ("adaptations", "force", "pull", "gpus", "retries", "retry_delay")
    return {name: getattr(options, name) for name in names}


def _serve(options: argparse.Namespace) -> int:
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        raise DomainStudioError(
            "--serve needs a Prefect server that stays: start `prefect server start`, and set "
            "PREFECT_API_URL=http://127.0.0.1:4200/api"
        )
    from flows.run.pipeline import adapt

    # limit: two runs in one clone would wait for each other's locks.
    adapt.serve(name="adapt", cron=options.cron, parameters=_parameters(options), limit=1)
    return 0


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _exit_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    # Prefect hands SIGTERM on to this handler after the flow was ended. The default one would end the process
    # without `atexit`, and leave the temporary server running.
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
