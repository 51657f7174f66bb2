"""Look at the targets' images on S3, and adapt what changed."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any, cast

from prefect import flow, get_run_logger
from prefect.deployments import run_deployment
from prefect.variables import Variable

from domainstudio import config
from domainstudio.storage import s3
from flows.run import workspace

DEPLOYMENT = "adapt-revision/adapt"
"""The deployment that runs when a target's images changed."""


@flow(name="watch-targets", persist_result=False)
def watch_targets(
    revision: str = "main", repository: str | None = None, deployment: str = DEPLOYMENT
) -> dict[str, list[str]]:
    """Start `deployment` for the adaptations of every target whose images on S3 are not those of last time.

    Images are compared by key, size and ETag, as S3 lists them. A Prefect variable, see `variable`, keeps
    what was seen. It is written after the run was asked for: a watch that is cut off asks again, and DVC
    then finds nothing to do.

    Args:
        revision: Branch, tag or commit whose params.yaml is read, and which is adapted.
        repository: URL or folder to clone; by default `DOMAINSTUDIO_REPOSITORY`.
        deployment: What to run.

    Returns:
        The adaptations that were started, by target.
    """
    cloned, logger = workspace.repository_of(repository), get_run_logger()
    settings = workspace.settings(cloned, revision)
    started: dict[str, list[str]] = {}
    for target, prefixes in watched(settings).items():
        adaptations = sorted(name for name, each in settings.adaptations.items() if each.target == target)
        name, digest = variable(target, cloned, revision), contents(prefixes)
        if not adaptations or (number := _new_change(name, digest)) is None:
            logger.info("%s: nothing new", target)
            continue
        run_deployment(
            deployment,
            parameters={"adaptations": adaptations, "revision": revision, "repository": repository},
            timeout=0,
            as_subflow=False,
            idempotency_key=f"{name}-{number}-{digest}",
            tags=[f"target:{target}"],
        )
        Variable.set(name, {"digest": digest, "changes": number}, overwrite=True)
        logger.info("%s changed: %s", target, ", ".join(adaptations))
        started[target] = adaptations
    return started


def _new_change(name: str, digest: str) -> int | None:
    """Return the number of a target's change, or None if its variable holds this digest already."""
    seen = cast(dict[str, Any], Variable.get(name))
    if not seen:  # counted from a start of its own, so that keys do not repeat after it was deleted
        seen = {"digest": "", "changes": int(time.time())}
        Variable.set(name, seen)
    return None if seen["digest"] == digest else seen["changes"] + 1


def variable(target: str, repository: str, revision: str) -> str:
    """Return the name of the Prefect variable that remembers a target of a revision.

    It holds a hash of them: a repository's URL may hold a token, and names know no capitals and no hyphens.
    """
    which = hashlib.sha256(json.dumps([target, repository, revision]).encode()).hexdigest()[:12]
    return f"domainstudio_{target}_{which}".lower().replace("-", "_")


def watched(settings: config.Settings) -> dict[str, list[str]]:
    """Return the S3 prefixes of every target that has any."""
    found = {
        name: [origin for origin in (target.shots, target.domain) if origin.startswith("s3://")]
        for name, target in settings.targets.items()
    }
    return {name: prefixes for name, prefixes in found.items() if prefixes}


def contents(prefixes: list[str]) -> str:
    """Return the SHA-256 of what lies under prefixes, by URL, size and ETag.

    Raises:
        DataError: the server cannot be reached, or refuses.
    """
    listed = sorted((item.url, item.size, item.etag) for url in prefixes for item in s3.find_objects(url))
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()
