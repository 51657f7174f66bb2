"""What stage scripts share: an error is one clean line and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable

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
