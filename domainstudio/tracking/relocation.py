"""The place of artifacts in a project's own database, which MLflow keeps as absolute paths.

In a copy of a project they would point into the original: the copy would write there, and lose its pictures
when the original is removed.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
    ("model_versions", "source"),
)
"""Where MLflow keeps them; a test compares them with MLflow's tables."""


def relocate(database: Path, before: str, now: str) -> None:
    """Replace the beginning of the places of artifacts, in one transaction.

    Args:
        database: MLflow's SQLite file.
        before: The folder that the places begin with.
        now: The folder that takes its place.
    """
    with closing(sqlite3.connect(database, timeout=60)) as connection, connection:
        for table, column in COLUMNS:
            for start in ("", "file://"):
                old, new = start + before, start + now
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                    f"WHERE substr({column}, 1, ?) = ?",
                    (new, len(old) + 1, len(old) + 1, f"{old}/"),
                )
                connection.execute(f"UPDATE {table} SET {column} = ? WHERE {column} = ?", (new, old))
