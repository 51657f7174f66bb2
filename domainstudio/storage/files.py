"""Files and folders that are written whole or not at all: under another name first, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from domainstudio.errors import DataError
from domainstudio.storage.disk import writing


@contextmanager
def output_file(path: str | Path, mode: int | None = None) -> Iterator[Path]:
    """Yield a path to write to; the file there replaces `path` once the block ends without an exception.

    Several processes may write the same file at once. The folder of `path` is made if it is missing.

    Args:
        path: The file to write.
        mode: Permissions, such as 0o600; by default those of any new file.

    Raises:
        DiskError: it cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if mode is not None:
                partial.unlink(missing_ok=True)
                partial.touch(mode, exist_ok=False)
        with writing(path):
            yield partial
            partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str, mode: int | None = None) -> None:
    """Write a text file in UTF-8, with the line ends as they are in `text`."""
    with output_file(path, mode) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file for people to read too, one value per line."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON file that holds a mapping.

    Args:
        path: The file.
        remedy: What makes it again, for the error.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it must hold a mapping")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}. {remedy}") from error
    return content


@contextmanager
def output_folder(path: str | Path, *, synced: bool = False) -> Iterator[Path]:
    """Yield an empty folder that replaces `path` once the block ends without an exception.

    After an exception `path` is as it was before. The new folder is the sibling `.<name>.partial`, so the
    last step is a rename within one file system.

    Args:
        path: The folder to write.
        synced: Wait until the disk has everything, so that a power cut cannot damage it either.

    Raises:
        DiskError: it cannot be written.
    """
    path = Path(path)
    partial, previous = (path.with_name(f".{path.name}.{word}") for word in ("partial", "previous"))
    with writing(path):
        if previous.exists() and not path.exists():  # killed between the two renames of `_exchange`
            previous.replace(path)
        for leftover in (partial, previous):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
    try:
        with writing(path):
            yield partial
            if synced:
                _sync(*partial.rglob("*"), partial)
            _exchange(partial, path, previous)
            if synced:
                _sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(previous, ignore_errors=True)


def move_folder(source: Path, target: Path) -> None:
    """Put a folder in the place of `target`, whole or not at all, also on another disk.

    Raises:
        DiskError: it cannot be written; `target` is as it was.
    """
    with output_folder(target) as partial:
        partial.rmdir()
        shutil.move(source, partial)


def _exchange(partial: Path, path: Path, previous: Path) -> None:
    if path.exists():
        path.replace(previous)
    try:
        partial.replace(path)
    except OSError:
        if previous.exists():
            previous.replace(path)
        raise


def _sync(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy where the file system has no hard links.

    Raises:
        FileNotFoundError: there is no `source`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
