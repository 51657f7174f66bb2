"""The commit of a folder, whether its code differs from it, and the name of git's user."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

CODE = ("*.py", "*.j2", "*.yaml", "*.toml")
"""Code and settings. Results such as `dvc.lock` and `metrics.json` change whenever the pipeline runs."""


@dataclass(frozen=True)
class State:
    """The commit of a working tree."""

    commit: str
    dirty: bool
    """Whether code or settings differ from the commit, or are not in it."""


def state(root: str | Path = ".") -> State | None:
    """Return the commit of the code below a folder, or None outside a repository."""
    try:
        return State(_git(root, "rev-parse", "HEAD"), bool(_git(root, "status", "--porcelain", "--", *CODE)))
    except (OSError, subprocess.SubprocessError):
        return None


def changed(root: str | Path, *paths: str) -> bool:
    """Return whether files differ from the commit, or are not in it; False outside a repository."""
    try:
        return bool(_git(root, "status", "--porcelain", "--", *paths))
    except (OSError, subprocess.SubprocessError):
        return False


def tracks(root: str | Path, path: str | Path) -> bool:
    """Return whether git has a file, or one below a folder; False outside a repository."""
    try:
        return bool(_git(root, "ls-files", "--", str(path)))
    except (OSError, subprocess.SubprocessError):
        return False


def user() -> str | None:
    """Return `user.name` of git's settings, or None where it is not set or git is missing."""
    try:
        return _git(".", "config", "user.name") or None
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: str | Path, *arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.strip()
