"""The optimiser of a training run, and the precision of what it leaves alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers.optimization import get_scheduler

from domainstudio.errors import TrainingError, needs_extra
from domainstudio.models.lora import parts_of
from domainstudio.precision import DTYPES

if TYPE_CHECKING:
    from domainstudio.config import TrainingSettings


def make_optimizer(network: torch.nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """Return AdamW (arXiv 1711.05101) over what of a network requires gradients; one kernel per step on CUDA.

    Raises:
        MissingExtraError: `adamw8bit` is asked for and bitsandbytes is not installed.
        TrainingError: `adamw8bit` is asked for and there is no CUDA GPU.
    """
    groups = _groups(network)
    options: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        on_cuda = all(p.is_cuda for group in groups for p in group["params"])
        return torch.optim.AdamW(groups, fused=True if on_cuda else None, **options)
    if not torch.cuda.is_available():
        raise TrainingError("finetune.optimizer adamw8bit needs a CUDA GPU: choose adamw")
    with needs_extra("finetune.optimizer adamw8bit", "gpu"):
        from bitsandbytes.optim import AdamW8bit
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, **options)
    return optimizer


def make_lr_scheduler(
    optimizer: torch.optim.Optimizer, settings: TrainingSettings
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return the learning rate's warm-up and what follows it."""
    constant = settings.lr_schedule == "constant"
    scheduler: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
        "constant_with_warmup" if constant else settings.lr_schedule,
        optimizer,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=settings.steps,
    )
    return scheduler


def lower_frozen(network: torch.nn.Module, precision: str) -> None:
    """Keep what is not trained in `bf16` or `fp16`, but for text encoders, which are saved as they are."""
    denoising = next(iter(parts_of(network).values()))
    for tensor in (*denoising.parameters(), *denoising.buffers()):
        if not tensor.requires_grad and tensor.is_floating_point():
            tensor.data = tensor.data.to(DTYPES[precision])


def _groups(network: torch.nn.Module) -> list[dict[str, Any]]:
    """Return the optimiser's groups: decay would shrink a class's embedding in every step without it."""
    tables = {
        id(module.weight)
        for name, module in network.named_modules()
        if name.endswith("class_embedding") and isinstance(module, torch.nn.Embedding)
    }
    parameters = [p for p in network.parameters() if p.requires_grad]
    kept = [p for p in parameters if id(p) in tables]
    decayed = {"params": [p for p in parameters if id(p) not in tables]}
    return [decayed, {"params": kept, "weight_decay": 0.0}] if kept else [decayed]
