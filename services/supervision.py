"""The supervisor, which restarts what crashes and keeps a log per service: supervisord."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from services.layout import PROJECT, Layout, ServiceError
from services.programs import inherited

MARK = "DOMAINSTUDIO_SUPERVISED"
"""Set for supervisord and all that it starts, to `<folder>:<service>`. Never in a user's shell."""

_ALIVE = ("STARTING", "RUNNING", "BACKOFF")
_GRACE_SECONDS = 20
_STOP_FIRST = {"postgres": "INT"}
"""Signals for servers that end their children themselves. TERM lets PostgreSQL wait for its clients."""
_PROGRAM = """
[program:{name}]
command={command}
autostart=false
autorestart=true
; Only who ends sooner than this counts as failed at the start, and after so many attempts is given up.
startsecs=20
startretries=4
stopsignal={stop}
stopwaitsecs={grace}
stopasgroup={group}
killasgroup=true
redirect_stderr=true
stdout_logfile={log}
stdout_logfile_maxbytes=10MB
stdout_logfile_backups=3
"""
_CONFIGURATION = """\
; Written by `python -m services start`.
[supervisord]
logfile={log}
logfile_maxbytes=10MB
pidfile={folder}/run/supervisord.pid
childlogdir={folder}/logs
directory={directory}
{user}

[unix_http_server]
file={socket}
chmod=0600

[supervisorctl]
serverurl=unix://{socket}

[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
"""


@dataclass(frozen=True)
class ProcessState:
    """What supervisord knows of one service.

    Attributes:
        state: Supervisord's name for it, such as "RUNNING".
        pid: 0 if there is no process.
        started: Of this process, seconds since 1970.
    """

    state: str
    pid: int
    started: float

    @property
    def alive(self) -> bool:
        """Whether it runs, or will be started again."""
        return self.state in _ALIVE


class Supervisor:
    """The supervisord of one team, started when it is needed."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def states(self) -> dict[str, ProcessState] | None:
        """Return the state of each service, or None if there is no supervisord."""
        try:
            known = self._call("getAllProcessInfo")
        except OSError:
            return None
        return {each["name"]: ProcessState(each["statename"], each["pid"], each["start"]) for each in known}

    def launch(self) -> None:
        """Start supervisord; it starts none of the services yet."""
        configuration = self._layout.folder / "supervisord.conf"
        configuration.write_text(self._configuration())
        command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(configuration)]
        environment = {**inherited(), MARK: f"{self._layout.folder}:supervisord"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ServiceError(f"supervisord did not start: {done.stderr[-2000:]}")
        deadline = time.monotonic() + _GRACE_SECONDS
        while self.states() is None:
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"supervisord does not answer: see its log, {self._layout.log('supervisord')}"
                )
            time.sleep(0.05)

    def start(self, name: str) -> None:
        """Start one service; does not wait for it."""
        self._call("startProcess", name, False)

    def stop(self, name: str) -> None:
        """End one service with all its processes."""
        if (state := (self.states() or {}).get(name)) and state.alive:
            self._call("stopProcess", name)
        end(leftovers(self._layout.folder, name))

    def shutdown(self) -> None:
        """End all services, then supervisord, then whatever is left of them."""
        with contextlib.suppress(OSError, psutil.NoSuchProcess, psutil.TimeoutExpired):
            process = psutil.Process(self._call("getPID"))
            self._call("shutdown")
            process.wait(_GRACE_SECONDS * len(self._layout.services))
        end(leftovers(self._layout.folder))

    def _configuration(self) -> str:
        layout = self._layout
        text = _CONFIGURATION.format(
            log=_escaped(layout.log("supervisord")),
            folder=_escaped(layout.folder),
            directory=_escaped(PROJECT),
            socket=_escaped(layout.socket),
            user="user=root" if os.geteuid() == 0 else "",  # or it warns
        )
        for name in layout.services:
            command = [sys.executable, "-m", "services", "--folder", str(layout.folder), "run", name]
            text += _PROGRAM.format(
                name=name,
                command=_escaped(shlex.join(command)),
                stop=_STOP_FIRST.get(name, "TERM"),
                grace=_GRACE_SECONDS,
                group=str(name not in _STOP_FIRST).lower(),
                log=_escaped(layout.log(name)),
            )
        return text

    def _call(self, method: str, *arguments: object) -> Any:
        from supervisor.xmlrpc import SupervisorTransport

        transport = SupervisorTransport(None, None, f"unix://{self._layout.socket}")
        try:
            with xmlrpc.client.ServerProxy("http://127.0.0.1", transport) as server:
                return getattr(server.supervisor, method)(*arguments)
        except xmlrpc.client.Fault as error:
            raise ServiceError(f"supervisord refuses {method} {arguments}: {error.faultString}") from error


def leftovers(folder: Path, name: str = "") -> list[psutil.Process]:
    """Return the processes of a team, or of one service, whoever their parent is now; not this one."""
    found = []
    for process in psutil.process_iter():
        try:
            mark = process.environ().get(MARK, "")
        except (psutil.Error, OSError):
            continue
        if mark.startswith(f"{folder}:{name}") and process.pid != os.getpid():
            found.append(process)
    return found


def end(processes: Iterable[psutil.Process]) -> None:
    """End processes, by SIGTERM or, later, by SIGKILL; returns when they are gone."""
    remaining = list(processes)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in remaining:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        _, remaining = psutil.wait_procs(remaining, timeout=_GRACE_SECONDS)


def _escaped(value: object) -> str:
    return str(value).replace("%", "%%")
