"""Prepare a Prefect server for the deployments of prefect.yaml: `python -m flows.setup`.

Makes the work pools, the limits of GPUs and the automations, or brings them up to date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import httpx

from domainstudio.errors import ConfigError
from domainstudio.redaction import redact
from flows import cli, notifications, pools
from flows.run.gpus import LIMIT_NAME

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events.schemas.automations import AutomationCore

LOST_AFTER_SECONDS = 540
"""A run whose last heartbeat is older was lost with its node. prefect.yaml asks for one every 30 s."""
HEARTBEAT, ENDED = "prefect.flow-run.heartbeat", ("Completed", "Failed", "Cancelled", "Crashed")
FLOWS = ("adapt", "adapt-revision", "choose", "promote", "rollback", "sweep", "watch-targets")
OF_OUR_FLOWS: dict[str, str | list[str]] = {
    "prefect.resource.role": "flow",
    "prefect.resource.name": list(FLOWS),
}
"""Relates events to this project's flows: a server may have flows of others too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Set the server up as the command line says."""
    options = _parser().parse_args(arguments)
    return cli.run(lambda: _setup(options), "what was made stays, and the next call goes on")


def _setup(options: argparse.Namespace) -> int:
    path = options.job_variables
    given = pools.read_job_variables(path) if path else None
    try:
        lines = setup(
            options.pool, options.cluster, dict(options.gpus), options.lost_after, options.notify, given
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:  # Prefect's own are among them
        raise ConfigError(
            f"the Prefect server gave an error or no answer: {redact(str(error) or type(error).__name__)}\n"
            "Check PREFECT_API_URL, PREFECT_API_AUTH_STRING and the server"
        ) from error
    print("\n".join(lines))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("flows.setup", __doc__)
    parser.add_argument("--pool", default="local", help="work pool of processes (default: local)")
    parser.add_argument("--cluster", default="cluster", help="work pool of Kubernetes (default: cluster)")
    parser.add_argument(
        "--job-variables",
        type=Path,
        metavar="FILE",
        help="YAML with the cluster's defaults of variables in deploy/kubernetes-pool.yaml, such as `image` "
        "(default: those that the pool has)",
    )
    parser.add_argument(
        "--gpus",
        type=_limit,
        nargs="*",
        default=[],
        metavar="[CLASS=]N",
        help="the team's GPUs, or those of each class (default: 1 where there is no limit)",
    )
    parser.add_argument(
        "--lost-after", type=int, default=LOST_AFTER_SECONDS, metavar="S", help="seconds without a heartbeat"
    )
    parser.add_argument(
        "--notify",
        type=UUID,
        metavar="BLOCK",
        help="id of a notification block for failed runs and promotions "
        f"(default: one is made of the addresses in {notifications.VARIABLE})",
    )
    return parser


def _limit(text: str) -> tuple[str, int]:
    name, _, count = text.rpartition("=")
    if not count.isdigit() or int(count) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither N nor CLASS=N")
    return (f"{LIMIT_NAME}-{name}" if name else LIMIT_NAME), int(count)


def setup(
    pool: str,
    cluster: str,
    limits: Mapping[str, int],
    lost_after: int,
    notify: UUID | None = None,
    job_variables: Mapping[str, Any] | None = None,
) -> list[str]:
    """Make pools, limits and automations, or bring them up to date.

    Args:
        pool: name of the work pool of processes.
        cluster: name of the work pool of Kubernetes.
        limits: slots by name of the limit: `gpu`, or `gpu-<class>`. Empty: `gpu` is 1, if there is none yet.
        lost_after: seconds without a heartbeat after which a run is started again, on another node.
        notify: id of a notification block; by default one is made of `DOMAINSTUDIO_NOTIFY`, if that is set.
        job_variables: the cluster's defaults of the job template's variables; None: those that the pool has.

    Returns:
        A line for each.

    Raises:
        ConfigError: no lasting server is set.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        raise ConfigError("no Prefect server: set PREFECT_API_URL, such as http://127.0.0.1:4200/api")
    client = get_client(sync_client=True)
    lines = [_pool(client, pool, "process"), _pool(client, cluster, "kubernetes", job_variables)]
    for name, count in (limits or _missing(client)).items():
        client.upsert_global_concurrency_limit_by_name(name, count)
        lines.append(f"limit {name}: {count}")
    notify = notify or notifications.block()
    return lines + [_automation(client, each) for each in automations(lost_after, notify)]


def _missing(client: SyncPrefectClient) -> dict[str, int]:
    from prefect.exceptions import ObjectNotFound

    try:
        client.read_global_concurrency_limit_by_name(LIMIT_NAME)
    except ObjectNotFound:
        return {LIMIT_NAME: 1}
    return {}


def _pool(
    client: SyncPrefectClient, name: str, kind: str, job_variables: Mapping[str, Any] | None = None
) -> str:
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound

    def template(before: Mapping[str, Any]) -> dict[str, Any]:
        return pools.template(job_variables, before) if kind == "kubernetes" else {}

    try:
        found = client.read_work_pool(name)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=name, type=kind, base_job_template=template({})))
        return f"work pool {name}: made, of type {kind}"
    if found.type != kind:
        raise ConfigError(f"work pool {name} is of type {found.type}, not {kind}: choose another name")
    wanted = template(found.base_job_template)
    if wanted and found.base_job_template != wanted:
        client.update_work_pool(name, WorkPoolUpdate(base_job_template=wanted))
        return f"work pool {name}: updated"
    return f"work pool {name}: is there"


def _automation(client: SyncPrefectClient, wanted: AutomationCore) -> str:
    found = client.read_automations_by_name(wanted.name)
    if not found:
        client.create_automation(wanted)
        return f"automation {wanted.name!r}: made"
    client.update_automation(found[0].id, wanted)
    return f"automation {wanted.name!r}: up to date"


def automations(lost_after: int, notify: UUID | None) -> list[AutomationCore]:
    """Return what the server does by itself: it starts lost runs again, and notifies of failed ones.

    `retries` of a flow do not see a run that was lost with its node; an automation does.
    """
    found = [_lost_runs(lost_after)]
    return found + (notifications.automations(notify, OF_OUR_FLOWS) if notify else [])


def _lost_runs(lost_after: int) -> AutomationCore:
    from prefect.automations import AutomationCore, EventTrigger, Posture
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState

    return AutomationCore(
        name="domainstudio: start lost runs again",
        description="A run without heartbeats is started again and goes on from its last training state.",
        trigger=EventTrigger(
            after={HEARTBEAT},
            expect={HEARTBEAT, *(f"prefect.flow-run.{state}" for state in ENDED)},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            match_related=OF_OUR_FLOWS,
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=lost_after),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.SCHEDULED,
                name="AwaitingRetry",
                force=True,
                message=f"No heartbeat for {lost_after} s: its node was lost",
            )
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
