"""PostgreSQL as the operating system packages it: found, initialised once, run by a user other than root."""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from services.layout import HOST, ServiceError

_PACKAGED = Path("/usr/lib/postgresql")
_USER = "postgres"
_INSTALL = (
    "Install it (Debian, Ubuntu: `apt-get install postgresql`; macOS: `brew install postgresql`), "
    "or do without: `python -m services start --database sqlite`"
)


def find(data: Path) -> Path:
    """Return the folder of PostgreSQL's programs: those that made `data`, or the newest.

    Raises:
        ServiceError: PostgreSQL is not installed, or not in the version of the data.
    """
    found = {_version(folder): folder for folder in _candidates()}
    if not found:
        raise ServiceError(f"PostgreSQL is not installed. {_INSTALL}")
    made_by = data / "PG_VERSION"
    if not made_by.exists():
        return found[max(found)]
    version = int(made_by.read_text())
    if version not in found:
        raise ServiceError(
            f"{data} was made by PostgreSQL {version}, installed is {max(found)}: "
            f"install {version}, or move the data with pg_dump, see docs/operate.md"
        )
    return found[version]


def owner(data: Path) -> str | None:
    """Return the user that must run the server, or None if it is the user of this process.

    Raises:
        ServiceError: this is root, and there is no user `postgres`, or it cannot reach the data.
    """
    if os.geteuid() != 0:
        return None
    try:
        pwd.getpwnam(_USER)
    except KeyError:
        raise ServiceError(
            f"PostgreSQL refuses to run as root, and there is no user {_USER}. {_INSTALL}"
        ) from None
    for folder in reversed(data.parents):
        if folder.exists() and not folder.stat().st_mode & stat.S_IXOTH:
            raise ServiceError(
                f"PostgreSQL refuses to run as root, and the user {_USER} may not enter {folder}: "
                f"`chmod o+x {folder}`, name another place with --folder, or run this as another user"
            )
    return _USER


def initialize(data: Path, passwords: Mapping[str, str], databases: Mapping[str, str]) -> None:
    """Make the database cluster with its users and databases, if it is not there: whole or not at all.

    Args:
        data: Its folder.
        passwords: Of each user; `postgres` is the administrator.
        databases: From their names to their owners.
    """
    if (data / "PG_VERSION").exists():
        return
    programs, user, partial = find(data), owner(data), data.with_name(f"{data.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700)
    if user:
        shutil.chown(partial, user, pwd.getpwnam(user).pw_gid)
    # Unix sockets are switched off below; over TCP every user needs a password.
    init = ["initdb", f"--pgdata={partial}", f"--username={_USER}", "--encoding=UTF8", "--locale=C"]
    _run(programs, user, [*init, "--auth-local=reject", "--auth-host=scram-sha-256"], "")
    # The server's single-user mode needs no port and no password. Statements are kept out of its messages.
    single = ["postgres", "--single", "-D", str(partial), "-c", "exit_on_error=on"]
    statements = "".join(f"{line};\n" for line in _statements(passwords, databases))
    _run(programs, user, [*single, "-c", "log_min_error_statement=panic", "postgres"], statements)
    partial.rename(data)


def command(data: Path, port: int) -> list[str]:
    """Return the server's command line."""
    settings = {
        "listen_addresses": HOST,
        "port": port,
        "unix_socket_directories": "",
        "log_min_error_statement": "panic",
    }
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    return [str(find(data) / "postgres"), "-D", str(data), *options]


def answers(data: Path, port: int) -> bool:
    """Tell whether the server takes connections."""
    ask = [str(find(data) / "pg_isready"), "--quiet", f"--host={HOST}", f"--port={port}", "--timeout=5"]
    return subprocess.run(ask, check=False).returncode == 0


def become(user: str) -> None:
    """Give up root for good: this process goes on as `user`."""
    entry = pwd.getpwnam(user)
    os.initgroups(user, entry.pw_gid)
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)


def _candidates() -> Iterator[Path]:
    yield from (path.parent for path in _PACKAGED.glob("*/bin/initdb"))
    if beside := shutil.which("initdb"):
        yield Path(beside).resolve().parent


@cache
def _version(programs: Path) -> int:
    shown = subprocess.run(
        [programs / "postgres", "--version"], capture_output=True, text=True, check=True
    ).stdout
    return int(shown.split()[2].split(".")[0])


def _statements(passwords: Mapping[str, str], databases: Mapping[str, str]) -> Iterator[str]:
    for user, password in passwords.items():
        verb = "ALTER" if user == _USER else "CREATE"
        yield f"{verb} ROLE {user} LOGIN PASSWORD '{password}'"
    for database, user in databases.items():
        yield f"CREATE DATABASE {database} OWNER {user}"
        yield f"REVOKE CONNECT ON DATABASE {database} FROM PUBLIC"


def _run(programs: Path, user: str | None, arguments: Sequence[str], text: str) -> None:
    groups = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}
    done = subprocess.run(
        [programs / arguments[0], *arguments[1:]],
        input=text,
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
        **groups,  # type: ignore[call-overload]
    )
    if done.returncode:
        raise ServiceError(f"{arguments[0]} failed with exit status {done.returncode}: {done.stderr[-2000:]}")
