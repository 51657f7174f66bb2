"""GPU slots: which stages may run at the same time, on this machine and across a team's machines."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from domainstudio.errors import ConfigError
from flows.run.commands import StoppedError

LIMIT_NAME = "gpu"
"""Name of the global concurrency limit on a Prefect server."""
CLASS_VARIABLE = "DOMAINSTUDIO_GPU_CLASS"
"""Class of this node's GPUs, such as `h100`: its limit on the server is then `gpu-h100`."""
LEASE_SECONDS = 120.0
"""Time after which the server frees the slot of a lost node. Prefect renews a lease after three quarters of
it: the rest must be longer than a restart of the server."""
CLAIMS = Path(tempfile.gettempdir()) / f"domainstudio-gpus-{os.getuid()}"
"""Folder with a file per GPU. The flow run whose process locks the file has the GPU."""
_POLL_SECONDS = 5.0


def limit_name() -> str:
    """Return the name of the server's limit for this node's GPUs."""
    kind = os.environ.get(CLASS_VARIABLE)
    return f"{LIMIT_NAME}-{kind}" if kind else LIMIT_NAME


def visible_devices(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the ids of the GPUs that this process may use, empty without one; torch is not needed."""
    if (visible := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        return tuple(device.strip() for device in visible.split(",") if device.strip() not in ("", "-1"))
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(listed.split())


class GpuSlots:
    """Hands the machine's GPUs to stages, and queues at the server's limit `gpu` where there is one.

    Without a GPU there is one slot, or `count`. Two trainings side by side on the same cores take longer
    than one after the other, and twice the memory.

    Args:
        devices: Ids for `CUDA_VISIBLE_DEVICES`; empty on a machine without a GPU.
        count: Slots of a machine without GPUs; with GPUs, use no more than so many.
        server_limit: The server's limit; None if it has none, and slots are not taken from the server.
    """

    def __init__(
        self, devices: tuple[str, ...], count: int | None = None, server_limit: int | None = None
    ) -> None:
        self._server_limit = server_limit
        free: Sequence[str | None] = devices[:count] if devices else [None] * (count or server_limit or 1)
        self._capacity = len(free)
        self._free: list[str | None] = list(free)
        self._holders: list[str] = []
        self._changed = threading.Condition()

    def check(self, address: str, number: int) -> None:
        """Refuse a stage that would wait for ever.

        Raises:
            ConfigError: it wants more GPUs than there are.
        """
        for capacity, place in ((self._capacity, "this machine"), (self._server_limit, "the server's limit")):
            if capacity is not None and number > capacity:
                raise ConfigError(
                    f"dvc.yaml: {address} wants meta.gpu {number}, but {place} has {capacity}. Lower "
                    "meta.gpu, or give more with --gpus (of flows.setup for the server's limit)"
                )

    @contextlib.contextmanager
    def hold(
        self,
        number: int,
        stopping: Callable[[], bool],
        holder: str = "a stage",
        waits: Callable[[str], None] = lambda whom: None,
    ) -> Iterator[dict[str, str]]:
        """Wait for `number` slots, hold them, and yield the environment that names the devices.

        Args:
            number: How many.
            stopping: Tells whether to give up.
            holder: Who holds them, for those that wait.
            waits: Is told once for whom, if the slots are not free.

        Raises:
            StoppedError: `stopping` became true while waiting.
        """
        if number == 0:
            yield {}
            return
        with contextlib.ExitStack() as stack:
            told = _Once(waits)
            devices = self._take(number, stopping, stack, holder, told)
            if self._server_limit is not None:
                _queue_at_server(number, stopping, stack, told)
            named = [device for device in devices if device is not None]
            yield {"CUDA_VISIBLE_DEVICES": ",".join(named)} if named else {}

    def _take(
        self,
        number: int,
        stopping: Callable[[], bool],
        stack: contextlib.ExitStack,
        holder: str,
        told: _Once,
    ) -> list[str | None]:
        with self._changed:
            while True:
                with contextlib.ExitStack() as claims:
                    claimed = (device for device in self._free if _claim(device, claims, holder))
                    if len(taken := list(itertools.islice(claimed, number))) == number:
                        stack.enter_context(claims.pop_all())
                        break
                if stopping():
                    raise StoppedError("the flow is being stopped")
                told(lambda: ", ".join([*self._holders, *_claimants(self._free)]))
                self._changed.wait(0.5)
            for device in taken:
                self._free.remove(device)
            self._holders.append(holder)
        stack.callback(self._give_back, taken, holder)
        return taken

    def _give_back(self, devices: list[str | None], holder: str) -> None:
        with self._changed:
            self._free += devices
            self._holders.remove(holder)
            self._changed.notify_all()


class _Once:
    """Tells for whom a stage waits, once."""

    def __init__(self, waits: Callable[[str], None]) -> None:
        self._waits: Callable[[str], None] | None = waits

    def __call__(self, whom: Callable[[], str]) -> None:
        if self._waits is not None:
            self._waits(whom())
            self._waits = None


def _claimants(devices: Sequence[str | None]) -> list[str]:
    """Return who holds devices in the other flow runs of this machine, as far as they say so."""
    files = (CLAIMS / _file_name(device) for device in devices if device is not None)
    texts = (file.read_text(encoding="utf-8").strip() for file in files if file.is_file())
    return [text for text in texts if text]


def _file_name(device: str) -> str:
    return device.replace("/", "-")


def _claim(device: str | None, stack: contextlib.ExitStack, holder: str) -> bool:
    """Lock a device against the other flow runs of this machine, until `stack` or this process ends."""
    if device is None:
        return True
    CLAIMS.mkdir(exist_ok=True)
    file = stack.enter_context((CLAIMS / _file_name(device)).open("a", encoding="utf-8"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    stack.callback(file.truncate, 0)  # before the file is closed, and so unlocked
    file.truncate(0)
    file.write(f"{holder} (process {os.getpid()})")
    file.flush()
    return True


def _queue_at_server(
    number: int, stopping: Callable[[], bool], stack: contextlib.ExitStack, told: _Once
) -> None:
    from prefect.client.orchestration import get_client
    from prefect.concurrency.sync import concurrency

    name, client = limit_name(), get_client(sync_client=True)
    while not stopping():
        limit = client.read_global_concurrency_limit_by_name(name)
        # Prefect logs an error for each attempt that ends without a slot, so it is made when slots are free.
        if limit.limit - limit.active_slots >= number:
            held = concurrency(
                name,
                occupy=number,
                timeout_seconds=_POLL_SECONDS,
                lease_duration=LEASE_SECONDS,
                strict=True,
                # A server that is away for a while must not kill hours of training.
                raise_on_lease_renewal_failure=False,
            )
            with contextlib.suppress(TimeoutError):
                stack.enter_context(held)
                return
        told(lambda: f"other runs, which hold {limit.active_slots} of the {limit.limit} slots of {name}")  # noqa: B023
        time.sleep(_POLL_SECONDS)
    raise StoppedError("the flow is being stopped")


def from_server(count: int | None) -> GpuSlots:
    """Return this run's slots. A lasting server without a limit gets one of `count`.

    A temporary server's limit is not used: its leases end with it, and held slots would stay taken.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        return GpuSlots(visible_devices(), count)
    with get_client(sync_client=True) as client:
        try:
            limit = client.read_global_concurrency_limit_by_name(limit_name())
        except ObjectNotFound:
            if count is None:
                return GpuSlots(visible_devices())
            client.upsert_global_concurrency_limit_by_name(limit_name(), count)
            limit = client.read_global_concurrency_limit_by_name(limit_name())
    return GpuSlots(visible_devices(), count, limit.limit if limit.active else None)
