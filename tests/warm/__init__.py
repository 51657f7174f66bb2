"""A `python` that starts at once: forked from one that has imported the libraries, and then like any other.

A process that computes for a moment costs the seconds in which it imports torch, diffusers and MLflow. The
project's own modules are imported by each process itself, from where it is asked to.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

HERE = Path(__file__).parent


@cache
def folder() -> Path:
    """Return a folder for PATH with this `python`, and the `dvc` of it. This process's end is the server's.

    Where the operating system has no descriptors of processes, it is the ordinary one.
    """
    if not _has_descriptors_of_processes():
        return Path(sys.executable).parent
    root = Path(mkdtemp(prefix="warm-"))
    for name, first in ("python", ""), ("dvc", "-m dvc"):
        line = f'"{sys.executable}" -ISu "{HERE}/client.py" "{root}" "{sys.executable}" {first} "$@"'
        (root / name).write_text(f"#!/bin/sh\nexec {line}\n")
        (root / name).chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener, (root / "log").open("wb") as log:
        listener.bind(f"{root}/socket")
        listener.listen(64)  # clients wait here for the imports
        number = listener.fileno()
        server = subprocess.Popen(
            [sys.executable, HERE / "server.py", str(number), root],
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=[number],
            start_new_session=True,  # an interrupted test run ends it by closing stdin
        )
    atexit.register(_end, server)
    return root


def python() -> str:
    """Return the path of this `python`."""
    return str(folder() / "python")


def _has_descriptors_of_processes() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


def _environment() -> dict[str, str]:
    """Return what libraries look at while they are imported; each process has its own variables later."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def _end(server: subprocess.Popen[bytes]) -> None:
    assert server.stdin is not None
    server.stdin.close()
    server.wait()
