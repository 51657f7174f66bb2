"""Whether a server does its work: one quick question to each."""

from __future__ import annotations

import base64
import http.client
import json
import urllib.request
from collections.abc import Mapping
from datetime import datetime

from domainstudio.storage import s3
from services.layout import BUCKETS, POOL

_PATIENCE = 5.0
"""Seconds for the answer."""


def has_buckets(environment: Mapping[str, str]) -> bool:
    """Tell whether the S3 server of these AWS variables holds our buckets."""
    return s3.buckets(environment, _PATIENCE) >= {*BUCKETS}


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
