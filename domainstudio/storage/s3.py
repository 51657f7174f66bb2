"""Files on S3, or on any server with its protocol: read in parts, verified, and fetched only if changed.

Endpoint, region and credentials come from the environment (`AWS_ENDPOINT_URL`, `AWS_PROFILE`, …) or from
boto3's files. Only this module imports boto3.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any

from domainstudio.errors import DataError, UnavailableError, needs_extra
from domainstudio.storage.files import sha256_of

CACHE = Path(".cache/s3")
"""Copies of objects that were read. It can be deleted whenever nothing runs."""

ATTEMPTS = 5
"""Attempts of each request, with growing pauses, before a transfer fails."""

PART, PARALLEL = 16 * 2**20, 8
"""Size of a part in bytes, and how many parts of a large object are read at once: 128 MiB in memory."""

_DENIED = (
    "access was denied. Ask for s3:ListBucket and s3:GetObject, to write also for s3:PutObject and "
    "s3:DeleteObject, or use other credentials"
)
_CHANGED = "the object has changed since it was listed. Start again"
_REMEDIES = {
    "NoSuchBucket": "there is no such bucket. Correct its name, or AWS_ENDPOINT_URL",
    "AccessDenied": _DENIED,
    "403": _DENIED,
    "InvalidAccessKeyId": "the server does not know the access key. Correct AWS_ACCESS_KEY_ID, or "
    "AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": "the secret key is wrong. Correct AWS_SECRET_ACCESS_KEY",
    "NoSuchKey": "the object was deleted since it was listed",
    "PreconditionFailed": _CHANGED,
    "412": _CHANGED,
}
_TEMPORARY = {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests"}
"""Error codes of a busy server, whatever the HTTP status."""


class UnreachableError(DataError, UnavailableError):
    """The server does not answer, stopped answering, or is too busy."""


@dataclass(frozen=True)
class S3Object:
    """One object under a prefix.

    Attributes:
        path: Its key without the prefix.
        url: `s3://bucket/key`.
        size: Bytes.
        read: Returns its bytes, from `CACHE` if they were read before; may raise DataError.
        etag: Changes with the content.
    """

    path: str
    url: str
    size: int
    read: Callable[[], bytes]
    etag: str = ""


def list_objects(url: str) -> Iterator[S3Object]:
    """List the objects of `s3://bucket/prefix`, however many there are.

    The prefix is a folder: `s3://bucket/ink` holds `ink/a.png` but not `ink2/a.png`. The empty objects that
    consoles create for folders are left out.

    Raises:
        DataError: the URL names no bucket, there are no credentials, the server cannot be reached or refuses,
            or nothing has that prefix.
        MissingExtraError: boto3 is not installed.
    """
    if not (found := find_objects(url)):
        raise DataError(f"{url} holds no objects: correct the prefix, or upload the images there")
    yield from found


def find_objects(url: str) -> list[S3Object]:
    """List the objects of `s3://bucket/prefix` as `list_objects` does, also if there are none.

    Raises:
        DataError: as `list_objects`.
        MissingExtraError: boto3 is not installed.
    """
    bucket, prefix = _split(url)
    prefix = f"{prefix.rstrip('/')}/" if prefix.strip("/") else ""
    client = _client(url)
    return [
        _object(item["Key"].removeprefix(prefix), f"s3://{bucket}/{item['Key']}", item["Size"], item["ETag"])
        for item in _request(url, lambda: [*_pages(client, bucket, prefix)])
        if not item["Key"].endswith("/")
    ]


def cached(item: S3Object, folder: Path = CACHE) -> Path:
    """Return a local copy of an object. It is downloaded only if the object has changed since the last time.

    A copy is found by ETag and size, and verified by SHA-256. Its name holds all three.

    Raises:
        DataError: as `download`.
    """
    place = folder / hashlib.sha256(item.url.encode()).hexdigest()[:32]
    place.mkdir(parents=True, exist_ok=True)
    version = _version(item)
    with (place / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits, and finds the copy of the first
        for copy in [path for path in place.iterdir() if path.name != "lock"]:
            if copy.name == f"{version}-{sha256_of(copy)}":
                return copy
            if not copy.name.startswith(f".{version}"):  # unfinished downloads are kept
                copy.unlink()
        fetched = place / version
        download(item, fetched)
        return fetched.rename(place / f"{version}-{sha256_of(fetched)}")


def download(item: S3Object, path: Path, sha256: str | None = None) -> None:
    """Write an object to a file, whole or not at all. Large objects are read in parallel parts.

    An interrupted download continues where it stopped, as long as the object has not changed.

    Args:
        item: The object.
        path: The file to write.
        sha256: Expected hash of the content; by default what `upload` or the server has stored with it.

    Raises:
        DataError: the server cannot be reached or refuses, or the content is another.
    """
    client = _client(item.url)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{_version(item)}-{path.name}.partial")
    with unfinished.open("ab") as file:
        _request(item.url, lambda: _append_rest(client, item, file))
    expected = sha256 or _request(item.url, lambda: _stored_checksum(client, item))
    checksum = sha256_of if len(expected) == 64 else _crc32
    if unfinished.stat().st_size != item.size or (expected and checksum(unfinished) != expected):
        unfinished.unlink()
        raise DataError(f"{item.url} is damaged: its checksum is not {expected}. Upload it again")
    unfinished.replace(path)


def upload(path: Path, url: str, cancelled: Callable[[], bool] = lambda: False) -> str:
    """Copy a file to S3 in parallel parts, unless the same content is there already.

    boto3 sends a checksum with each part for the server to compare. The SHA-256 is stored with the object.

    Args:
        path: The file.
        url: `s3://bucket/key`.
        cancelled: Asked during the upload; the upload fails once it returns True.

    Returns:
        The file's SHA-256.

    Raises:
        DataError: the server cannot be reached, or refuses.
        MissingExtraError: boto3 is not installed.
    """
    (bucket, key), client, sha256 = _split(url), _client(url), sha256_of(path)

    def check(transferred: int) -> None:
        if cancelled():
            raise DataError(f"{url}: the upload was cancelled")

    def transfer() -> None:
        if not _holds(client, bucket, key, path.stat().st_size, sha256):
            with path.open("rb") as file:
                metadata = {"Metadata": {"sha256": sha256}}
                client.upload_fileobj(file, bucket, key, ExtraArgs=metadata, Callback=check)

    _request(url, transfer)
    return sha256


def delete(url: str) -> None:
    """Delete an object; it may be missing.

    Raises:
        DataError: the server cannot be reached, or refuses.
    """
    bucket, key = _split(url)
    client = _client(url)
    _request(url, lambda: client.delete_object(Bucket=bucket, Key=key))


def buckets(environment: Mapping[str, str], timeout: float) -> set[str]:
    """Return the names of a server's buckets, or nothing if it does not answer in time or refuses.

    Args:
        environment: `AWS_ENDPOINT_URL`, `AWS_DEFAULT_REGION`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`.
        timeout: Seconds.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        region_name=environment["AWS_DEFAULT_REGION"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        config=Config(connect_timeout=timeout, read_timeout=timeout, retries={"total_max_attempts": 1}),
    )
    try:
        return {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    except (BotoCoreError, ClientError):
        return set()


def is_safe(path: str) -> bool:
    """Tell whether a key can be a relative path on any system, without empty parts or `..`.

    >>> is_safe("cats/1.png"), is_safe("../1.png"), is_safe("cats//1.png"), is_safe("c:1.png")
    (True, False, False, False)
    """
    plain = path.isprintable() and "\\" not in path and ":" not in path
    return plain and all(part not in {"", ".", ".."} for part in path.split("/"))


def _split(url: str) -> tuple[str, str]:
    """Return bucket and key of `s3://bucket/key`."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if "@" in bucket:
        raise DataError("an s3:// address names bucket and prefix only; credentials are AWS_… variables")
    if not url.startswith("s3://") or not bucket:
        raise DataError(f"{url} names no bucket: write s3://bucket/prefix")
    return bucket, key


def _client(url: str) -> Any:
    with needs_extra(url, "pipeline"):
        import boto3  # noqa: F401
    names = sorted(name for name in os.environ if name.startswith("AWS_"))
    return _request(url, lambda: _client_for(tuple((name, os.environ[name]) for name in names)))


@lru_cache(maxsize=4)
def _client_for(environment: tuple[tuple[str, str], ...]) -> Any:
    """Make a client for the present environment, which takes boto3 almost a second."""
    import boto3
    from botocore.config import Config

    retries = {"total_max_attempts": ATTEMPTS, "mode": "standard"}
    config = Config(connect_timeout=10, read_timeout=60, retries=retries)
    return boto3.Session().client("s3", config=config)


def _pages(client: Any, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        yield from page.get("Contents", ())


def _object(path: str, url: str, size: int, etag: str) -> S3Object:
    return S3Object(path, url, size, partial(_read, path, url, size, etag), etag)


def _read(path: str, url: str, size: int, etag: str) -> bytes:
    return cached(_object(path, url, size, etag)).read_bytes()


def _version(item: S3Object) -> str:
    return hashlib.sha256(f"{item.etag} {item.size}".encode()).hexdigest()[:16]


def _append_rest(client: Any, item: S3Object, file: IO[bytes]) -> None:
    """Append the missing parts in order, so that the file's length says where to continue."""
    with ThreadPoolExecutor(PARALLEL) as pool:
        while (start := file.tell()) < item.size:
            starts = range(start, min(start + PART * PARALLEL, item.size), PART)
            for content in pool.map(partial(_read_part, client, item), starts):
                file.write(content)


def _read_part(client: Any, item: S3Object, start: int) -> bytes:
    """Read one part of the listed version. boto3 verifies objects of one part itself."""
    from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

    bucket, key = _split(item.url)
    wanted = {"Bucket": bucket, "Key": key, "IfMatch": item.etag}
    if start or item.size > PART:
        wanted["Range"] = f"bytes={start}-{min(start + PART, item.size) - 1}"
    for _ in range(ATTEMPTS - 1):  # boto3 repeats requests, but not answers that break off
        body = client.get_object(**wanted)["Body"]
        with suppress(IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
            return bytes(body.read())
    return bytes(client.get_object(**wanted)["Body"].read())


def _stored_checksum(client: Any, item: S3Object) -> str:
    """Return an object's SHA-256 (hexadecimal) or CRC-32 (base64), or "" if there is none to compare."""
    if item.size <= PART:
        return ""
    bucket, key = _split(item.url)
    head = client.head_object(Bucket=bucket, Key=key, IfMatch=item.etag, ChecksumMode="ENABLED")
    if sha256 := head["Metadata"].get("sha256"):
        return str(sha256)
    crc32 = str(head.get("ChecksumCRC32", ""))
    return "" if "-" in crc32 else crc32  # one with a dash is a checksum of the parts' checksums


def _holds(client: Any, bucket: str, key: str, size: int, sha256: str) -> bool:
    from botocore.exceptions import ClientError

    try:
        head = client.head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error.response["Error"]["Code"] in ("404", "403"):  # without s3:ListBucket a missing key is 403
            return False
        raise
    return bool(head["ContentLength"] == size and head["Metadata"].get("sha256") == sha256)


def _crc32(path: Path) -> str:
    value = 0
    with path.open("rb") as file:
        while block := file.read(PART):
            value = zlib.crc32(block, value)
    return base64.b64encode(value.to_bytes(4, "big")).decode()


def _request(url: str, call: Callable[[], Any]) -> Any:
    """Call boto3. Its errors become a DataError that names the URL and the remedy."""
    from botocore import exceptions

    try:
        return call()
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
        raise DataError(
            f"{url}: no S3 credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        ) from error
    except exceptions.ClientError as error:
        raise _refusal(url, error.response, error) from error
    except (exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.IncompleteReadError) as error:
        raise UnreachableError(
            f"{url}: the server cannot be reached ({error}). Correct AWS_ENDPOINT_URL"
        ) from error
    except (exceptions.BotoCoreError, ValueError) as error:
        raise DataError(f"{url}: {error}") from error


def _refusal(url: str, response: Mapping[str, Any], error: Exception) -> DataError:
    """Return the error for a request that the server answered with one."""
    code = response.get("Error", {}).get("Code", "")
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    # 501 is permanent: the server lacks a function.
    if code in _TEMPORARY or status == 429 or (status >= 500 and status != 501):
        return UnreachableError(f"{url}: the server cannot answer now ({error}). Try again later")
    return DataError(f"{url}: {_REMEDIES.get(code, error)}")
