"""The folder of one flow run: a clone of the repository, with the data that it reads and the results."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from domainstudio import config
from domainstudio.errors import ConfigError, DomainStudioError
from domainstudio.redaction import redact
from flows.run import code, graph
from flows.run.commands import Commands, Log, environment

REPOSITORY_VARIABLE = "DOMAINSTUDIO_REPOSITORY"
"""Where a run clones from: a URL, or a folder."""
CACHE_VARIABLE = "DOMAINSTUDIO_DVC_CACHE"
"""A DVC cache that several runs share, on a disk that all of them see; by default each has its own."""
WORKSPACES_VARIABLE = "DOMAINSTUDIO_WORKSPACES"
"""Folder for the runs' clones; by default the system's temporary folder."""
BRANCHES = "runs"
"""Results are published on branches of this folder: `runs/<name of the flow run>`."""

_NOT_IN_NAMES = re.compile(r"[^\w-]+")
"""Characters that a flow run's name may have, and a branch's may not."""
_IDENTITY = ("-c", "user.name=DomainStudio pipeline", "-c", "user.email=pipeline@domainstudio.invalid")
"""Who commits, if git knows nobody."""


class WorkspaceError(DomainStudioError):
    """The repository could not be cloned, or did not accept the results."""


@dataclass(frozen=True)
class Workspace:
    """A clone at one commit."""

    root: Path
    commit: str
    """The commit that was asked for, before results."""


def repository_of(given: str | None) -> str:
    """Return the repository to clone.

    Raises:
        ConfigError: none is given, and the environment names none.
    """
    if found := given or os.environ.get(REPOSITORY_VARIABLE):
        return found
    raise ConfigError(f"no repository to clone: set {REPOSITORY_VARIABLE} to its URL, or give `repository`")


def checkout(repository: str, revision: str, root: Path) -> Workspace:
    """Clone a repository and check out a revision, detached.

    Args:
        repository: URL or folder; what git needs to authenticate comes from its own settings.
        revision: Branch, tag or commit.
        root: Folder to make.

    Raises:
        ConfigError: there is no such repository or revision, or its flow code is not the code that runs.
        WorkspaceError: `root` holds something already.
    """
    if root.exists() and any(root.iterdir()):
        raise WorkspaceError(f"{root} is not empty: a run needs a folder of its own")
    try:
        _git(None, "clone", "--quiet", "--no-checkout", "--", repository, str(root))
    except WorkspaceError as error:
        raise ConfigError(
            f"{redact(repository)} cannot be cloned: correct {REPOSITORY_VARIABLE}. {error}"
        ) from error
    for name in (f"origin/{revision}", revision):
        try:
            commit = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        except WorkspaceError:
            continue
        _git(root, "checkout", "--quiet", "--detach", commit)
        code.require_same(root, commit)
        return Workspace(root, commit)
    raise ConfigError(f"{redact(repository)} has no branch, tag or commit {revision!r}: correct `revision`")


def settings(repository: str, revision: str) -> config.Settings:
    """Return the settings of a repository's params.yaml at a revision.

    Raises:
        ConfigError: as `checkout`, or the settings are wrong.
    """
    with tempfile.TemporaryDirectory(prefix="domainstudio-") as folder:
        clone = checkout(repository, revision, Path(folder, "clone")).root
        with contextlib.chdir(clone):
            return config.load()


def share_cache(workspace: Workspace) -> None:
    """Make the workspace use the shared DVC cache, if `DOMAINSTUDIO_DVC_CACHE` names one."""
    if folder := os.environ.get(CACHE_VARIABLE):
        for key, value in (("cache.dir", folder), ("cache.shared", "group")):
            _dvc(workspace.root, "config", "--local", key, value)


def has_remote(workspace: Workspace) -> bool:
    """Tell whether DVC has a default remote there."""
    return bool(_dvc(workspace.root, "config", "core.remote", check=False))


def pull(commands: Commands, log: Log, stages: Collection[str]) -> None:
    """Fetch the outputs of stages, as far as the DVC remote has them. The run makes the others.

    All that a stage reads must be there before DVC compares. Of a folder that is there in part, such as
    `samples`, DVC would take the part for the whole.
    """
    command = [sys.executable, "-m", "dvc", "pull", "--allow-missing", "--run-cache", *sorted(stages)]
    commands.run(command, log, "dvc pull")


def push(commands: Commands, log: Log, stages: Collection[str]) -> None:
    """Copy the outputs of stages, and DVC's run cache, to the DVC remote."""
    commands.run([sys.executable, "-m", "dvc", "push", "--run-cache", *sorted(stages)], log, "dvc push")


def needed(stages: Collection[graph.Stage], known: Mapping[str, graph.Stage]) -> list[str]:
    """Return the stages whose outputs a run of `stages` reads or makes, without those that git holds.

    Args:
        stages: what will run.
        known: every stage, with all that it reads.
    """
    found = {stage.address for stage in stages}
    found.update(name for stage in stages for name in known[stage.address].upstream)
    return sorted(name for name in found if not known[name].frozen)


def publish(workspace: Workspace, name: str, message: str) -> str | None:
    """Commit the results that git tracks, such as `dvc.lock`, and push them to a branch of their own.

    Args:
        workspace: the clone.
        name: of the branch, below `runs/`; a number is added where another run has taken it.
        message: the commit's first line; `[skip ci]` is added, so that nobody's CI trains again.

    Returns:
        The branch, or None where nothing changed.

    Raises:
        WorkspaceError: the repository did not accept it.
    """
    root = workspace.root
    _git(root, "add", "--all")
    if not _git(root, "status", "--porcelain"):
        return None
    identity = () if _git(root, "config", "user.email", check=False) else _IDENTITY
    _git(root, *identity, "commit", "--quiet", "--message", f"{message} [skip ci]")
    return _push(root, f"{BRANCHES}/{_NOT_IN_NAMES.sub('-', name).strip('-') or 'run'}")


def _push(root: Path, name: str, number: int = 1) -> str:
    """Push to a branch of its own: runs may share a name, and one that starts again has published before."""
    branch = name if number == 1 else f"{name}-{number}"
    try:
        _git(root, "push", "--quiet", "origin", f"HEAD:refs/heads/{branch}")
    except WorkspaceError:
        if not _git(root, "ls-remote", "origin", f"refs/heads/{branch}"):
            raise
        return _push(root, name, number + 1)
    return branch


def _dvc(root: Path, *arguments: str, check: bool = True) -> str:
    return _call([sys.executable, "-m", "dvc", *arguments], root, check)


def _git(root: Path | None, *arguments: str, check: bool = True) -> str:
    return _call(["git", *arguments], root, check)


def _call(command: list[str], root: Path | None, check: bool) -> str:
    done = subprocess.run(
        command,
        cwd=root,
        # A git that asks for a password waits for ever.
        env={**environment(os.environ), "GIT_TERMINAL_PROMPT": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if check and done.returncode:
        what = " ".join(["dvc" if command[0] == sys.executable else command[0], command[-1]])
        raise WorkspaceError(f"{redact(what)}: {redact(done.stderr.strip() or done.stdout.strip())}")
    return done.stdout.strip()
