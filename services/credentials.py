"""Passwords and keys of a team's servers: made once, kept in one file that only its owner reads."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

from domainstudio.storage.files import write_text

_MAKERS: dict[str, Callable[[], str]] = {
    "AWS_ACCESS_KEY_ID": lambda: secrets.token_hex(10),
    "AWS_SECRET_ACCESS_KEY": lambda: secrets.token_hex(20),
    "POSTGRES_PASSWORD": lambda: secrets.token_hex(20),
    "MLFLOW_DATABASE_PASSWORD": lambda: secrets.token_hex(20),
    "PREFECT_DATABASE_PASSWORD": lambda: secrets.token_hex(20),
    "MLFLOW_TRACKING_USERNAME": lambda: "admin",
    "MLFLOW_TRACKING_PASSWORD": lambda: secrets.token_hex(16),
    "MLFLOW_FLASK_SERVER_SECRET_KEY": lambda: secrets.token_hex(32),
    "PREFECT_API_AUTH_STRING": lambda: f"admin:{secrets.token_hex(16)}",
}
"""Named as in `deploy/services.env.example`. Letters and digits only: nothing to quote anywhere."""


def ensure(path: Path) -> dict[str, str]:
    """Return the credentials in a file; those that it lacks are made and added.

    Args:
        path: Lines `NAME=value`. Written for its owner alone (mode 600).
    """
    lines = path.read_text().splitlines() if path.exists() else []
    pairs = (line.partition("=") for line in lines if "=" in line and not line.startswith("#"))
    known = {name: value for name, _, value in pairs}
    if missing := [name for name in _MAKERS if not known.get(name)]:
        known |= {name: _MAKERS[name]() for name in missing}
        write_text(path, "".join(f"{name}={value}\n" for name, value in known.items()), mode=0o600)
    return known
