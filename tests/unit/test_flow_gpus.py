"""GPU slots of one machine: devices are never shared, and nobody waits for what does not exist."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from domainstudio.errors import ConfigError
from flows.run import gpus
from flows.run.commands import StoppedError
from flows.run.gpus import GpuSlots, visible_devices


@pytest.fixture(autouse=True)
def claims(tmp_path, monkeypatch):
    """Leave the machine's own GPUs alone."""
    monkeypatch.setattr(gpus, "CLAIMS", tmp_path / "claims")
    return tmp_path / "claims"


def never():
    return False


def test_devices_are_never_given_twice():
    slots, guard = GpuSlots(("0", "1", "3")), threading.Lock()
    held: set[str] = set()

    def use(number):
        """Hold slots; return whether another thread held one of them, and how many were held."""
        with slots.hold(number, never) as environment:
            devices = set(environment["CUDA_VISIBLE_DEVICES"].split(","))
            assert len(devices) == number
            with guard:
                clash = bool(devices & held)
                held.update(devices)
                seen = len(held)
            time.sleep(0.02)
            with guard:
                held.difference_update(devices)
        return clash, seen

    with ThreadPoolExecutor(12) as pool:
        clashes, seen = zip(*pool.map(use, [1, 2] * 6), strict=True)
    assert not any(clashes)
    assert max(seen) > 1


def test_flow_runs_of_one_machine_get_different_devices():
    one, other = GpuSlots(("0", "1")), GpuSlots(("0", "1"))
    with one.hold(1, never, "finetune@a of blue-fox") as first, other.hold(1, never, "sample@b") as second:
        assert first == {"CUDA_VISIBLE_DEVICES": "0"} and second == {"CUDA_VISIBLE_DEVICES": "1"}
        with pytest.raises(StoppedError), other.hold(1, lambda: True):
            pass
        whom: list[str] = []
        stopping = iter([False, False, True])
        with pytest.raises(StoppedError), other.hold(1, lambda: next(stopping), "", whom.append):
            pass
        assert whom == [f"sample@b, finetune@a of blue-fox (process {os.getpid()})"]
    with one.hold(1, never) as first:
        with pytest.raises(StoppedError), other.hold(2, lambda: True):
            pass
        with other.hold(1, never) as second:  # of which the attempt to get both has kept nothing
            assert first != second
    with other.hold(2, never) as both:
        assert {*both["CUDA_VISIBLE_DEVICES"].split(",")} == {"0", "1"}


HOLD = """
import sys
from pathlib import Path
from flows.run import gpus
gpus.CLAIMS = Path(sys.argv[1])
with gpus.GpuSlots(("MIG-a/1/0",)).hold(1, lambda: False):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_device_of_a_process_that_was_killed_is_free(claims):
    command = [sys.executable, "-c", HOLD, str(claims)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        slots = GpuSlots(("MIG-a/1/0",))
        with pytest.raises(StoppedError), slots.hold(1, lambda: True):
            pass
        process.kill()
    with slots.hold(1, never) as environment:
        assert environment == {"CUDA_VISIBLE_DEVICES": "MIG-a/1/0"}


def test_a_machine_without_gpus_runs_one_stage_at_a_time_and_names_no_device():
    slots = GpuSlots(())
    with slots.hold(1, never) as environment, slots.hold(0, never) as of_none:  # which does not queue
        assert environment == of_none == {}
        stopping = iter([False, True])
        with pytest.raises(StoppedError), slots.hold(1, lambda: next(stopping)):
            pass
    with slots.hold(1, never):
        pass


def test_count_limits_the_devices():
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
def test_a_stage_that_would_wait_for_ever_is_refused(slots, place):
    with pytest.raises(ConfigError, match=f"finetune@a wants meta.gpu 2, but {place}"):
        slots.check("finetune@a", 2)


@pytest.mark.parametrize(
    ("value", "devices"), [("", ()), ("-1", ()), ("2,5", ("2", "5")), ("MIG-x", ("MIG-x",))]
)
def test_the_devices_given_by_the_environment_are_kept(value, devices):
    assert visible_devices({"CUDA_VISIBLE_DEVICES": value}) == devices
