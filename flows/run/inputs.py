"""What a run on another machine needs and does not make: it must be in git, in the DVC remote or on S3."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from domainstudio.errors import ConfigError, DataError
from domainstudio.storage import s3
from flows.run.graph import Stage


def check(stages: Iterable[Stage], root: Path) -> None:
    """Refuse to start without an input of one of the stages, in a clone whose data was pulled.

    Args:
        stages: What will run.
        root: The clone.

    Raises:
        ConfigError: Inputs are missing; it names each, and what brings it here.
    """
    paths = dict.fromkeys(path for stage in stages for path in stage.inputs)
    if missing := [reason for path in paths if (reason := _lack(path, root))]:
        raise ConfigError("inputs cannot be had here:\n" + "\n".join(f"  {reason}" for reason in missing))


def _lack(path: str, root: Path) -> str | None:
    if path.startswith("s3://"):
        try:
            next(s3.list_objects(path))
        except DataError as error:
            return str(error)
        return None
    if (root / path).exists():
        return None
    if any((root / f"{above}.dvc").exists() for above in (path, *Path(path).parents)):
        return f"{path} was never pushed to the DVC remote: run `dvc push` where it is"
    added = f"`dvc add {path} && dvc push`, and commit {path}.dvc and the .gitignore beside it"
    return f"{path} is neither in git nor in DVC: run {added}; or commit it, or name an s3:// prefix"
