"""Where MLflow keeps runs and models, and how this project talks to it: quietly and in bounded time."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from domainstudio.errors import ConfigError, DomainStudioError, MissingExtraError, UnavailableError
from domainstudio.redaction import redact

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

QUIET = {
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""What MLflow prints otherwise: links, progress bars, advice."""

IMPATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
"""While a model trains: MLflow's own 7 retries of 120 s would hold up the training for minutes. Without
retries a request is also never repeated behind our back, so a run is not created twice."""

PATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "120", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
"""While a model is registered: large uploads, and nothing else waits."""


class TrackingError(DomainStudioError):
    """MLflow cannot be reached, or refused a request."""


class TrackingUnavailableError(TrackingError, UnavailableError):
    """MLflow, or its database or its file store, does not answer."""


def tracking_uri(root: str | Path = ".") -> str:
    """Return `MLFLOW_TRACKING_URI`, or by default the SQLite file `mlflow.db` in the project's root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(root).resolve() / 'mlflow.db'}"


def is_served(root: str | Path = ".") -> bool:
    """Tell whether a server keeps the runs, which other machines can reach too."""
    return tracking_uri(root).startswith(("http://", "https://", "databricks"))


def shown_uri(root: str | Path = ".") -> str:
    """Return `tracking_uri(root)` as it may be printed."""
    return redact(tracking_uri(root))


def client(root: str | Path = ".") -> MlflowClient:
    """Return a client of `tracking_uri(root)`, to be made and used inside of `calling`.

    Raises:
        MissingExtraError: MLflow is not installed.
    """
    # MLflow reads this once, at import; whoever wants its usage statistics sent can set it to false.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        from mlflow.tracking import MlflowClient
    except ImportError as error:
        raise MissingExtraError(
            "tracking needs MLflow, which is not installed: pip install 'domainstudio[pipeline]'"
        ) from error
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=tracking_uri(root))


@contextmanager
def calling(defaults: Mapping[str, str]) -> Iterator[None]:
    """Call MLflow in this block: quietly, and with settings of its environment, except those the user made.

    Args:
        defaults: `IMPATIENT` or `PATIENT`.
    """
    missing = {key: value for key, value in {**QUIET, **defaults}.items() if key not in os.environ}
    os.environ.update(missing)
    try:
        with warnings.catch_warnings():
            # MLflow warns of its own type hints and of its own use of SQLAlchemy.
            warnings.filterwarnings("ignore", module=r"mlflow(\.|$)")
            yield
    finally:
        for key in missing:
            os.environ.pop(key, None)


@contextmanager
def talking(root: str | Path = ".") -> Iterator[MlflowClient]:
    """Yield a client for work that may take long; MLflow's exceptions become TrackingError.

    Raises:
        TrackingUnavailableError: the same may succeed later.
        TrackingError: MLflow refused.
    """
    # Model.log knows the tracking server by this variable alone.
    uri = {"MLFLOW_TRACKING_URI": tracking_uri(root)}
    with calling({**PATIENT, **uri}):
        connected = client(root)
        from mlflow.exceptions import MlflowException
        from requests.exceptions import RequestException

        try:
            yield connected
        except (MlflowException, RequestException) as error:  # files travel without MLflow's exceptions
            said = redact(str(error))
            kind = TrackingUnavailableError if is_away(error) else TrackingError
            raise kind(
                f"MLflow at {shown_uri(root)}: {said}. Check MLFLOW_TRACKING_URI and the server"
            ) from error


def is_away(error: Exception) -> bool:
    """Whether MLflow did not answer, or could not do its work, so that the same may succeed later."""
    return not 400 <= _status(error) < 500 or _status(error) in (408, 429)


def is_refusal(error: Exception) -> bool:
    """Whether MLflow said no to what was asked, whoever asks, so that asking again is of no use."""
    return not is_away(error) and _status(error) not in (401, 403)


def _status(error: Exception) -> int:
    """Return the HTTP status of an error of MLflow or requests; 503 where nobody answered."""
    if (status := getattr(error, "get_http_status_code", None)) is not None:
        return int(status())
    return int(getattr(getattr(error, "response", None), "status_code", 503))


def experiment_id(client: MlflowClient, name: str, root: str | Path = ".") -> str:
    """Return the id of an experiment, which is created if need be.

    Without a server its artifacts go to `mlartifacts` in the project's root; a server decides itself.

    Raises:
        ConfigError: the experiment is in MLflow's trash.
    """
    from mlflow.exceptions import MlflowException

    folder = None if is_served(root) else str(Path(root).resolve() / "mlartifacts")
    if (experiment := client.get_experiment_by_name(name)) is None:
        try:
            # Otherwise MLflow's pages take it for an experiment with language models.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return str(client.create_experiment(name, artifact_location=folder, tags=kind))
        except MlflowException:
            # Two stages may start together: the slower one finds what the faster has made.
            if (experiment := client.get_experiment_by_name(name)) is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise ConfigError(
            f"registry.experiment: MLflow's experiment {name!r} was deleted. Restore it with `mlflow "
            f"experiments restore --experiment-id {experiment.experiment_id}`, or choose another name"
        )
    return str(experiment.experiment_id)
