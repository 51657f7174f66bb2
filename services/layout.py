"""Where a team's servers keep their files, and which ports they listen on."""

from __future__ import annotations

import json
import random
import socket
from dataclasses import dataclass
from pathlib import Path

from domainstudio.errors import DomainStudioError

PROJECT = Path(__file__).parents[1]
HOST = "127.0.0.1"
FOLDER = ".services"
FIRST_PORT = 7400
DATABASES = ("postgres", "sqlite")
SERVICES = ("s3", "postgres", "mlflow", "prefect", "worker")
BUCKETS = ("dvc", "mlflow", "checkpoints")
POOL = "local"
"""The work pool that the worker serves; also the worker's name."""

_INNER = ("master", "volume", "filer", "admin")
"""Parts of the S3 server, which talk to each other."""
_PORTS = ("s3", "postgres", "mlflow", "prefect", *_INNER)
_GRPC = 10_000
"""Each part of the S3 server also listens on a port that is higher by this."""
_FIRST, _LAST = 1024, 65_535 - _GRPC - len(_PORTS)
_SOCKET_LIMIT = 100
"""Bytes of a Unix socket's path; the systems' limits are 104 and more."""


class ServiceError(DomainStudioError):
    """A server of the team cannot be started, does not answer, or is missing on this machine."""


@dataclass(frozen=True)
class Layout:
    """Folder, ports and kind of database of one team.

    Attributes:
        folder: Absolute; holds data, logs and secrets.
        first_port: The first of 8 neighbouring ports of 127.0.0.1; S3 takes five more, 10000 higher.
        database: "postgres" or "sqlite".
    """

    folder: Path
    first_port: int = FIRST_PORT
    database: str = "postgres"

    @property
    def services(self) -> tuple[str, ...]:
        """The services of this team, in the order of starting."""
        return tuple(name for name in SERVICES if name != "postgres" or self.database == "postgres")

    @property
    def secrets(self) -> Path:
        """The file with passwords and keys."""
        return self.folder / "secrets.env"

    @property
    def socket(self) -> Path:
        """The socket of supervisord."""
        return self.folder / "run" / "supervisor.sock"

    def log(self, name: str) -> Path:
        """Return a service's log file."""
        return self.folder / "logs" / f"{name}.log"

    def port(self, name: str) -> int:
        """Return a service's port."""
        return self.first_port + _PORTS.index(name)

    def ports(self, name: str) -> list[int]:
        """Return all ports that a service listens on."""
        if name == "s3":
            return [self.port(part) + further for part in ("s3", *_INNER) for further in (0, _GRPC)]
        return [self.port(name)] if name in _PORTS else []

    def url(self, name: str) -> str:
        """Return the HTTP address of a service."""
        return f"http://{HOST}:{self.port(name)}"

    def address(self, name: str) -> str:
        """Return the address by which a person reaches a service."""
        if name == "worker":
            return f"pool {POOL}"
        special = {"postgres": f"{HOST}:{self.port(name)}", "prefect": f"{self.url(name)}/api"}
        return special.get(name, self.url(name))

    def create(self) -> None:
        """Create the folders: only their owner reads them, though a database user may pass through."""
        if len(str(self.socket).encode()) > _SOCKET_LIMIT:
            raise ServiceError(
                f"{self.folder} is too long a path for Unix sockets: name a shorter one with --folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o711)
        for name in ("run", "logs", "s3", "mlflow", "prefect", "worker"):
            (self.folder / name).mkdir(mode=0o700, exist_ok=True)

    def save(self) -> None:
        """Keep ports and database for later commands."""
        noted = {"first_port": self.first_port, "database": self.database}
        (self.folder / "team.json").write_text(json.dumps(noted) + "\n")


def read(folder: Path, *, first_port: int | None = None, database: str | None = None) -> Layout:
    """Return the layout that a folder keeps, or the defaults; arguments come before both."""
    path = folder.resolve() / "team.json"
    noted = json.loads(path.read_text()) if path.exists() else {}
    given = {"first_port": first_port, "database": database}
    found = Layout(
        path.parent, **{**noted, **{key: value for key, value in given.items() if value is not None}}
    )
    if not _FIRST <= found.first_port <= _LAST:
        raise ServiceError(f"--ports must be from {_FIRST} to {_LAST}, got {found.first_port}")
    return found


def free_ports() -> int:
    """Return the first of as many free neighbouring ports as a team needs.

    They lie below those that systems hand out for outgoing connections: they are still free a moment later.
    """
    draw = random.SystemRandom()
    for _ in range(1000):
        layout = Layout(Path(), draw.randrange(10_000, 22_000))
        if all(is_free(port) for name in SERVICES for port in layout.ports(name)):
            return layout.first_port
    raise ServiceError("no free ports from 10000 to 32000 on this machine")


def is_free(port: int) -> bool:
    """Tell whether a server could listen on a port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
