"""The errors that users meet: each names what is wrong, where it is, and the remedy."""

USER_ERROR_STATUS, UNAVAILABLE_STATUS = 2, 75
"""Exit statuses of stages: of a mistake that no retry mends (argparse's too), of a server that is away."""


class DomainStudioError(Exception):
    """Base class of every error that DomainStudio raises on purpose."""


class ConfigError(DomainStudioError):
    """`params.yaml` (or an override of it) is not usable."""


class DataError(DomainStudioError):
    """An image, an image set or its origin is not usable."""


class CheckpointError(DomainStudioError):
    """A model folder or a training state is missing, damaged or does not fit."""


class TrainingError(DomainStudioError):
    """Training cannot go on without harming the result."""


class UnavailableError(DomainStudioError):
    """A server does not answer now; the same may succeed later."""


class MissingExtraError(DomainStudioError):
    """An optional package is not installed."""
