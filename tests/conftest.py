"""Fixtures of all tests."""

import os
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the tests' workers share the cores


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Let every test choose its own precision: accelerate keeps one state per process."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


@pytest.fixture
def bfloat16(monkeypatch):
    """Compute in bfloat16 where a test asks for it, however slow this processor is at that."""
    monkeypatch.setattr("domainstudio.precision.cpu_has_bfloat16", lambda: True)
