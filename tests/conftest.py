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
