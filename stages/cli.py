"""What stage scripts share: an error is one clean line and an exit status."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

from domainstudio.errors import (
    DISK_STATUS,
    UNAVAILABLE_STATUS,
    USER_ERROR_STATUS,
    DiskError,
    DomainStudioError,
    UnavailableError,
)
from domainstudio.redaction import redact
from domainstudio.storage.disk import disk_error, is_of_a_disk


def run(main: Callable[[], None]) -> None:
    """Call a stage's `main`; an error becomes `error: ...` on stderr, without passwords, and an exit status.

    It is `UNAVAILABLE_STATUS` where a server does not answer, `DISK_STATUS` where a disk is full, read-only
    or away, else `USER_ERROR_STATUS`. Other exceptions are defects and keep their traceback, among them those
    of the operating system that say nothing of a disk, such as that a file is missing.
    """
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # PyTorch's, under autocast
    try:
        main()
    except DomainStudioError as error:
        end(error)
    except Exception as error:
        if not is_of_a_disk(error):
            raise
        end(disk_error(error))


def end(error: DomainStudioError) -> NoReturn:
    """Print an error and leave with its status."""
    print(f"error: {redact(str(error))}", file=sys.stderr)
    kinds = {UnavailableError: UNAVAILABLE_STATUS, DiskError: DISK_STATUS}
    found = [status for kind, status in kinds.items() if isinstance(error, kind)]
    raise SystemExit(found[0] if found else USER_ERROR_STATUS) from None
