"""Origins of images: folders, and every kind for which the caller brings a lister.

Every lister returns the same `Listing`, so that reading, checking and packing do not depend on the origin.
"""

from __future__ import annotations

import os
import posixpath
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

from domainstudio.errors import DataError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})

OTHER_IMAGE_SUFFIXES = frozenset(
    {".avif", ".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".dng", ".cr2", ".nef", ".arw", ".exr"}
)
"""Images that are not read. They are refused, not ignored, so that a photograph is never lost silently."""

CAPTION_SUFFIX = ".txt"

STRAY_NAMES = frozenset({"thumbs.db", "desktop.ini", "__macosx"})

_JOINERS = "\u200c\u200d"

MAX_FILE_BYTES = 256 * 2**20
"""Larger files are refused before they are read."""


@dataclass(frozen=True)
class Candidate:
    """A file that is meant as an image, not read yet.

    Attributes:
        id: Name, unique in its origin.
        origin: File or URL, for messages and the manifest.
        read: Returns the file's bytes; may raise DataError, whose message is the reason alone.
        rasterize: Turns those bytes into a PNG, given the resolution; None where they are an image.
        caption: Returns the caption; may raise DataError, whose message is the reason alone.
        label: Class, or None.
        codepoint: The emoji's code points, or None.
        keywords: Further words for what it shows.
        attributes: Returns what is known of it, by the attribute's name.
        version: Changes with the file and its caption; empty where that is not known without reading them.
    """

    id: str
    origin: str
    read: Callable[[], bytes]
    rasterize: Callable[[bytes, int], bytes] | None = None
    caption: Callable[[], str] = str
    label: str | None = None
    codepoint: str | None = None
    keywords: tuple[str, ...] = ()
    attributes: Callable[[], Mapping[str, str]] = dict
    version: str = ""


@dataclass(frozen=True)
class Listing:
    """What an origin holds, sorted by name (a demo domain: in Unicode's order).

    Attributes:
        candidates: The files that are meant as images.
        ignored: Stray files.
        licence: SPDX name of the images' licence, where known.
        attribution: The attribution that the licence asks for, where known.
        keep_repeats: Whether repeated images are kept rather than refused.
    """

    candidates: tuple[Candidate, ...]
    ignored: tuple[str, ...] = ()
    licence: str | None = None
    attribution: str | None = None
    keep_repeats: bool = False


Lister: TypeAlias = Callable[[str], Listing]
"""Lists an origin without reading its images; raises DataError where that cannot be done."""


@dataclass(frozen=True)
class Entry:
    """One file of a folder, or one object under a prefix.

    Attributes:
        path: Relative to the origin, with `/` between its parts.
        origin: File or URL.
        size: Bytes.
        read: Returns the bytes.
        fault: Why it must not be read, or None.
        folder: Whether it is a link to a folder, which is not followed.
        version: Changes with the content, such as the time of the last change; empty if not known.
    """

    path: str
    origin: str
    size: int
    read: Callable[[], bytes]
    fault: str | None = None
    folder: bool = False
    version: str = ""

    @cached_property
    def kind(self) -> Literal["image", "caption", "stray"]:
        """The kind of file, by its name."""
        parts = self.path.split("/")
        if any((part.startswith(".") and part != "..") or part.lower() in STRAY_NAMES for part in parts):
            return "stray"
        if self.suffix in IMAGE_SUFFIXES or self.suffix in OTHER_IMAGE_SUFFIXES or self.folder:
            return "image"
        return "caption" if self.suffix == CAPTION_SUFFIX else "stray"

    @cached_property
    def suffix(self) -> str:
        """The end of the name, in small letters: `.png`."""
        return posixpath.splitext(self.path)[1].lower()

    @cached_property
    def caption_path(self) -> str:
        """The path that an image's caption has."""
        return posixpath.splitext(self.path)[0] + CAPTION_SUFFIX

    def contents(self) -> bytes:
        """Read it.

        Raises:
            DataError: it must not or cannot be read. The message is the reason alone.
        """
        if self.fault:
            raise DataError(self.fault)
        if self.suffix in OTHER_IMAGE_SUFFIXES:
            raise DataError(f"{self.suffix} files are not read. Convert it to PNG or JPEG")
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
            raise DataError(f"its caption {printable(self.origin)} is not usable: {error}") from error


def printable(text: str) -> str:
    """Return a text in which characters that steer how others are shown are escaped, as by Python.

    These are control characters, line breaks, and the formatting ones of Unicode, such as those that turn the
    direction of writing. The two joiners stay, which words of some languages and emoji need.
    """
    if text.isprintable():  # Python's word for it is stricter
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _JOINERS
        else character
        for character in text
    )


def list_origin(origin: str, listers: Mapping[str, Lister]) -> Listing:
    """List the images of an origin without reading them.

    Args:
        origin: A folder, or an origin that one of `listers` lists.
        listers: By the pattern of their origins, such as `s3://*` or `*.yaml`; the first that fits is called.

    Raises:
        DataError: the origin does not exist, cannot be listed, or holds no image file.
        MissingExtraError: it needs a package that is not installed.
    """
    fitting = [lister for pattern, lister in listers.items() if fnmatchcase(origin.lower(), pattern)]
    if not fitting and "://" in origin:
        raise DataError(f"{origin} is not a usable origin: give {', '.join(['a folder', *listers])}")
    listing = next(iter(fitting), list_folder)(origin)
    if not listing.candidates:
        found = f"; it has only {', '.join(listing.ignored[:5])}" if listing.ignored else ""
        raise DataError(
            f"{origin} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}){found}. Put some there"
        )
    return listing


def list_folder(folder: str) -> Listing:
    """List a folder and its subfolders; links are followed only inside it.

    Raises:
        DataError: it does not exist, is a file, or cannot be listed.
    """
    root = Path(folder)
    if not root.exists():
        raise DataError(f"{root} does not exist: correct the path, or put the images there")
    if not root.is_dir():
        raise DataError(f"{root} is a file, not a folder of images: name the folder")
    return listing_of(_folder_entries(root))


def listing_of(entries: Iterable[Entry]) -> Listing:
    """Sort entries into images and strays, and give each image its caption: the `.txt` of the same name."""
    ordered = sorted(entries, key=lambda entry: entry.path)
    images = {entry.caption_path for entry in ordered if entry.kind == "image"}
    captions = {entry.path: entry for entry in ordered if entry.kind == "caption" and entry.path in images}
    candidates = tuple(_candidate(entry, captions) for entry in ordered if entry.kind == "image")
    ignored = [
        printable(entry.origin) for entry in ordered if entry.kind != "image" and entry.path not in captions
    ]
    return Listing(candidates, tuple(sorted(ignored)))


def _candidate(entry: Entry, captions: Mapping[str, Entry]) -> Candidate:
    caption = captions.get(entry.caption_path)
    folder = posixpath.dirname(entry.path)
    return Candidate(
        id=printable(entry.path),
        origin=printable(entry.origin),
        read=entry.contents,
        caption=caption.text if caption else str,
        label=printable(folder) if folder else None,
        version=f"{entry.version} {caption.version if caption else ''}" if entry.version else "",
    )


def _folder_entries(root: Path) -> Iterator[Entry]:
    for folder, subfolders, files in os.walk(root, onerror=_cannot_list):
        inside = Path(folder).relative_to(root).as_posix()
        links = [name for name in subfolders if Path(folder, name).is_symlink()]
        for name in [*files, *links]:
            yield _folder_entry(Path(folder, name), name if inside == "." else f"{inside}/{name}", root)


def _cannot_list(error: OSError) -> None:
    raise DataError(
        f"{printable(str(error.filename))} cannot be listed ({error.strerror}): correct its permissions"
    ) from error


def _folder_entry(path: Path, name: str, root: Path) -> Entry:
    size, folder, fault, version = 0, False, None, ""
    try:
        link, status = path.is_symlink(), path.stat()
        size, folder = status.st_size, stat.S_ISDIR(status.st_mode)
        version = f"{status.st_ino} {size} {status.st_mtime_ns}"
        fault = _fault(path.resolve() if link else None, root, status.st_mode)
    except (OSError, RuntimeError) as error:
        fault = f"a link that leads nowhere ({error})" if path.is_symlink() else f"cannot be read ({error})"
    printable = name.encode("utf-8", "backslashreplace").decode()
    if printable != name:
        fault = "its name is not UTF-8. Rename it"
    return Entry(printable, f"{root.as_posix()}/{printable}", size, path.read_bytes, fault, folder, version)


def _fault(linked: Path | None, root: Path, mode: int) -> str | None:
    if linked is not None and not linked.is_relative_to(root.resolve()):
        return "a link that leaves the folder. Copy the file itself there"
    if stat.S_ISDIR(mode):
        return "a link to a folder. Copy the folder itself there, or remove the link"
    return None if stat.S_ISREG(mode) else "not a regular file. Remove it"
