"""Fixtures of all tests."""

import pytest


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Let every test choose its own precision: accelerate keeps one state per process."""
    yield
    import sys

    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


@pytest.fixture
def bfloat16(monkeypatch):
    """Compute in bfloat16 where a test asks for it, however slow this processor is at that."""
    monkeypatch.setattr("domainstudio.precision.cpu_has_bfloat16", lambda: True)
