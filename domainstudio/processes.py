"""The processes of a training, or of a stage that shares its work."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState


def this_process() -> PartialState:
    """Return accelerate's state of this process: its rank, its device, how many there are.

    Without an accelerator several processes speak through gloo, which accelerate does only when told.
    """
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())
