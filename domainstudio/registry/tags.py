"""Tags by which a version is found again."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

KEY, DIGEST = "domainstudio.key", "domainstudio.digest"
"""Hash of the parameters and inputs of a result, and hash of its model folder."""


def find_version(client: MlflowClient, name: str, key: str, digest: str) -> ModelVersion | None:
    """Return the oldest version of a model with this key and folder digest, or None."""
    found = client.search_model_versions(
        f"name = '{name}' and tags.`{KEY}` = '{key}' and tags.`{DIGEST}` = '{digest}'"
    )
    return min(found, key=lambda version: int(version.version), default=None)
