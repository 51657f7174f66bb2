"""Whether a server does its work: one quick question to each."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import httpx

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
        return httpx.get(url, timeout=_PATIENCE, trust_env=False).is_success  # without a proxy
    except httpx.HTTPError:
        return False


def is_online(api: str, login: str, started: float) -> bool:
    """Tell whether the Prefect server has heard from the worker since it was started.

    The server shows a worker that crashed as online for a while.

    Args:
        api: Address of the Prefect server.
        login: `user:password`.
        started: When the worker was started, in seconds since 1970.
    """
    user, _, password = login.partition(":")
    url = f"{api}/work_pools/{POOL}/workers/filter"
    try:
        answer = httpx.post(url, json={}, auth=(user, password), timeout=_PATIENCE, trust_env=False)
        workers = answer.raise_for_status().json()
    except (httpx.HTTPError, ValueError):
        return False
    heard = [each["last_heartbeat_time"] for each in workers if each["status"] == "ONLINE"]
    return any(datetime.fromisoformat(time).timestamp() >= started for time in heard)
