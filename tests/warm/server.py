"""Imports the libraries once, and forks a process for each client."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import sys
from typing import Any

LIBRARIES = (
    "torch.distributed.run",
    "torch.profiler",
    "diffusers.models.unets",
    "diffusers.models.autoencoders",
    "diffusers.models.transformers",
    "diffusers.pipelines.ddim",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.training_utils",
    "peft",
    "efficientnet_lite_pytorch",
    "mlflow.pyfunc",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_store",
    "alembic.command",
    "sqlalchemy.dialects.sqlite",
    "ruamel.yaml",
    "dvc.cli",
    "dvc.repo",
)
PATH = sys.path[1:]
status: int | None = None
"""Of this process, once it has done what it was asked to."""


def main(number: str, folder: str) -> None:
    """Serve until stdin ends, as whoever started this has then; delete the folder with the socket."""
    atexit.register(_leave)  # before the libraries register theirs: the last of all
    with socket.socket(fileno=int(number)) as listener:
        for name in LIBRARIES:
            importlib.import_module(name)
        gc.freeze()
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                shutil.rmtree(folder)
                os._exit(0)
            connection, _ = listener.accept()
            if os.fork() == 0:
                break
            connection.close()
            _forget_ended()
    _attend(connection)


def _forget_ended() -> None:
    with contextlib.suppress(ChildProcessError):  # there are no others
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _attend(connection: socket.socket) -> None:
    """Fork the process that a client asks for; pass on the client's signals, and tell it how that ends."""
    length, descriptors, _, _ = socket.recv_fds(connection, 8, 3)
    request = json.loads(connection.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL))
    process = os.fork()
    if process == 0:
        connection.close()
        return _become(request, descriptors)
    for each in descriptors:
        os.close(each)
    with contextlib.suppress(OSError):  # the client was killed
        connection.sendall(str(_end_of(process, connection)).encode())
    os._exit(0)


def _end_of(process: int, connection: socket.socket) -> int:
    """Wait for a process to end; return its exit code. It is killed with its group when the client is."""
    ended = os.pidfd_open(process)
    while ended not in select.select([ended, connection.fileno()], [], [])[0]:
        if number := connection.recv(1):
            os.kill(process, number[0])
        else:
            os.killpg(process, signal.SIGKILL)
            break
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Be the process: go on as `python -m` or `python -c` does in a folder, with variables."""
    os.setpgid(0, 0)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["variables"])
    sys.path[:] = [
        request["folder"],
        *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)),
        *PATH,
    ]
    sys.executable = request["python"]
    global status
    try:
        _run(*request["arguments"])
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except BaseException:
        status = 1
        raise


def _run(kind: str, what: str, *arguments: str) -> None:
    sys.argv = [kind, *arguments]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec", dont_inherit=True), {"__name__": "__main__"})


def _leave() -> None:
    """End a process after all that is done at its end, without half a second of taking libraries apart."""
    if status is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
