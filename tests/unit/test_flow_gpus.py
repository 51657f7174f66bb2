"""GPU slots of one machine: devices are never shared, and nobody waits for what does not exist."""

import threading
import time

import pytest

from domainstudio.errors import ConfigError
from flows.commands import StoppedError
from flows.gpus import GpuSlots, visible_devices


def never() -> bool:
    return False


def test_devices_are_never_given_twice() -> None:
    slots, guard = GpuSlots(("0", "1", "3")), threading.Lock()
    held: set[str] = set()
    most = 0

    def use(number: int) -> None:
        nonlocal most
        with slots.hold(number, never) as environment:
            devices = set(environment["CUDA_VISIBLE_DEVICES"].split(","))
            assert len(devices) == number
            with guard:
                clashes.append(bool(devices & held))
                held.update(devices)
                most = max(most, len(held))
            time.sleep(0.02)
            with guard:
                held.difference_update(devices)

    clashes: list[bool] = []
    threads = [threading.Thread(target=use, args=(1 + index % 2,)) for index in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clashes == [False] * 12
    assert most > 1


def test_a_machine_without_gpus_runs_one_stage_at_a_time_and_names_no_device() -> None:
    slots = GpuSlots(())
    with slots.hold(1, never) as environment:
        assert environment == {}
        stopping = iter([False, True])
        with pytest.raises(StoppedError), slots.hold(1, lambda: next(stopping)):
            pass
    with slots.hold(1, never):
        pass


def test_a_stage_that_needs_none_does_not_queue() -> None:
    slots = GpuSlots(())
    with slots.hold(1, never), slots.hold(0, never) as environment:
        assert environment == {}


def test_count_limits_the_devices() -> None:
    with GpuSlots(("0", "1"), 1).hold(1, never) as environment:
        assert environment == {"CUDA_VISIBLE_DEVICES": "0"}
    GpuSlots((), 2).check("finetune@a", 2)


@pytest.mark.parametrize(
    ("slots", "place"),
    [
        (GpuSlots(("0",)), "this machine has 1"),
        (GpuSlots(("0", "1"), server_limit=1), "the server's limit has 1"),
    ],
)
def test_a_stage_that_would_wait_for_ever_is_refused(slots: GpuSlots, place: str) -> None:
    with pytest.raises(ConfigError, match=f"finetune@a wants meta.gpu 2, but {place}"):
        slots.check("finetune@a", 2)


@pytest.mark.parametrize(
    ("value", "devices"), [("", ()), ("-1", ()), ("2,5", ("2", "5")), ("MIG-x", ("MIG-x",))]
)
def test_the_devices_given_by_the_environment_are_kept(value: str, devices: tuple[str, ...]) -> None:
    assert visible_devices({"CUDA_VISIBLE_DEVICES": value}) == devices
