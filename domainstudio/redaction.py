"""Takes passwords out of texts that are printed, logged or stored."""

import re

_CREDENTIALS = re.compile(r"(?<=://)[^/\s'\"]+@")
_PARAMETERS = re.compile(
    r"(?i)([?&](?:[a-z_-]*(?:password|passwd|pwd|token|secret|signature|credential|api[_-]?key)|sig)=)[^&\s'\"#]+"
)


def redact(text: str, mark: str = "***@") -> str:
    """Replace user and password of every URL in a text, and the values of such parameters.

    >>> redact("see https://me:secret@example.org/page")
    'see https://***@example.org/page'
    >>> redact("https://example.org/a.png?size=2&X-Amz-Signature=0a1b&token=secret")
    'https://example.org/a.png?size=2&X-Amz-Signature=***&token=***'
    """
    return _PARAMETERS.sub(r"\1***", _CREDENTIALS.sub(mark, text))


def one_line(error: Exception) -> str:
    """Return the first line of an error's message, redacted."""
    return redact(str(error)).partition("\n")[0]
