"""Origins of images: a folder, an `s3://bucket/prefix`, or a `.yaml` that describes a demo domain.

Every origin yields the same listing, so that reading, checking and packing know none of them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from domainstudio.errors import DataError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})

OTHER_IMAGE_SUFFIXES = frozenset(
    {".avif", ".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".dng", ".cr2", ".nef", ".arw", ".exr"}
)
"""Images that are not read. They are refused, not ignored, so that a photograph is never lost silently."""

CAPTION_SUFFIX = ".txt"

STRAY_NAMES = frozenset({"thumbs.db", "desktop.ini", "__macosx"})

MAX_FILE_BYTES = 256 * 2**20
"""Larger files are refused before they are read."""


@dataclass(frozen=True)
class Candidate:
    """A file that is meant as an image, not read yet.

    Attributes:
        id: Name, unique in its origin.
        origin: File or URL, for messages and the manifest.
        read: Returns the file's bytes; may raise DataError, with the reason alone.
        rasterize: Turns those bytes into a PNG's, given the resolution; None where they are an image.
        caption: Returns the text that describes it; may raise DataError, with the reason alone.
        label: Class, or None.
        codepoint: The emoji's code points, or None.
        keywords: Further words for what it shows.
    """

    id: str
    origin: str
    read: Callable[[], bytes]
    rasterize: Callable[[bytes, int], bytes] | None = None
    caption: Callable[[], str] = str
    label: str | None = None
    codepoint: str | None = None
    keywords: tuple[str, ...] = ()


@dataclass(frozen=True)
class Listing:
    """What an origin holds, sorted by name (a demo domain: in Unicode's order).

    Attributes:
        candidates: The files that are meant as images.
        ignored: Stray files.
        licence: SPDX name of the images' licence, where known.
        attribution: What the licence asks to be said, where known.
        keep_repeats: Whether a repeated image is wanted rather than refused.
    """

    candidates: tuple[Candidate, ...]
    ignored: tuple[str, ...] = ()
    licence: str | None = None
    attribution: str | None = None
    keep_repeats: bool = False


@dataclass(frozen=True)
class Entry:
    """One file or object of a folder or prefix.

    Attributes:
        path: Relative to the origin, with `/` between its parts.
        origin: File or URL.
        size: Bytes.
        read: Returns the bytes.
        fault: Why it must not be read, or None.
        folder: It is a link to a folder, which is not followed.
    """

    path: str
    origin: str
    size: int
    read: Callable[[], bytes]
    fault: str | None = None
    folder: bool = False

    @property
    def kind(self) -> Literal["image", "caption", "stray"]:
        """What its name says it is."""
        path = PurePosixPath(self.path)
        if any((part.startswith(".") and part != "..") or part.lower() in STRAY_NAMES for part in path.parts):
            return "stray"
        if path.suffix.lower() in IMAGE_SUFFIXES | OTHER_IMAGE_SUFFIXES or self.folder:
            return "image"
        return "caption" if path.suffix.lower() == CAPTION_SUFFIX else "stray"

    def contents(self) -> bytes:
        """Read it.

        Raises:
            DataError: it must not or cannot be read. The message is the reason alone.
        """
        suffix = PurePosixPath(self.path).suffix.lower()
        if self.fault:
            raise DataError(self.fault)
        if suffix in OTHER_IMAGE_SUFFIXES:
            raise DataError(f"{suffix} files are not read. Convert it to PNG or JPEG")
        if self.size > MAX_FILE_BYTES:
            raise DataError(f"too large: {self.size:,} bytes, at most {MAX_FILE_BYTES:,}. Shrink it")
        try:
            return self.read()
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror or error})") from error

    def text(self) -> str:
        """Read a caption: UTF-8, without surrounding white space.

        Raises:
            DataError: as `contents`, or it is not UTF-8.
        """
        try:
            return self.contents().decode("utf-8-sig").strip()
        except (DataError, UnicodeDecodeError) as error:
            raise DataError(f"its caption {self.origin} is not usable: {error}") from error


def list_origin(origin: str) -> Listing:
    """List the images of an origin without reading them.

    Raises:
        DataError: the origin does not exist, cannot be listed, or holds no image file.
        MissingExtraError: it needs a package that is not installed.
    """
    if origin.startswith("s3://"):
        listing = _classify(_s3_entries(origin))
    elif "://" in origin:
        raise DataError(
            f"{origin} is no usable origin: give a folder, an s3://bucket/prefix or a demo's .yaml"
        )
    elif origin.lower().endswith((".yaml", ".yml")):
        from domainstudio.demo.emoji import list_demo

        listing = list_demo(Path(origin))
    else:
        listing = _classify(_folder_entries(Path(origin)))
    if not listing.candidates:
        found = f"; it has only {', '.join(listing.ignored[:5])}" if listing.ignored else ""
        raise DataError(
            f"{origin} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}){found}. Put some there"
        )
    return listing


def _classify(entries: Iterable[Entry]) -> Listing:
    """Sort entries into images and strays, and give each image its caption sidecar."""
    ordered = sorted(entries, key=lambda entry: entry.path)
    sidecars = {entry.path: entry for entry in ordered if entry.kind == "caption"}
    candidates, ignored = [], [entry.origin for entry in ordered if entry.kind == "stray"]
    for entry in (entry for entry in ordered if entry.kind == "image"):
        path = PurePosixPath(entry.path)
        sidecar = sidecars.get(str(path.with_suffix(CAPTION_SUFFIX)))
        candidates.append(
            Candidate(
                id=entry.path,
                origin=entry.origin,
                read=entry.contents,
                caption=sidecar.text if sidecar else str,
                label=str(path.parent) if len(path.parts) > 1 else None,
            )
        )
    images = {str(PurePosixPath(candidate.id).with_suffix(CAPTION_SUFFIX)) for candidate in candidates}
    ignored += [sidecar.origin for path, sidecar in sidecars.items() if path not in images]
    return Listing(tuple(candidates), tuple(sorted(ignored)))


def _folder_entries(root: Path) -> Iterator[Entry]:
    if not root.exists():
        raise DataError(f"{root} does not exist: correct the path, or put the images there")
    if not root.is_dir():
        raise DataError(f"{root} is a file, not a folder of images: name the folder")
    for folder, subfolders, files in os.walk(root, onerror=_cannot_list):
        links = [name for name in subfolders if Path(folder, name).is_symlink()]
        for name in [*files, *links]:
            yield _folder_entry(Path(folder, name), root)


def _cannot_list(error: OSError) -> None:
    raise DataError(
        f"{error.filename} cannot be listed ({error.strerror}): correct its permissions"
    ) from error


def _folder_entry(path: Path, root: Path) -> Entry:
    fault = None
    size, folder = 0, False
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
        size, folder = real.stat().st_size, stat.S_ISDIR(mode)
        if not real.is_relative_to(root.resolve()):
            fault = "a link that leaves the folder. Copy the file itself there"
        elif folder:
            fault = "a link to a folder. Copy the folder itself there, or remove the link"
        elif not stat.S_ISREG(mode):
            fault = "not a regular file. Remove it"
    except (OSError, RuntimeError) as error:
        fault = f"a link that leads nowhere ({error})" if path.is_symlink() else f"cannot be read ({error})"
    name = path.relative_to(root).as_posix()
    printable = name.encode("utf-8", "backslashreplace").decode()
    if printable != name:
        fault = "its name is not UTF-8. Rename it"
    return Entry(printable, f"{root.as_posix()}/{printable}", size, path.read_bytes, fault, folder)


def _s3_entries(url: str) -> Iterator[Entry]:
    from domainstudio.storage import s3

    for item in s3.list_objects(url):
        fault = None if s3.is_safe(item.path) else "its key is not a plain path. Rename the object"
        yield Entry(item.path, item.url, item.size, item.read, fault)
