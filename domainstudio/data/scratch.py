"""Prepared images on their way into an image set: on the disk, and kept where preparing is ended."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import PIL
from tqdm import tqdm

from domainstudio.config import PrepareSettings
from domainstudio.data.origins import Candidate
from domainstudio.data.outcome import Outcome, read_candidate
from domainstudio.data.pixels import Pixels, blocks, map_rows
from domainstudio.data.workers import each

CACHE = Path(".cache/prepare")
"""Images of stages that were ended. It can be deleted whenever nothing runs."""

CHUNK = 128
"""Images that a worker reads at a time."""

_SQUARES, _BUCKETED, _CHOSEN, _JOURNAL = "squares", "bucketed", "chosen", "journal.jsonl"

Slots = Mapping[str, tuple[int, Outcome]]


@dataclass(frozen=True)
class Scratch:
    """A folder with a row of pixels for every image that was read, and a journal of what they are.

    Attributes:
        folder: Where it is.
        settings: Section `prepare` of `params.yaml`.
        buckets: Whether every image is made in its bucket too.
    """

    folder: Path
    settings: PrepareSettings
    buckets: bool

    @property
    def row(self) -> tuple[int, int, int]:
        """Shape of a square; an image in its bucket has no more pixels."""
        return 3, self.settings.resolution, self.settings.resolution

    def read(self, candidates: Sequence[Candidate]) -> list[tuple[int, Outcome]]:
        """Read images, but for those that were read before, and return their rows and outcomes."""
        kept = self._kept()
        known = [kept.get(_name(candidate)) for candidate in candidates]
        rest = [candidate for candidate, found in zip(candidates, known, strict=True) if found is None]
        first = 1 + max((slot for slot, _ in kept.values()), default=-1)
        starts = range(0, len(rest), CHUNK)
        chunks = [(first + start, rest[start : start + CHUNK]) for start in starts]
        read: list[tuple[int, Outcome]] = []
        with (
            (self.folder / _JOURNAL).open("a", encoding="utf-8") as journal,
            tqdm(
                total=len(candidates), initial=len(candidates) - len(rest), unit="image", desc="read"
            ) as bar,
        ):
            for (slot, chunk), outcomes in zip(chunks, each(partial(fill, self), chunks), strict=True):
                rows = list(enumerate(outcomes, slot))
                journal.writelines(map(_line, chunk, rows))
                journal.flush()
                read += rows
                bar.update(len(chunk))
        new = iter(read)
        return [found or next(new) for found in known]

    def squares(self, slots: Sequence[int]) -> Pixels:
        """Return the squares in these rows, with shape (N, 3, R, R), mapped from the disk."""
        path, number = self.folder / _SQUARES, max(slots) + 1
        squares = map_rows(path, self.row, number)
        if list(slots) == list(range(number)):
            return squares
        with (self.folder / _CHOSEN).open("wb") as file:
            for slot in slots:
                file.writelines(blocks(squares[slot : slot + 1]))
        return map_rows(self.folder / _CHOSEN, self.row, len(slots))

    def bucketed(self, rows: Sequence[tuple[int, Outcome]]) -> tuple[Pixels, ...]:
        """Return the images in their buckets, each with shape (3, H, W), mapped from the disk."""
        if not self.buckets:
            return ()
        length, number = _length(self.row), max(slot for slot, _ in rows) + 1
        flat = map_rows(self.folder / _BUCKETED, (length,), number)
        shapes = ((slot, (3, *outcome.bucket)) for slot, outcome in rows if outcome.bucket)
        return tuple(flat[slot, : _length(shape)].reshape(shape) for slot, shape in shapes)

    def remove(self) -> None:
        """Remove the files. What is mapped stays until nothing looks at it any more."""
        for name in (_JOURNAL, _SQUARES, _BUCKETED, _CHOSEN):
            (self.folder / name).unlink(missing_ok=True)

    def _kept(self) -> dict[str, tuple[int, Outcome]]:
        """Return what an earlier start has read, as far as its pixels are there."""
        kept: dict[str, tuple[int, Outcome]] = {}
        with suppress(FileNotFoundError), (self.folder / _SQUARES).open("rb") as squares:
            for line in (self.folder / _JOURNAL).read_text(encoding="utf-8").splitlines():
                with suppress(ValueError, KeyError, TypeError):  # the last line may be cut
                    name, slot, fields = json.loads(line)
                    bucket = tuple(fields.pop("bucket") or ()) or None
                    outcome = Outcome(**fields, bucket=bucket)
                    squares.seek(slot * _length(self.row))
                    if hashlib.sha256(squares.read(_length(self.row))).hexdigest() == outcome.pixels:
                        kept[name] = slot, outcome
        return kept


@contextmanager
def scratch_of(origin: str, settings: PrepareSettings, buckets: bool) -> Iterator[Scratch]:
    """Hold the scratch of an origin; another process that prepares the same waits.

    After an exception it stays, so that the next start goes on with it.
    """
    what = [origin, settings.model_dump(mode="json"), buckets, PIL.__version__, _code()]
    folder = CACHE / hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        scratch = Scratch(folder, settings, buckets)
        yield scratch
        scratch.remove()


def fill(scratch: Scratch, chunk: tuple[int, Sequence[Candidate]]) -> list[Outcome]:
    """Read candidates and write their pixels to the rows from the first number of `chunk` on."""
    first, candidates = chunk
    outcomes = []
    with _rows(scratch.folder / _SQUARES) as squares, _rows(scratch.folder / _BUCKETED) as bucketed:
        for slot, candidate in enumerate(candidates, first):
            outcome, prepared = read_candidate(candidate, scratch.settings, scratch.buckets)
            outcomes.append(outcome)
            if prepared is not None:
                place = slot * _length(scratch.row)
                if prepared.bucketed is not None:
                    _write(bucketed, prepared.bucketed, place)
                _write(squares, prepared.pixels, place)
    return outcomes


@contextmanager
def _rows(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write(descriptor: int, pixels: Pixels, place: int) -> None:
    rest = pixels.data.cast("B")
    while rest:
        written = os.pwrite(descriptor, rest, place)
        rest, place = rest[written:], place + written


def _name(candidate: Candidate) -> str:
    """Return a name that changes with the file; one without a version is read again by every start."""
    return f"{candidate.version} {candidate.origin}" if candidate.version else ""


def _line(candidate: Candidate, row: tuple[int, Outcome]) -> str:
    """Return the journal's line. What was refused is left out: the next start may find it mended."""
    slot, outcome = row
    if outcome.refusal is not None or not _name(candidate):
        return ""
    return json.dumps([_name(candidate), slot, asdict(outcome)]) + "\n"


def _length(shape: Sequence[int]) -> int:
    channels, height, width = shape
    return channels * height * width


def _code() -> str:
    """Return the hash of this room's code: what another version has read is not used."""
    total = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        total.update(path.read_bytes())
    return total.hexdigest()
