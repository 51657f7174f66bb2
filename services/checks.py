"""Whether a server does its work: one quick question to each."""

from __future__ import annotations

import base64
import http.client
import json
import urllib.request
from collections.abc import Mapping
from datetime import datetime

from services.layout import BUCKETS, POOL

_PATIENCE = 5.0
"""Seconds for the answer."""


def has_buckets(environment: Mapping[str, str]) -> bool:
    """Tell whether the S3 server of these AWS variables holds our buckets."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        region_name=environment["AWS_DEFAULT_REGION"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        config=Config(connect_timeout=_PATIENCE, read_timeout=_PATIENCE, retries={"total_max_attempts": 1}),
    )
    try:
        return {bucket["Name"] for bucket in client.list_buckets()["Buckets"]} >= {*BUCKETS}
    except (BotoCoreError, ClientError):
        return False


def responds(url: str) -> bool:
    """Tell whether something answers there without an error."""
    try:
        with _open(urllib.request.Request(url)):
            return True
    except (OSError, http.client.HTTPException):
        return False


def is_online(api: str, login: str, started: float) -> bool:
    """Tell whether the worker works, by the Prefect server: one that crashed seems online there for a while.

    Args:
        api: Address of the Prefect server.
        login: `user:password`.
        started: When the worker was started, in seconds since 1970: what was heard before does not count.
    """
    basic = base64.b64encode(login.encode()).decode()
    request = urllib.request.Request(
        f"{api}/work_pools/{POOL}/workers/filter",
        b"{}",
        {"Content-Type": "application/json", "Authorization": f"Basic {basic}"},
    )
    try:
        with _open(request) as answer:
            workers = json.load(answer)
    except (OSError, http.client.HTTPException, ValueError):
        return False
    heard = [
        datetime.fromisoformat(each["last_heartbeat_time"]) for each in workers if each["status"] == "ONLINE"
    ]
    return any(time.timestamp() >= started for time in heard)


def _open(request: urllib.request.Request) -> http.client.HTTPResponse:
    # Without the proxies of the environment: these servers are on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    answer: http.client.HTTPResponse = opener.open(request, timeout=_PATIENCE)
    return answer
