"""Ray: a cluster to connect to or to start here, and trials that it runs, each on a share of a GPU.

A plain program of Ray's, without Prefect's task runner for it (prefect-ray 0.6): that one starts a cluster of
its own where `address="auto"` is asked for, does not end its tasks when the flow is cancelled, and makes each
task a client of Prefect's server, whose address and key the nodes would need and are not given. Here only the
flow's own process talks to Prefect.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainstudio.errors import ConfigError, DomainStudioError, MissingExtraError
from flows.run.gpus import visible_devices
from flows.sweep import worker

if TYPE_CHECKING:
    from ray import ObjectRef

    from domainstudio.config import SweepSettings

GRACE_SECONDS = 10.0
"""What trials get to end by themselves, before their processes are killed."""
HANDED_ON = ("AWS_", "DOMAINSTUDIO_", "HF_", "MLFLOW_")
"""Variables with these beginnings are those of the nodes too."""
PACKAGES = ("domainstudio", "flows")
"""Sent to the nodes as they are here."""


class TrialError(DomainStudioError):
    """A trial failed; the message says why."""


@contextlib.contextmanager
def connected(address: str | None, gpus: int | None = None) -> Iterator[str]:
    """Connect to a cluster, or start one on this machine; afterwards nothing of it is left.

    Args:
        address: of a cluster: `auto` for one on this machine, `host:port`, `ray://host:10001`, or `local` to
            start one. By default `RAY_ADDRESS`, or else `local`.
        gpus: of a cluster that is started here; by default the machine's, or 1 as a place to train without.

    Yields:
        What it is, for people.

    Raises:
        ConfigError: it cannot be reached.
        MissingExtraError: Ray is not installed.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        _prepare()  # Ray reads this when it is imported
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("a sweep needs Ray: pip install 'domainstudio[sweep]'") from error

    import psutil

    this = psutil.Process()
    before = set(this.children(recursive=True))
    try:
        _connect(address, gpus)
        yield _described(address)
    finally:
        started = set(this.children(recursive=True)) - before
        ray.shutdown(wait_for_processes=True)
        for left in psutil.wait_procs(started, 2.0)[1]:  # idle workers outlive it for a while
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()


def _connect(address: str, gpus: int | None) -> None:
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, **_options(address, gpus))
    except Exception as error:
        remedy = "start the sweep again" if address == "local" else "correct RAY_ADDRESS, or unset it"
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"Ray at {address} does not answer: {remedy}. {reason}") from error
    finally:
        if threading.current_thread() is threading.main_thread():  # Ray replaces Prefect's by its own
            signal.signal(signal.SIGTERM, handler)


def _prepare() -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not any(name.startswith("RAY_AUTH_") for name in os.environ):
        # Otherwise Ray writes a token into the home folder.
        os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})


def _options(address: str, gpus: int | None) -> dict[str, Any]:
    root = Path(__file__).parents[2]
    options: dict[str, Any] = {
        "logging_level": logging.ERROR,
        "log_to_driver": False,
        "runtime_env": {
            "py_modules": [str(root / name) for name in PACKAGES],
            "excludes": ["**/__pycache__/"],
        },
    }
    if address == "local":
        number = gpus or len(visible_devices()) or 1
        options |= {"num_gpus": number, "include_dashboard": False}
    return options


def _described(address: str) -> str:
    import ray

    resources = ray.cluster_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    place = "started here" if address == "local" else f"at {address}"
    return f"Ray cluster {place}: nodes {nodes}, GPUs {resources.get('GPU', 0):g}, CPUs {resources['CPU']:g}"


def shortage(settings: SweepSettings) -> str | None:
    """Return what is wrong if no node of the cluster can take a trial; one may still come."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {"GPU": settings.gpus, "CPU": settings.cpus}
    if any(all(node.get(name, 0) >= number for name, number in wanted.items()) for node in nodes):
        return None
    return (
        f"no node of the cluster has {settings.gpus:g} GPU and {settings.cpus:g} CPUs: trials wait until one "
        "comes. Lower gpus or cpus of the sweep"
    )


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return what trials get of the variables of this process."""
    return {
        name: value
        for name, value in variables.items()
        if name.startswith(HANDED_ON) and name != "MLFLOW_RUN_ID"
    }


@dataclass(frozen=True)
class Result:
    """How a trial ended: its record and grid, or an error."""

    order: worker.Order
    record: worker.Record | None = None
    grid: bytes = b""
    error: TrialError | None = None


class Running:
    """Trials that the cluster runs or has queued.

    Args:
        orders: the trials.
        settings: what each needs.
        variables: of their environment.
        archives: the inputs, where nodes do not see the project's folder: by trial's key, and by path.
    """

    def __init__(
        self,
        orders: Sequence[worker.Order],
        settings: SweepSettings,
        variables: Mapping[str, str],
        archives: Mapping[str, Mapping[str, ObjectRef]],
    ) -> None:
        import ray

        # One call for each process: what a trial leaves in a GPU's memory ends with it.
        task = ray.remote(max_calls=1)(worker.run)
        given = ray.put(dict(variables))  # an object's contents are in no log of Ray's, a task's name is
        options = {
            "num_gpus": settings.gpus,
            "num_cpus": settings.cpus,
            "max_retries": settings.retries,
        }
        self._orders: dict[ObjectRef, worker.Order] = {}
        for order in orders:
            remote = task.options(name=order.plan.name, **options)
            self._orders[remote.remote(order, given, dict(archives.get(order.key, {})))] = order

    def __len__(self) -> int:
        """Return the number of trials that have not ended."""
        return len(self._orders)

    def ended(self) -> Iterator[Result]:
        """Yield the trials that have ended since the last call.

        It does not wait: a signal that arrives while Ray waits becomes a SystemError.
        """
        import ray

        left = list(self._orders)
        for reference in ray.wait(left, num_returns=len(left), timeout=0, fetch_local=False)[0]:
            order = self._orders.pop(reference)
            try:
                fields, grid = ray.get(reference)
                yield Result(order, worker.Record(**fields), grid)
            except (ray.exceptions.RayError, DomainStudioError) as error:
                yield Result(order, error=TrialError(_reason(error)))

    def cancel(self) -> None:
        """End all trials: as by Ctrl-C, and after `GRACE_SECONDS` by killing their processes."""
        import ray

        left = list(self._orders)
        for force, seconds in ((False, GRACE_SECONDS), (True, 2.0)):
            for reference in left:
                ray.cancel(reference, force=force)
            if left:
                left = ray.wait(left, num_returns=len(left), timeout=seconds, fetch_local=False)[1]


def _reason(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    text = str(cause).strip() or type(cause).__name__
    return text if isinstance(cause, DomainStudioError) else f"{type(cause).__name__}: {text}"
