"""Takes passwords out of texts that are printed, logged or stored."""

import re

_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


def redact(text: str, mark: str = "***@") -> str:
    """Replace user and password of every URL in a text.

    >>> redact("see https://me:secret@example.org/page")
    'see https://***@example.org/page'
    """
    return _CREDENTIALS.sub(mark, text)


def one_line(error: Exception) -> str:
    """Return the first line of an error's message, redacted."""
    return redact(str(error)).partition("\n")[0]
