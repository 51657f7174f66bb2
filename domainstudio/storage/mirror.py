"""Copies training states to S3 during a training, so that a killed run can continue on another machine.

`<DOMAINSTUDIO_CHECKPOINTS>/<name of the checkpoint folder>/step-0000100/` holds a state and `MANIFEST.json`.
The manifest is uploaded last and names every file with its size and SHA-256, so a state without it is not
complete.

A thread watches the checkpoint folder. The training knows nothing of S3, never waits for it and never fails
because of it. There is one exception: a training without any state does not begin while S3 is unreachable.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from domainstudio.errors import CheckpointError, ConfigError, DataError
from domainstudio.redaction import one_line, redact
from domainstudio.storage import checkpoint, s3
from domainstudio.storage.files import link_or_copy

logger = logging.getLogger(__name__)

VARIABLE = "DOMAINSTUDIO_CHECKPOINTS"
"""Environment variable: `s3://bucket/prefix`. It changes no result, so it is no setting of params.yaml."""

MANIFEST = "MANIFEST.json"
POLL = 0.5
"""Seconds between two looks into the checkpoint folder."""
WAIT = 120.0
"""Seconds for which the end of a training waits, at most, until its last state is copied."""

_FILES = (checkpoint.TENSORS, checkpoint.CONTENT)

KEPT = ("previews/step-*.png", "candidates/step-*.safetensors")
"""What a run keeps of the steps before a state, by patterns of paths."""


class FileRecord(BaseModel):
    """Size in bytes and hash of a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    sha256: str


class Manifest(BaseModel):
    """`MANIFEST.json` of a state: its files, and the previews and candidates up to its step."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1]
    files: dict[str, FileRecord]
    """By path in the checkpoint folder."""


@contextmanager
def mirrored(folder: Path) -> Iterator[None]:
    """Fetch the newest state of a run if S3 has a newer one, and copy each new state there in this block.

    Without `DOMAINSTUDIO_CHECKPOINTS` nothing is done. With several processes only the main one uses S3, and
    the others wait until it has fetched the state. If S3 fails, there is one warning. A folder without any
    state is an error then, because S3 may hold hours of training.

    Args:
        folder: The run's checkpoint folder, named after the run's key.

    Raises:
        ConfigError: `DOMAINSTUDIO_CHECKPOINTS` is no `s3://bucket/prefix`.
        UnreachableError: S3 does not answer, and the folder has no state.
    """
    if not (url := os.environ.get(VARIABLE)):
        yield
        return
    if not url.startswith("s3://"):
        raise ConfigError(f"{VARIABLE} must be s3://bucket/prefix, got {redact(url)}")
    from domainstudio.distributed import this_process  # which imports torch

    process = this_process()
    mirror = Mirror(folder, f"{url.rstrip('/')}/{folder.name}")
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
    """The copy of one run's checkpoint folder on S3.

    Args:
        folder: The checkpoint folder.
        url: `s3://bucket/prefix/<run>`.
    """

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        self._kept: dict[str, FileRecord] = {}
        self._copied = self._tried = ""  # the last states that were copied, and tried
        self._warned = False
        self._closing, self._cancelled = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="s3-mirror", daemon=True)

    def fetch(self) -> None:
        """Download the newest state unless the folder has it. A failure is a warning.

        Raises:
            UnreachableError: S3 does not answer, and the folder has no state.
        """
        try:
            self._fetch_newest()
        except Exception as error:
            empty = not any(checkpoint.is_whole(state) for state in self.folder.glob("step-*"))
            if empty and isinstance(error, s3.UnreachableError):
                raise
            self._warn(error)

    def start(self) -> None:
        """Start a thread that copies states. If it falls behind it copies only the newest."""
        self._thread.start()

    def close(self) -> None:
        """Wait until the last state is copied, for `WAIT` seconds at most."""
        self._closing.set()
        try:
            self._thread.join(2)
            if self._thread.is_alive():
                print(f"waiting until the last training state is in {self.url}", flush=True)
                self._thread.join(WAIT - 2)
        finally:
            self._cancelled.set()
        if self._thread.is_alive():
            self._warn(TimeoutError(f"the last one was not copied within {WAIT:.0f} s"))

    def _fetch_newest(self) -> None:
        remote = {item.path: item for item in s3.find_objects(self.url)}
        complete = _complete(remote)
        for name in sorted({path.name for path in self.folder.glob("step-*")} | complete, reverse=True):
            if checkpoint.is_whole(self.folder / name) or (
                name in complete and self._fetch_state(name, remote)
            ):
                self._copied = name if name in complete else ""
                return

    def _fetch_state(self, name: str, remote: Mapping[str, s3.S3Object]) -> bool:
        """Download a state, its previews and candidates; return False, with a warning, if it is damaged."""
        unfinished = self.folder / f".{name}.fetched"
        try:
            s3.download(remote[f"{name}/{MANIFEST}"], unfinished / MANIFEST)
            files = Manifest.model_validate_json((unfinished / MANIFEST).read_bytes()).files
            for file in _FILES:
                path = f"{name}/{file}"
                s3.download(remote[path], unfinished / file, files[path].sha256)
            checkpoint.verify(unfinished)  # it may have been damaged before it was copied
        except s3.UnreachableError:  # the state may be whole, and the one before cannot be fetched either
            raise
        except (DataError, CheckpointError, ValidationError, KeyError) as error:
            message = "%s/%s cannot be used (%s); going back to the state before"
            logger.warning(message, self.url, name, one_line(error))
            return False
        self._fetch_kept(files, remote)
        (unfinished / MANIFEST).unlink()
        shutil.rmtree(self.folder / name, ignore_errors=True)
        unfinished.rename(self.folder / name)
        print(f"{self.folder / name}: fetched from {self.url}", flush=True)
        return True

    def _fetch_kept(self, files: Mapping[str, FileRecord], remote: Mapping[str, s3.S3Object]) -> None:
        folders = tuple(pattern.partition("/")[0] + "/" for pattern in KEPT)
        for path in (path for path in files if path.startswith(folders) and s3.is_safe(path)):
            with suppress(DataError, KeyError):  # a missing one does not stop the training
                if not (self.folder / path).exists():
                    s3.download(remote[path], self.folder / path, files[path].sha256)

    def _watch(self) -> None:
        while not self._closing.wait(POLL):
            self._copy_newest()
        self._tried = ""
        self._copy_newest()

    def _copy_newest(self) -> None:
        name = max((path.name for path in self.folder.glob("step-*")), default="")
        if name in ("", self._copied, self._tried):
            return
        self._tried = name  # after a failure the next try is with the next state
        if not checkpoint.is_whole(self.folder / name):  # the training says so, and goes on from another
            return
        try:
            self._copy(name)
        except Exception as error:
            if not self._cancelled.is_set():
                self._warn(error)

    def _copy(self, name: str) -> None:
        """Upload a state, previews and candidates, the manifest last; then delete older states on S3."""
        remote = {item.path for item in s3.find_objects(self.url)}
        staged = self.folder / ".copied"
        shutil.rmtree(staged, ignore_errors=True)
        with suppress(FileNotFoundError):  # the training has deleted this state, so there is a newer one
            for file in _FILES:  # the links stay when the training deletes the state
                link_or_copy(self.folder / name / file, staged / file)
            if f"{name}/{MANIFEST}" in remote:  # that state was damaged, and is trained again
                s3.delete(f"{self.url}/{name}/{MANIFEST}")
            self._copy_kept(name)
            files = {f"{name}/{file}": self._upload(staged / file, f"{name}/{file}") for file in _FILES}
            manifest = Manifest(format=1, files={**self._kept, **files})
            (staged / MANIFEST).write_text(manifest.model_dump_json(indent=1))
            self._upload(staged / MANIFEST, f"{name}/{MANIFEST}")
            self._copied = name
            self._delete_before(name, remote)
        shutil.rmtree(staged, ignore_errors=True)

    def _copy_kept(self, name: str) -> None:
        """Upload previews and candidates up to a state's step. They are complete once the state is there."""
        for path in sorted(path for pattern in KEPT for path in self.folder.glob(pattern)):
            kept = path.relative_to(self.folder).as_posix()
            if _step(path.stem) <= _step(name) and kept not in self._kept:
                self._kept[kept] = self._upload(path, kept)

    def _upload(self, path: Path, name: str) -> FileRecord:
        sha256 = s3.upload(path, f"{self.url}/{name}", self._cancelled.is_set)
        return FileRecord(size=path.stat().st_size, sha256=sha256)

    def _delete_before(self, name: str, remote: Collection[str]) -> None:
        """Delete all but the newest `checkpoint.KEEP` states, of each the manifest first."""
        kept = sorted(state for state in _complete(remote) if state < name)[1 - checkpoint.KEEP :]
        for path in sorted(remote):  # capital letters, such as the manifest's, sort first
            state = path.partition("/")[0]
            if state.startswith("step-") and state < name and state not in kept:
                s3.delete(f"{self.url}/{path}")

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "training states are not copied to %s: training goes on, and each new state is tried again. "
                "Correct %s, or: %s",
                redact(self.url),
                VARIABLE,
                one_line(error),
            )


def _complete(paths: Collection[str]) -> set[str]:
    """Return the names of the states that have a manifest."""
    return {
        path.partition("/")[0] for path in paths if path.startswith("step-") and path.endswith(f"/{MANIFEST}")
    }


def _step(name: str) -> int:
    return int(name.partition("-")[2])
