"""Files from and to S3, or any server that speaks its protocol: in parts, checked, only what changed.

Endpoint, region and credentials are those of the environment (`AWS_ENDPOINT_URL`, `AWS_PROFILE`, …) or of
boto3's files.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any

from domainstudio.errors import DataError, MissingExtraError, UnavailableError

CACHE = Path(".cache/s3")
"""Copies of objects that were read; it can be deleted whenever nothing runs."""

ATTEMPTS = 5
"""Of each request, with growing pauses, before a transfer fails."""

PART, PARALLEL = 16 * 2**20, 8
"""Large objects are read in parts of so many bytes, so many at once: up to 128 MiB are in memory."""

_DENIED = (
    "access was denied. Ask for s3:ListBucket and s3:GetObject, to write also for s3:PutObject and "
    "s3:DeleteObject, or use other credentials"
)
_CHANGED = "the object has changed since it was listed. Start again"
_REMEDIES = {
    "NoSuchBucket": "there is no such bucket. Correct its name, or AWS_ENDPOINT_URL",
    "AccessDenied": _DENIED,
    "403": _DENIED,
    "InvalidAccessKeyId": "the access key is unknown there. Correct AWS_ACCESS_KEY_ID, or AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": "the secret key is wrong. Correct AWS_SECRET_ACCESS_KEY",
    "NoSuchKey": "the object is gone since it was listed",
    "PreconditionFailed": _CHANGED,
    "412": _CHANGED,
}


_BUSY = {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests"}
"""Codes of errors that pass by themselves, whatever their HTTP status."""


class UnreachableError(DataError, UnavailableError):
    """The server does not answer, stopped answering, or says that it cannot now."""


@dataclass(frozen=True)
class S3Object:
    """One object under a prefix.

    Attributes:
        path: Its key without the prefix.
        url: `s3://bucket/key`.
        size: Bytes.
        read: Returns its bytes, from `CACHE` if they have been read before; may raise DataError.
        etag: Changes with its content.
    """

    path: str
    url: str
    size: int
    read: Callable[[], bytes]
    etag: str = ""


def list_objects(url: str) -> Iterator[S3Object]:
    """List the objects of `s3://bucket/prefix`, whatever their number.

    The prefix is a folder: `s3://bucket/ink` holds `ink/a.png` and not `ink2/a.png`. The empty objects that
    consoles create for folders are left out.

    Raises:
        DataError: the URL names no bucket, there are no credentials, the server cannot be reached, refuses,
            or has nothing under that prefix.
        MissingExtraError: boto3 is not installed.
    """
    if not (listed := find_objects(url)):
        raise DataError(f"{url} holds no objects: correct the prefix, or upload the images there")
    yield from listed


def find_objects(url: str) -> list[S3Object]:
    """List the objects of `s3://bucket/prefix` as `list_objects` does; there may be none.

    Raises:
        DataError: as `list_objects`.
        MissingExtraError: boto3 is not installed.
    """
    bucket, prefix = _split(url)
    prefix = f"{prefix.rstrip('/')}/" if prefix.strip("/") else ""
    client = _client(url)
    return [
        _listed(item["Key"].removeprefix(prefix), f"s3://{bucket}/{item['Key']}", item["Size"], item["ETag"])
        for item in _explained(url, lambda: [*_pages(client, bucket, prefix)])
        if not item["Key"].endswith("/")
    ]


def cached(item: S3Object, folder: Path = CACHE) -> Path:
    """Return a local copy of an object, downloaded only if it has changed since the last time.

    A copy's name holds its ETag and size, by which it is found, and its SHA-256, by which it is verified.

    Raises:
        DataError: as `download`.
    """
    place = folder / hashlib.sha256(item.url.encode()).hexdigest()[:32]
    place.mkdir(parents=True, exist_ok=True)
    version = _version(item)
    with (place / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two processes the second finds what the first has fetched
        for copy in [path for path in place.iterdir() if path.name != "lock"]:
            if copy.name == f"{version}-{_sha256(copy)}":
                return copy
            if not copy.name.startswith(f".{version}"):  # a download that broke off is kept
                copy.unlink()
        fetched = place / version
        download(item, fetched)
        return fetched.rename(place / f"{version}-{_sha256(fetched)}")


def download(item: S3Object, path: Path, sha256: str | None = None) -> None:
    """Write an object to a file, large ones in parallel parts; the file is there whole or not at all.

    A download that broke off goes on where it was, as long as the object is the same.

    Args:
        item: what to read.
        path: where to write.
        sha256: of its content; by default it is compared with what `upload` or the server knows of it.

    Raises:
        DataError: the server cannot be reached, refuses, or the content is not what was expected.
    """
    client = _client(item.url)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{_version(item)}-{path.name}.partial")
    with unfinished.open("ab") as file:
        _explained(item.url, lambda: _append_rest(client, item, file))
    expected = sha256 or _explained(item.url, lambda: _known(client, item))
    checksum = _sha256 if len(expected) == 64 else _crc32
    if unfinished.stat().st_size != item.size or (expected and checksum(unfinished) != expected):
        unfinished.unlink()
        raise DataError(f"{item.url} is damaged: its checksum is not {expected}. Upload it again")
    unfinished.replace(path)


def upload(path: Path, url: str, cancelled: Callable[[], bool] = lambda: False) -> str:
    """Copy a file to S3, large ones in parallel parts, unless the same is there already.

    boto3 sends a checksum with every part, which the server compares; the SHA-256 is kept with the object.

    Args:
        path: a file.
        url: `s3://bucket/key`.
        cancelled: asked all the time; once it says yes the upload fails.

    Returns:
        The file's SHA-256.

    Raises:
        DataError: the server cannot be reached, or refuses.
        MissingExtraError: boto3 is not installed.
    """
    (bucket, key), client, sha256 = _split(url), _client(url), _sha256(path)

    def check(transferred: int) -> None:
        if cancelled():
            raise DataError(f"{url}: the upload was cancelled")

    def transfer() -> None:
        if not _holds(client, bucket, key, path.stat().st_size, sha256):
            with path.open("rb") as file:
                metadata = {"Metadata": {"sha256": sha256}}
                client.upload_fileobj(file, bucket, key, ExtraArgs=metadata, Callback=check)

    _explained(url, transfer)
    return sha256


def delete(url: str) -> None:
    """Delete an object; it may be gone already.

    Raises:
        DataError: the server cannot be reached, or refuses.
    """
    bucket, key = _split(url)
    client = _client(url)
    _explained(url, lambda: client.delete_object(Bucket=bucket, Key=key))


def is_safe(path: str) -> bool:
    """Tell whether a key can be a relative path on any system: no part climbs or is empty.

    >>> is_safe("cats/1.png"), is_safe("../1.png"), is_safe("cats//1.png"), is_safe("c:1.png")
    (True, False, False, False)
    """
    plain = path.isprintable() and "\\" not in path and ":" not in path
    return plain and all(part not in {"", ".", ".."} for part in path.split("/"))


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy where the disk has no hard links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)


def _split(url: str) -> tuple[str, str]:
    """Return bucket and key of `s3://bucket/key`."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if "@" in bucket:
        raise DataError("an s3:// address names bucket and prefix only; credentials are AWS_… variables")
    if not url.startswith("s3://") or not bucket:
        raise DataError(f"{url} names no bucket: write s3://bucket/prefix")
    return bucket, key


def _client(url: str) -> Any:
    try:
        import boto3  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f'{url} needs boto3, which is not installed: pip install "domainstudio[pipeline]"'
        ) from error
    names = sorted(name for name in os.environ if name.startswith("AWS_"))
    return _explained(url, lambda: _client_for(tuple((name, os.environ[name]) for name in names)))


@lru_cache(maxsize=4)
def _client_for(environment: tuple[tuple[str, str], ...]) -> Any:
    """Make a client of the environment as it is; that takes boto3 a good part of a second."""
    import boto3
    from botocore.config import Config

    retries = {"total_max_attempts": ATTEMPTS, "mode": "standard"}
    config = Config(connect_timeout=10, read_timeout=60, retries=retries)  # type: ignore[arg-type]
    return boto3.Session().client("s3", config=config)


def _pages(client: Any, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        yield from page.get("Contents", ())


def _listed(path: str, url: str, size: int, etag: str) -> S3Object:
    item = S3Object(path, url, size, lambda: cached(item).read_bytes(), etag)
    return item


def _version(item: S3Object) -> str:
    return hashlib.sha256(f"{item.etag} {item.size}".encode()).hexdigest()[:16]


def _append_rest(client: Any, item: S3Object, file: IO[bytes]) -> None:
    """Append what a file lacks, in order, so that its length always says how far it is."""
    with ThreadPoolExecutor(PARALLEL) as pool:
        while (start := file.tell()) < item.size:
            starts = range(start, min(start + PART * PARALLEL, item.size), PART)
            for content in pool.map(partial(_part, client, item), starts):
                file.write(content)


def _part(client: Any, item: S3Object, start: int) -> bytes:
    """Read a part of the version that was listed. Of small objects boto3 compares the checksum itself."""
    from botocore import exceptions

    bucket, key = _split(item.url)
    wanted = {"Bucket": bucket, "Key": key, "IfMatch": item.etag}
    if start or item.size > PART:
        wanted["Range"] = f"bytes={start}-{min(start + PART, item.size) - 1}"
    broken = (
        exceptions.IncompleteReadError,
        exceptions.ReadTimeoutError,
        exceptions.ResponseStreamingError,
    )
    for _ in range(ATTEMPTS - 1):
        body = client.get_object(**wanted)["Body"]
        with suppress(*broken):  # boto3 repeats requests, but not an answer that breaks off
            content: bytes = body.read()
            return content
    last: bytes = client.get_object(**wanted)["Body"].read()
    return last


def _known(client: Any, item: S3Object) -> str:
    """Return an object's SHA-256 (hexadecimal) or CRC-32 (base64), or "" where nothing remains to compare."""
    if item.size <= PART:
        return ""
    bucket, key = _split(item.url)
    head = client.head_object(Bucket=bucket, Key=key, IfMatch=item.etag, ChecksumMode="ENABLED")
    if sha256 := head["Metadata"].get("sha256"):
        return str(sha256)
    crc32 = str(head.get("ChecksumCRC32", ""))
    return "" if "-" in crc32 else crc32  # with a dash it is a checksum of the parts' checksums


def _holds(client: Any, bucket: str, key: str, size: int, sha256: str) -> bool:
    from botocore.exceptions import ClientError

    try:
        head = client.head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error.response["Error"]["Code"] in ("404", "403"):  # 403: missing, to those who must not list
            return False
        raise
    return bool(head["ContentLength"] == size and head["Metadata"].get("sha256") == sha256)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _crc32(path: Path) -> str:
    value = 0
    with path.open("rb") as file:
        while block := file.read(PART):
            value = zlib.crc32(block, value)
    return base64.b64encode(value.to_bytes(4, "big")).decode()


def _passes(status: int) -> bool:
    """Tell whether an HTTP status is of a busy or failing server; 501 is of one that lacks something."""
    return status == 429 or (status >= 500 and status != 501)


def _explained(url: str, call: Callable[[], Any]) -> Any:
    """Call; what boto3 raises becomes a DataError that names the URL and the remedy."""
    from botocore import exceptions

    try:
        return call()
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
        raise DataError(
            f"{url}: no S3 credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        ) from error
    except exceptions.ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        if code in _BUSY or _passes(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)):
            message = f"{url}: the server cannot answer now ({error}). Try again later"
            raise UnreachableError(message) from error
        raise DataError(f"{url}: {_REMEDIES.get(code, error)}") from error
    except (exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.IncompleteReadError) as error:
        raise UnreachableError(
            f"{url}: the server cannot be reached ({error}). Correct AWS_ENDPOINT_URL"
        ) from error
    except (exceptions.BotoCoreError, ValueError) as error:
        raise DataError(f"{url}: {error}") from error
