"""What stage scripts share: one clean line for an error, and outputs that appear whole or not at all."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from domainstudio.errors import (
    UNAVAILABLE_STATUS,
    USER_ERROR_STATUS,
    DomainStudioError,
    UnavailableError,
)


def run(main: Callable[[], None]) -> None:
    """Call a stage's `main`; a `DomainStudioError` becomes `error: ...` on stderr and an exit status.

    It is `UNAVAILABLE_STATUS` where the same may succeed later, else `USER_ERROR_STATUS`. Other exceptions
    are defects and keep their traceback.
    """
    try:
        main()
    except DomainStudioError as error:
        print(f"error: {error}", file=sys.stderr)
        away = isinstance(error, UnavailableError)
        raise SystemExit(UNAVAILABLE_STATUS if away else USER_ERROR_STATUS) from None


@contextmanager
def output_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `path` once the block ends without an exception.

    On an exception what was at `path` stays as it was. The folder being built is `path`'s sibling
    `.<name>.partial`, so that the last step is a rename within one file system.
    """
    path = Path(path)
    partial, previous = (path.with_name(f".{path.name}.{word}") for word in ("partial", "previous"))
    if previous.exists() and not path.exists():  # killed between the two renames below
        previous.replace(path)
    for leftover in (partial, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _exchange(partial, path, previous)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(previous, ignore_errors=True)


def _exchange(partial: Path, path: Path, previous: Path) -> None:
    if path.exists():
        path.replace(previous)
    try:
        partial.replace(path)
    except OSError:
        if previous.exists():
            previous.replace(path)
        raise
