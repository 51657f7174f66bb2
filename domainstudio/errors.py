"""The errors that users meet. Each message names the problem, the place and the remedy."""

from collections.abc import Iterator
from contextlib import contextmanager

USER_ERROR_STATUS, DISK_STATUS, UNAVAILABLE_STATUS = 2, 74, 75
"""Exit statuses of stages: a mistake that no retry mends, as argparse has it; a disk that is full, read-only
or away; a server that is away. The last two are those of sysexits.h."""


class DomainStudioError(Exception):
    """Base class of every error that DomainStudio raises on purpose."""


class ConfigError(DomainStudioError):
    """`params.yaml` (or an override of it) is not usable."""


class DataError(DomainStudioError):
    """An image, an image set or its origin is not usable."""


class CheckpointError(DomainStudioError):
    """A model folder or a training state is missing, damaged or does not fit."""


class TrainingError(DomainStudioError):
    """Training stopped, because to go on would damage the result."""


class DiskError(DomainStudioError):
    """A disk is full, read-only or away. Once that is mended, the same call goes on where it stopped."""


class UnavailableError(DomainStudioError):
    """A server does not answer. The same call may succeed later."""


class MissingExtraError(DomainStudioError):
    """An optional package is not installed."""


@contextmanager
def needs_extra(user: str, extra: str) -> Iterator[None]:
    """Import optional packages within it: where one is missing, the error names the extra that has it.

    Args:
        user: what needs the packages, for the message.
        extra: name of the extra in pyproject.toml.

    Raises:
        MissingExtraError: a package is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(
            f'{user} needs {error.name}, which is not installed: pip install "domainstudio[{extra}]"'
        ) from error
