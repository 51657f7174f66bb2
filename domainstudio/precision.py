"""Which autocast type a device computes fast enough to be used."""

from __future__ import annotations

import logging
from functools import cache

import torch

logger = logging.getLogger(__name__)

DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The type of each precision that a setting can name."""


def autocast(mixed_precision: str, network: torch.nn.Module) -> torch.autocast:
    """Return the autocast context in which a network predicts.

    Args:
        mixed_precision: `no`, `bf16` or `fp16`; see `usable_precision`. A network with weights in half
            precision cannot compute in float32: there `no` is the type of those weights.
        network: on its device.
    """
    device = next(network.parameters()).device
    dtype = DTYPES[usable_precision(mixed_precision, device)] or half_precision(network)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def half_precision(network: torch.nn.Module) -> torch.dtype | None:
    """Return the type of a network's weights in half precision, `None` where it has none."""
    half = (p.dtype for p in network.parameters() if p.dtype in (torch.bfloat16, torch.float16))
    return next(half, None)


def usable_precision(wanted: str, device: torch.device) -> str:
    """Return the autocast type to use on a device: the wanted one, or `no` where it would only cost time.

    Without the processor's own instructions a convolution in bfloat16 takes many times as long as in
    float32, and such a processor gains no memory from it either.

    Args:
        wanted: `no`, `bf16` or `fp16`.
        device: where the networks are.
    """
    if wanted == "bf16" and device.type == "cpu" and not cpu_has_bfloat16():
        _say_once()
        return "no"
    return wanted


def cpu_has_bfloat16() -> bool:
    """Return whether oneDNN, which computes convolutions on x86 and ARM, takes bfloat16 on this processor."""
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return asked is None or bool(asked())


@cache
def _say_once() -> None:
    logger.warning("this processor has no bfloat16: float32 is used in place of mixed_precision: bf16")
