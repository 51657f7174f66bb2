"""What a disk refuses, as one line: a full one, a read-only folder, a mount that is lost."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from domainstudio.errors import DiskError

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

REFUSALS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})

LOSSES = frozenset(
    {errno.EIO, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN}
)
"""What a mount answers that is lost, or a disk that fails."""

_REMEDIES = {
    NO_ROOM: "Make room, and start the same command again: it goes on where it stopped",
    REFUSALS: "Correct its permissions or how it is mounted, and start the same command again",
    LOSSES: "Mount it again, or look after the disk, and start the same command again",
}
_SQLITE = {
    "disk is full": errno.ENOSPC,
    "readonly database": errno.EROFS,
    "disk I/O error": errno.EIO,
    "unable to open database file": errno.EACCES,
}
_SIZES = ("bytes", "kB", "MB", "GB", "TB")


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn what a disk refuses in this block into one line.

    Args:
        path: What is being written. Errors of other files, such as those that are read, stay as they are.

    Raises:
        DiskError: it cannot be written; the message names the path, the reason, and the free space.
    """
    try:
        yield
    except Exception as error:
        if (number := number_of(error)) is None:
            raise
        if number in NO_ROOM | LOSSES or _is_of(error, Path(path)):
            raise disk_error(error, path) from error
        raise


def number_of(error: Exception) -> int | None:
    """Return the operating system's number of an error; safetensors, shutil and SQLite have it in words.

    None for errors of the network.
    """
    if isinstance(error, ConnectionError):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if found := re.search(r"\b(?:os error|Errno) (\d+)", str(error)):
        return int(found[1])
    return next((number for words, number in _SQLITE.items() if words in str(error)), None)


def is_of_a_disk(error: Exception) -> bool:
    """Return whether a disk is full, read-only, forbidden or away; a missing file says nothing of that."""
    return number_of(error) in NO_ROOM | REFUSALS | LOSSES


def disk_error(error: Exception, path: str | Path | None = None) -> DiskError:
    """Return an error as one line.

    Args:
        error: what the operating system refused.
        path: of what; by default the file that the error names.
    """
    number = number_of(error) or 0
    named = path if path is not None else getattr(error, "filename", None)
    place = Path(os.fsdecode(named)) if named is not None else Path.cwd()
    remedy = next((text for numbers, text in _REMEDIES.items() if number in numbers), "")
    remedy = remedy or "Correct that, and start the same command again"
    reason = os.strerror(number) if number else str(error).partition("\n")[0]
    return DiskError(f"{place} cannot be read or written: {reason} ({_room(place)}). {remedy}")


def _is_of(error: Exception, path: Path) -> bool:
    """Return whether an error is of a path: of the file under its passing name, or of a folder above it."""
    if (named := getattr(error, "filename", None)) is None:
        return True
    about, path = Path(os.fsdecode(named)).absolute(), path.absolute()
    if about.is_relative_to(path.parent) and about != path.parent:
        return about.relative_to(path.parent).parts[0].removeprefix(".").startswith(path.name)
    return path.is_relative_to(about)


def _room(path: Path) -> str:
    """Return how much room there is on the disk that a path is on, or would be, and where that is mounted."""
    for folder in (path.absolute(), *path.absolute().parents):
        try:
            usage = shutil.disk_usage(folder)
            mount = next((each for each in (folder, *folder.parents) if each.is_mount()), folder)
        except OSError:
            continue
        return f"{_size(usage.free)} free of {_size(usage.total)} on {mount}"
    return "its disk does not answer"


def _size(number: float) -> str:
    for name in _SIZES:
        if number < 1000 or name == _SIZES[-1]:
            break
        number /= 1000
    return f"{number:.0f} {name}" if name == "bytes" else f"{number:.1f} {name}"
