"""What the command lines of flows share: parsers, a Prefect server, exit statuses."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from domainstudio import telemetry
from domainstudio.errors import USER_ERROR_STATUS, DomainStudioError
from domainstudio.redaction import redact

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

SETTINGS = {
    **telemetry.OFF,
    # A busy laptop needs more than the default 20 s to start the temporary server for the first time.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
}


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser for `python -m <module>`; the description keeps its lines."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=formatter
    )


def run(action: Callable[[], int], interrupted: str) -> int:
    """Do what a command line asks for.

    Args:
        action: Calls a flow, and returns the exit status.
        interrupted: Printed after Ctrl-C.

    Returns:
        The exit status.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        return action()
    except DomainStudioError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        return USER_ERROR_STATUS
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return 128 + signal.SIGINT


def may_have_server() -> bool:
    """Tell whether a Prefect server that stays may be named somewhere; Prefect is not imported.

    Such a server shows every run. A temporary one is seen by nobody.
    """
    if os.environ.keys() & {"PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH"}:
        return True
    signs = ((".env", "PREFECT_"), ("prefect.toml", ""), ("pyproject.toml", "[tool.prefect"))
    if any(Path(name).is_file() and sign in Path(name).read_text("utf-8") for name, sign in signs):
        return True
    profiles = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser() / "profiles.toml"
    try:
        found = tomllib.loads(profiles.read_text("utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    return "PREFECT_API_URL" in found.get("profiles", {}).get(found.get("active"), {})


def start_server() -> None:
    """Start Prefect's temporary server, unless PREFECT_API_URL names another."""
    from prefect.client.orchestration import get_client
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()  # Prefect may have been imported before SETTINGS were set
    # Ctrl-C goes to the whole foreground group. Blocked here, it does not reach the server, which must live
    # until it knows how the run ended.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        get_client(sync_client=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def show_end(state: State[Any]) -> int:
    """Print how a flow run ended, and return the exit status: 0 only if it completed."""
    print(state.message or state.name, file=sys.stdout if state.is_completed() else sys.stderr)
    return 0 if state.is_completed() else 1


def _exit_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    # Prefect hands SIGTERM on to this handler after the flow was ended. The default one would end the process
    # without `atexit`, and leave the temporary server running.
    raise SystemExit(128 + number)
