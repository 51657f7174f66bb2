"""Training states copied to S3 while a model trains, so that a killed run can go on in another place.

`<DOMAINSTUDIO_CHECKPOINTS>/<name of the checkpoint folder>/step-0000100/` holds a state and `MANIFEST.json`,
which is written last and names every file with its size and SHA-256: a state is there whole or not at all.

The checkpoint folder is watched: whoever trains knows nothing of S3, never waits for it and cannot fail
because of it. Only a training that has no state of its own does not begin while S3 is away.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from domainstudio.distributed import this_process
from domainstudio.errors import ConfigError, DataError
from domainstudio.redaction import redact
from domainstudio.storage import checkpoint, s3

logger = logging.getLogger(__name__)

VARIABLE = "DOMAINSTUDIO_CHECKPOINTS"
"""Environment variable: `s3://bucket/prefix`. It changes no result, so it is no setting of params.yaml."""

MANIFEST = "MANIFEST.json"
POLL = 0.5
"""Seconds between two looks into the checkpoint folder."""
WAIT = 120.0
"""Seconds that the end of a training waits at most for its last state to be copied."""

_FILES = ("state.safetensors", "state.json")


class FileRecord(BaseModel):
    """What a file must be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    sha256: str


class Manifest(BaseModel):
    """`MANIFEST.json` of a state: its files, and the previews drawn up to its step."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1]
    files: dict[str, FileRecord]
    """By path in the checkpoint folder."""


@contextmanager
def mirrored(folder: Path) -> Iterator[None]:
    """Train in this block: from the newest state, here or in S3; each new one is copied there.

    Without `DOMAINSTUDIO_CHECKPOINTS` nothing is done. Of several processes the main one talks to S3, and
    the others wait until it has fetched the state. S3 that is away, or refuses, costs one warning; but
    without a state in the folder, S3 that is away may hold hours of training, so it has to come back first.

    Args:
        folder: the run's checkpoint folder, named after the run's key.

    Raises:
        ConfigError: `DOMAINSTUDIO_CHECKPOINTS` is no `s3://bucket/prefix`.
        UnreachableError: S3 is away, and the folder has no state.
    """
    if not (place := os.environ.get(VARIABLE)):
        yield
        return
    if not place.startswith("s3://"):
        raise ConfigError(f"{VARIABLE} must be s3://bucket/prefix, got {redact(place)}")
    process = this_process()
    mirror = Mirror(folder, f"{place.rstrip('/')}/{folder.name}")
    with process.main_process_first():
        if process.is_main_process:
            mirror.fetch()
    if process.is_main_process:
        mirror.start()
    try:
        yield
    finally:
        if process.is_main_process:
            mirror.close()


class Mirror:
    """The copy of one run's checkpoint folder.

    Args:
        folder: the checkpoint folder.
        url: `s3://bucket/prefix/<run>`.
    """

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        self._previews: dict[str, FileRecord] = {}
        self._copied = self._tried = ""  # the last states that were, or failed to be
        self._warned = False
        self._closing, self._cancelled = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="s3-mirror", daemon=True)

    def fetch(self) -> None:
        """Bring the newest state into the folder, unless it is there; a failure is a warning.

        Raises:
            UnreachableError: S3 is away, and the folder has no state.
        """
        try:
            self._fetch_newest()
        except Exception as error:
            begins = not any(_is_readable(state) for state in self.folder.glob("step-*"))
            if begins and isinstance(error, s3.UnreachableError):
                raise
            self._warn(error)

    def start(self) -> None:
        """Copy states from now on, in a thread; when several have come meanwhile, only the newest."""
        self._thread.start()

    def close(self) -> None:
        """Wait until the last state is copied, for `WAIT` seconds at most."""
        self._closing.set()
        try:
            self._thread.join(2)
            if self._thread.is_alive():
                print(f"waiting for the last training state on its way to {self.url}", flush=True)
                self._thread.join(WAIT - 2)
        finally:
            self._cancelled.set()
        if self._thread.is_alive():
            self._warn(TimeoutError(f"{WAIT:.0f} s were not enough for the last one"))

    def _fetch_newest(self) -> None:
        there = {item.path: item for item in s3.find_objects(self.url)}
        whole = _whole(there)
        for name in sorted({path.name for path in self.folder.glob("step-*")} | whole, reverse=True):
            if _is_readable(self.folder / name) or (name in whole and self._fetch_state(name, there)):
                self._copied = name if name in whole else ""
                return

    def _fetch_state(self, name: str, there: Mapping[str, s3.S3Object]) -> bool:
        """Download a state with the previews before it; return whether it was what its manifest says."""
        unfinished = self.folder / f".{name}.fetched"
        try:
            s3.download(there[f"{name}/{MANIFEST}"], unfinished / MANIFEST)
            files = Manifest.model_validate_json((unfinished / MANIFEST).read_bytes()).files
            for file in _FILES:
                path = f"{name}/{file}"
                s3.download(there[path], unfinished / file, files[path].sha256)
        except s3.UnreachableError:  # which says nothing of the state, and the one before is there too
            raise
        except (DataError, ValidationError, KeyError) as error:
            reason = redact(str(error)).partition("\n")[0]
            logger.warning(
                "%s/%s cannot be used (%s); going back to the state before", self.url, name, reason
            )
            return False
        for path in (path for path in files if path.startswith("previews/") and s3.is_safe(path)):
            with suppress(DataError, KeyError):  # a picture less
                if not (self.folder / path).exists():
                    s3.download(there[path], self.folder / path, files[path].sha256)
        (unfinished / MANIFEST).unlink()
        shutil.rmtree(self.folder / name, ignore_errors=True)
        unfinished.rename(self.folder / name)
        print(f"{self.folder / name}: fetched from {self.url}", flush=True)
        return True

    def _watch(self) -> None:
        while not self._closing.wait(POLL):
            self._copy_newest()
        self._tried = ""
        self._copy_newest()

    def _copy_newest(self) -> None:
        name = max((path.name for path in self.folder.glob("step-*")), default="")
        if name in ("", self._copied, self._tried):
            return
        self._tried = name  # what failed is tried again when the next state is there
        try:
            self._copy(name)
        except Exception as error:
            if not self._cancelled.is_set():
                self._warn(error)

    def _copy(self, name: str) -> None:
        """Copy a state and the previews before it, the manifest last; then drop older states there."""
        there = {item.path for item in s3.find_objects(self.url)}
        staged = self.folder / ".copied"
        shutil.rmtree(staged, ignore_errors=True)
        with suppress(FileNotFoundError):  # training has dropped it already, so there is a newer one
            for file in _FILES:  # links stay when training drops the state
                s3.link_or_copy(self.folder / name / file, staged / file)
            if f"{name}/{MANIFEST}" in there:  # damaged, and trained again
                s3.delete(f"{self.url}/{name}/{MANIFEST}")
            self._copy_previews(name)
            files = {f"{name}/{file}": self._upload(staged / file, f"{name}/{file}") for file in _FILES}
            manifest = Manifest(format=1, files={**self._previews, **files})
            (staged / MANIFEST).write_text(manifest.model_dump_json(indent=1))
            self._upload(staged / MANIFEST, f"{name}/{MANIFEST}")
            self._copied = name
            self._drop_before(name, there)
        shutil.rmtree(staged, ignore_errors=True)

    def _copy_previews(self, name: str) -> None:
        """Copy the previews up to a state's step, which are all written when the state is there."""
        for path in sorted(self.folder.glob("previews/step-*.png")):
            preview = path.relative_to(self.folder).as_posix()
            if _step(path.stem) <= _step(name) and preview not in self._previews:
                self._previews[preview] = self._upload(path, preview)

    def _upload(self, path: Path, name: str) -> FileRecord:
        sha256 = s3.upload(path, f"{self.url}/{name}", self._cancelled.is_set)
        return FileRecord(size=path.stat().st_size, sha256=sha256)

    def _drop_before(self, name: str, there: Collection[str]) -> None:
        """Delete the states before the newest `checkpoint.KEEP`; of each the manifest first."""
        kept = sorted(state for state in _whole(there) if state < name)[1 - checkpoint.KEEP :]
        for path in sorted(there):  # capitals come first
            state = path.partition("/")[0]
            if state.startswith("step-") and state < name and state not in kept:
                s3.delete(f"{self.url}/{path}")

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "training states are not kept in %s: training goes on, and the newest is tried again with "
                "each new one. Correct %s, or: %s",
                redact(self.url),
                VARIABLE,
                redact(str(error)).partition("\n")[0],
            )


def _whole(paths: Collection[str]) -> set[str]:
    """Return the names of the states that have a manifest."""
    return {
        path.partition("/")[0] for path in paths if path.startswith("step-") and path.endswith(f"/{MANIFEST}")
    }


def _step(name: str) -> int:
    return int(name.partition("-")[2])


def _is_readable(state: Path) -> bool:
    """Tell whether a state on this disk has all its bytes, without reading them."""
    from safetensors import SafetensorError, safe_open

    try:
        json.loads((state / "state.json").read_bytes())
        with safe_open(state / "state.safetensors", "pt"):
            return True
    except (OSError, ValueError, SafetensorError):
        return False
