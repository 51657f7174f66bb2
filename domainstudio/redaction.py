"""Secrets are taken out of whatever is printed, logged or stored."""

import re

_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


def redact(text: str, mark: str = "***@") -> str:
    """Replace user and password of every URL in a text.

    >>> redact("see https://me:secret@example.org/page")
    'see https://***@example.org/page'
    """
    return _CREDENTIALS.sub(mark, text)
