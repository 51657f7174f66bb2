"""Start, watch and stop a team's servers, all of them or one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from services import credentials, layout, postgres, supervision
from services.layout import ServiceError
from services.programs import Program, client_environment, inherited, program

TIMEOUT_SECONDS = 180.0
_POLL_SECONDS = 0.3
_LOG_LINES = 15


@dataclass(frozen=True)
class ServiceState:
    """What a service does now.

    Attributes:
        name: The service.
        state: "ready" (it answers), "starting" (it runs, and does not answer), "stopped" or "failed".
        pid: Its process, 0 if none.
    """

    name: str
    state: str
    pid: int = 0


class Team:
    """A team's servers in one folder.

    Args:
        folder: For data, logs and secrets; kept when the servers stop.
        first_port: The first of 8 neighbouring ports; default: as last time, or 7400. See `free_ports`.
        database: "postgres" or "sqlite"; default: as last time, or "postgres".
    """

    def __init__(
        self, folder: str | Path, *, first_port: int | None = None, database: str | None = None
    ) -> None:
        self.layout = layout.read(Path(folder), first_port=first_port, database=database)
        self._supervisor = supervision.Supervisor(self.layout)

    @property
    def credentials(self) -> dict[str, str]:
        """Passwords and keys, made on the first use."""
        self.layout.create()
        return credentials.ensure(self.layout.secrets)

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which DVC, MLflow, Prefect and boto3 find these servers. Holds secrets."""
        return client_environment(self.layout, self.credentials)

    def start(
        self,
        *names: str,
        timeout: float = TIMEOUT_SECONDS,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Start services with what they need, side by side, and return when each answers.

        Args:
            names: Default: all. What runs already is left as it is.
            timeout: Seconds.
            log: Gets a line for each that answers.

        Raises:
            ServiceError: one is not installed, its port is taken, it ended, or does not answer in time.
        """
        began = time.monotonic()
        self._check_names(names)
        with self._locked():
            programs = self._programs(names or self.layout.services)
            self._launch()
            states = self._supervisor.states() or {}
            stopped = [name for name in programs if not states[name].alive]
            self._check_ports(stopped)
            for name in stopped:
                self._supervisor.start(name)
            self._wait([*programs], began, timeout, log)

    def stop(self, *names: str) -> None:
        """End services, and return when they are gone.

        Args:
            names: Default: all, and supervisord. What needs them goes on without.
        """
        self._check_names(names)
        if not self.layout.folder.exists():
            return
        with self._locked():
            for name in names:
                self._supervisor.stop(name)
            if not names:
                self._supervisor.shutdown()

    def states(self) -> list[ServiceState]:
        """Return the state of every service."""
        return [self._state(name) for name in self.layout.services]

    def run(self, name: str) -> NoReturn:
        """Become one service, when what it needs answers. For supervisord.

        It replaces this process, so that supervisord's signals reach it, and only it knows its secrets.
        """
        server = self._program(name)
        os.environ[supervision.MARK] = f"{self.layout.folder}:{name}"
        if not server.children_stay:
            # Of an earlier run that was killed: they would keep the port.
            supervision.end(supervision.leftovers(self.layout.folder, name))
        for needed in server.needs:
            while self._state(needed).state != "ready":
                time.sleep(_POLL_SECONDS)
        server.prepare()
        environment = {**inherited(), **server.environment}
        if server.user:
            postgres.become(server.user)
        os.execve(server.command[0], server.command, environment)

    def _program(self, name: str) -> Program:
        return program(self.layout, self.credentials, name)

    def _programs(self, names: Sequence[str]) -> dict[str, Program]:
        wanted: dict[str, Program] = {}
        for name in self.layout.services[::-1]:
            if name in names or any(name in each.needs for each in wanted.values()):
                wanted[name] = self._program(name)
        return {name: wanted[name] for name in self.layout.services if name in wanted}

    def _check_names(self, names: Sequence[str]) -> None:
        if unknown := [name for name in names if name not in self.layout.services]:
            raise ServiceError(f"no service {', '.join(unknown)} here: {', '.join(self.layout.services)}")

    def _check_ports(self, names: Sequence[str]) -> None:
        for name in names:
            if taken := [port for port in self.layout.ports(name) if not layout.is_free(port)]:
                raise ServiceError(
                    f"port {taken[0]} of {name} is taken by another program: stop it, or choose another "
                    "port with --ports"
                )

    def _launch(self) -> None:
        if self._supervisor.states() is not None:
            noted = layout.read(self.layout.folder)
            if noted != self.layout:
                raise ServiceError(
                    f"the services run with --ports {noted.first_port} --database {noted.database}: "
                    "stop them first to change that"
                )
            return
        supervision.end(supervision.leftovers(self.layout.folder))
        self.layout.save()
        self._supervisor.launch()

    def _wait(self, names: Sequence[str], began: float, timeout: float, log: Callable[[str], None]) -> None:
        pending = list(names)
        while pending:
            for name in tuple(pending):
                state = self._state(name)
                late = time.monotonic() - began > timeout
                if state.state == "ready":
                    pending.remove(name)
                    log(f"{name:<9} ready after {time.monotonic() - began:.0f} s")
                elif state.state in ("failed", "stopped") or late:
                    problem = f"does not answer after {timeout:.0f} s" if late else "ended"
                    raise ServiceError(f"{name} {problem}; {self._quoted(name)}")
            time.sleep(_POLL_SECONDS if pending else 0)

    def _quoted(self, name: str) -> str:
        log = self.layout.log(name)
        lines = log.read_text(errors="replace").splitlines()[-_LOG_LINES:] if log.exists() else []
        return f"{log} ends with\n" + "\n".join(f"  {line}" for line in lines)

    def _state(self, name: str) -> ServiceState:
        known = (self._supervisor.states() or {}).get(name)
        if known is None or known.state == "STOPPED":
            return ServiceState(name, "stopped")
        if not known.alive:
            return ServiceState(name, "failed")
        answers = known.pid and self._program(name).answers(known.started)
        return ServiceState(name, "ready" if answers else "starting", known.pid)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Let one command at a time start or stop services."""
        self.layout.create()
        with (self.layout.folder / "run" / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
