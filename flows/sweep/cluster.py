"""Ray: a cluster to connect to or to start here, and trials that it runs, each on a share of a GPU.

Ray Tune (Ray 2.60) does not serve here: Ctrl-C kills its trials before they can close their runs in MLflow,
and with an address `ray://` its callbacks run on the cluster, so that nothing of a sweep would be shown or
kept here before all of it has ended. Prefect's task runner for Ray (prefect-ray 0.6) does not serve either:
it leaves tasks running when the flow is cancelled, and each task needs Prefect's server and its password.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainstudio.errors import ConfigError, DomainStudioError, MissingExtraError
from domainstudio.tracking.server import tracking_uri
from flows.run.gpus import visible_devices
from flows.sweep import shipping, worker
from flows.sweep.order import Order, Record, write

if TYPE_CHECKING:
    from ray import ObjectRef

    from domainstudio.config import SweepSettings

GRACE_SECONDS = 10.0
"""How long trials have to end by themselves, before their processes are killed."""
HANDED_ON = ("AWS_", "DOMAINSTUDIO_", "HF_", "MLFLOW_")
"""Environment variables with these prefixes are passed on to the nodes."""
PACKAGES = ("domainstudio", "flows")
"""Code that is sent to the nodes."""


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


def _prepare() -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not any(name.startswith("RAY_AUTH_") for name in os.environ):
        # Otherwise Ray writes a token into the home folder.
        os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})


def _connect(address: str, gpus: int | None) -> None:
    import ray

    root = Path(__file__).parents[2]
    code = {"py_modules": [str(root / name) for name in PACKAGES], "excludes": ["**/__pycache__/"]}
    options: dict[str, Any] = {"num_gpus": gpus or len(visible_devices()) or 1, "include_dashboard": False}
    own = address == "local"
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env=code,
            **(options if own else {}),
        )
    except Exception as error:
        remedy = "start the sweep again" if own else "correct RAY_ADDRESS, or unset it"
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"Ray at {address} does not answer: {remedy}. {reason}") from error
    finally:
        if threading.current_thread() is threading.main_thread():  # Ray replaces Prefect's by its own
            signal.signal(signal.SIGTERM, handler)


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
    if any(n.get("GPU", 0) >= settings.gpus and n.get("CPU", 0) >= settings.cpus for n in nodes):
        return None
    return (
        f"no node of the cluster has {settings.gpus:g} GPU and {settings.cpus:g} CPUs: trials wait until one "
        "joins. Lower the sweep's gpus or cpus, or add a node"
    )


class Running:
    """Trials that the cluster runs or has queued.

    Args:
        orders: the trials.
        settings: what each needs, and whether inputs are sent to the nodes.
        root: the project's root.
    """

    def __init__(self, orders: Sequence[Order], settings: SweepSettings, root: Path) -> None:
        import ray

        # One call for each process: what a trial leaves in a GPU's memory ends with it.
        task = ray.remote(max_calls=1)(worker.run)
        variables = ray.put(_variables(root))  # no log of Ray's shows an object's contents
        archives = shipping.send(orders) if settings.send_inputs else {}
        needs = {"num_gpus": settings.gpus, "num_cpus": settings.cpus, "max_retries": settings.retries}
        self._orders: dict[ObjectRef, Order] = {
            task.options(name=order.run.name, **needs).remote(
                order, variables, archives.get(order.key, {})
            ): order
            for order in orders
        }

    def __len__(self) -> int:
        """Return the number of trials that have not ended."""
        return len(self._orders)

    def ended(self) -> Iterator[tuple[Order, Record | None, str]]:
        """Yield the trials that have ended since the last call: the record, which is kept here, or an error.

        It does not wait: a signal that arrives while Ray waits becomes a SystemError.
        """
        import ray

        for reference in self._wait(0)[0]:
            order = self._orders.pop(reference)
            try:
                record, grid = ray.get(reference)
            except (ray.exceptions.RayError, DomainStudioError) as error:
                yield order, None, _reason(error)
            else:
                write(record, grid)
                yield order, record, ""

    def cancel(self) -> None:
        """End all trials: as by Ctrl-C, and after `GRACE_SECONDS` by killing their processes."""
        import ray

        left = list(self._orders)
        for force, seconds in ((False, GRACE_SECONDS), (True, 2.0)):
            for reference in left:
                ray.cancel(reference, force=force)
            left = self._wait(seconds)[1]

    def _wait(self, seconds: float) -> tuple[list[ObjectRef], list[ObjectRef]]:
        """Wait for all trials; return those that have ended, and those that have not."""
        import ray

        if not (left := list(self._orders)):
            return [], []
        ended, others = ray.wait(left, num_returns=len(left), timeout=seconds, fetch_local=False)
        return ended, others


def _variables(root: Path) -> dict[str, str]:
    """Return the environment variables that trials get."""
    own = {name: value for name, value in os.environ.items() if name.startswith(HANDED_ON)}
    own.pop("MLFLOW_RUN_ID", None)
    return {"MLFLOW_TRACKING_URI": tracking_uri(root), **own}


def _reason(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    text = str(cause).strip() or type(cause).__name__
    return text if isinstance(cause, DomainStudioError) else f"{type(cause).__name__}: {text}"
