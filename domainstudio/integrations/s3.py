"""Images from S3, or from any server that speaks its protocol.

Endpoint, region and credentials are those of the environment (`AWS_ENDPOINT_URL`, `AWS_PROFILE`, …) or of
boto3's files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from domainstudio.errors import DataError, MissingExtraError

_REMEDIES = {
    "NoSuchBucket": "there is no such bucket. Correct its name, or AWS_ENDPOINT_URL",
    "AccessDenied": "access was denied. Ask for s3:ListBucket and s3:GetObject, or use other credentials",
    "403": "access was denied. Ask for s3:ListBucket and s3:GetObject, or use other credentials",
    "InvalidAccessKeyId": "the access key is unknown there. Correct AWS_ACCESS_KEY_ID, or AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": "the secret key is wrong. Correct AWS_SECRET_ACCESS_KEY",
    "NoSuchKey": "the object is gone since it was listed",
}


@dataclass(frozen=True)
class S3Object:
    """One object under a prefix.

    Attributes:
        path: Its key without the prefix.
        url: `s3://bucket/key`.
        size: Bytes.
        read: Returns its bytes; may raise DataError.
    """

    path: str
    url: str
    size: int
    read: Callable[[], bytes]


def list_objects(url: str) -> Iterator[S3Object]:
    """List the objects of `s3://bucket/prefix`, whatever their number.

    The prefix is a folder: `s3://bucket/ink` holds `ink/a.png` and not `ink2/a.png`. The empty objects that
    consoles create for folders are left out.

    Raises:
        DataError: the URL names no bucket, there are no credentials, the server cannot be reached, refuses,
            or has nothing under that prefix.
        MissingExtraError: boto3 is not installed.
    """
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if not url.startswith("s3://") or not bucket:
        raise DataError(f"{url} names no bucket: write s3://bucket/prefix")
    prefix = f"{prefix.rstrip('/')}/" if prefix.strip("/") else ""
    client = _client(url)
    listed = _explained(url, lambda: [*_pages(client, bucket, prefix)])
    if not listed:
        raise DataError(f"{url} holds no objects: correct the prefix, or upload the images there")
    for item in listed:
        key, name = item["Key"], f"s3://{bucket}/{item['Key']}"
        if not key.endswith("/"):
            yield S3Object(key.removeprefix(prefix), name, item["Size"], partial(_read, client, bucket, key))


def is_safe(path: str) -> bool:
    """Tell whether a key can be a relative path on any system: no part climbs or is empty.

    >>> is_safe("cats/1.png"), is_safe("../1.png"), is_safe("cats//1.png"), is_safe("c:1.png")
    (True, False, False, False)
    """
    plain = path.isprintable() and "\\" not in path and ":" not in path
    return plain and all(part not in {"", ".", ".."} for part in path.split("/"))


def _client(url: str) -> Any:
    try:
        import boto3
        from botocore.config import Config
    except ImportError as error:
        raise MissingExtraError(
            f'{url} needs boto3, which is not installed: pip install "domainstudio[pipeline]"'
        ) from error
    retries = {"total_max_attempts": 5, "mode": "standard"}
    config = Config(connect_timeout=10, read_timeout=60, retries=retries)  # type: ignore[arg-type]
    return _explained(url, lambda: boto3.Session().client("s3", config=config))


def _pages(client: Any, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        yield from page.get("Contents", ())


def _read(client: Any, bucket: str, key: str) -> bytes:
    def fetch() -> bytes:
        content: bytes = client.get_object(Bucket=bucket, Key=key)["Body"].read()
        return content

    fetched: bytes = _explained(f"s3://{bucket}/{key}", fetch)
    return fetched


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
        raise DataError(f"{url}: {_REMEDIES.get(code, error)}") from error
    except (exceptions.ConnectionError, exceptions.HTTPClientError) as error:
        raise DataError(f"{url}: the server cannot be reached ({error}). Correct AWS_ENDPOINT_URL") from error
    except (exceptions.BotoCoreError, ValueError) as error:
        raise DataError(f"{url}: {error}") from error
