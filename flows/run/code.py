"""Whether the code that drives a run is that of the commit that the run works on.

Stages run the clone's code. The flow around them runs the code of an image or of a worker's checkout.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from domainstudio.errors import ConfigError

ROOT = Path(__file__).parents[2]
"""Where the flow's code was loaded from."""
COMMIT_VARIABLE = "DOMAINSTUDIO_COMMIT"
"""The commit that an image was built from. deploy/Dockerfile sets it."""
DRIVING = (
    "flows/**/*.py",
    "domainstudio/*.py",
    "domainstudio/config/*.py",
    "domainstudio/registry/*.py",
    "domainstudio/storage/*.py",
    "domainstudio/tracking/*.py",
    "constraints.txt",
)
"""What a flow runs by itself: its own room and those that it imports, and the versions of the packages."""
_NAMED = 5
"""So many files are named in an error."""


def require_same(clone: Path, commit: str, root: Path = ROOT) -> None:
    """Refuse a clone whose flow code is not the code that is running.

    What one side does not have at all is not compared: a project's repository need not hold the program.

    Args:
        clone: The clone at `commit`.
        commit: For the message.
        root: Where the running code is from.

    Raises:
        ConfigError: files differ, or are on one side only.
    """
    if not (different := list(_different(clone, root))):
        return
    more = f" and {len(different) - _NAMED} more" if len(different) > _NAMED else ""
    built = os.environ.get(COMMIT_VARIABLE)
    origin = f"the image of commit {built}" if built else f"the checkout {root}"
    raise ConfigError(
        f"the flow's code is not that of commit {commit}. It was loaded from {origin}. "
        f"What differs: {', '.join(different[:_NAMED])}{more}. Start the run with the image of {commit} "
        "(job variable `image`), or bring the worker's checkout to that commit"
    )


def _different(clone: Path, root: Path) -> Iterator[str]:
    for pattern in DRIVING:
        if not all((each / pattern.partition("/")[0]).exists() for each in (clone, root)):
            continue
        files = {path.relative_to(each) for each in (clone, root) for path in each.glob(pattern)}
        for name in sorted(files):
            if _content(clone / name) != _content(root / name):
                yield name.as_posix()


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
