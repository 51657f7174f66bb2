"""One training loop for every kind of model and every method."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from numpy.typing import NDArray
from tqdm import tqdm

from domainstudio import checkpoint
from domainstudio.errors import TrainingError
from domainstudio.objective import Objective, noisy_batch
from domainstudio.sampling import sample
from domainstudio.seeding import generator

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from domainstudio.config import LossWeights, SampleSettings, TrainingSettings
    from domainstudio.models.denoiser import Denoiser

Record = Mapping[str, float]
"""One step's log: `step`, `timestamp` in ms, `seconds` of training, and the values."""

_BATCH, _NOISE, _TIMESTEP = 0, 1, 2  # what a generator is for


class _Gather(torch.autograd.Function):
    """Join all processes' tensors with gradients, so that pairs are formed over the global batch.

    The backward pass sums the processes' equal gradients and DDP averages them: the global loss's own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def _gather(x: Tensor) -> Tensor:
    joined: Tensor = _Gather.apply(x)  # type: ignore[no-untyped-call]
    return joined


class Tracker(Protocol):
    """Where a run's progress is logged. Called on the main process only."""

    def log_history(self, records: Sequence[Record]) -> None:
        """Log finished steps. After a kill the same records may come again; they must not count twice."""
        ...

    def log_image(self, image: Image.Image, name: str) -> None:
        """Log a picture under a name such as `previews/step-000100.png`."""
        ...


class Trainer:
    """Trains a model on an image set, from the last checkpoint if there is one.

    Args:
        denoiser: the model to train, in place.
        source: the frozen source model, for methods that compare with it.
        images: training images, uint8, with shape (N, 3, H, W).
        settings: the training run.
        weights: the method's loss weights.
        checkpoints: folder of this run's resumable states.
        tracker: gets each finished stretch of steps once its checkpoint is durable.
        preview: draws a picture of the averaged model's samples, kept in `checkpoints/previews/`.

    Raises:
        TrainingError: the images do not fit the model.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        images: NDArray[np.uint8],
        settings: TrainingSettings,
        weights: LossWeights,
        checkpoints: Path,
        *,
        source: Denoiser | None = None,
        tracker: Tracker | None = None,
        preview: Callable[[Denoiser], Image.Image] | None = None,
    ) -> None:
        _check_images(images, denoiser)
        self.settings, self.checkpoints, self.tracker, self.preview = settings, checkpoints, tracker, preview
        self.images = torch.from_numpy(images)
        self.accelerator = Accelerator(mixed_precision=settings.mixed_precision)
        self.denoiser = denoiser.to(self.accelerator.device)
        if settings.gradient_checkpointing:
            denoiser.network.enable_gradient_checkpointing()  # type: ignore[operator]
        self.parameters = [p for p in denoiser.network.parameters() if p.requires_grad]
        _check_full_precision(self.parameters)
        optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        constant = settings.lr_schedule == "constant"
        lr_scheduler = get_scheduler(
            "constant_with_warmup" if constant else settings.lr_schedule,
            optimizer,
            num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=settings.steps,
        )
        self.ema = EMAModel(self.parameters, decay=settings.ema_decay, foreach=True)
        denoiser.network, self.optimizer = self.accelerator.prepare(denoiser.network, optimizer)
        self.lr_scheduler = lr_scheduler
        if source is not None:
            source.to(self.accelerator.device)
        self.objective = Objective(denoiser, source, weights, self._gather, self.accelerator.autocast)
        self.step = 0
        self.history: list[Record] = []
        self._logged = 0

    def train(self) -> list[Record]:
        """Run to the last step and leave the averaged weights in the model.

        Returns:
            The history of all steps, those before an interruption included.

        Raises:
            TrainingError: a loss or a gradient is not finite; the weights are those before that step.
        """
        self._resume()
        settings, started = self.settings, time.monotonic()
        before = self.history[-1]["seconds"] if self.history else 0.0
        with tqdm(
            total=settings.steps,
            initial=self.step,
            unit="step",
            desc="train",
            disable=not self.accelerator.is_main_process,
        ) as progress:
            while self.step < settings.steps:
                values = self._step()
                self.step += 1
                now = {"timestamp": int(time.time() * 1000), "seconds": before + time.monotonic() - started}
                self.history.append({"step": self.step, **now, **values})
                progress.update()
                if self.step % 10 == 0:
                    progress.set_postfix({name: f"{values[name]:.4f}" for name in self._shown(values)})
                if settings.preview_every and self._due(settings.preview_every):
                    self._log_preview()
                if self._due(settings.checkpoint_every):
                    self._checkpoint()
        self._use_average()
        self.denoiser.network = self.accelerator.unwrap_model(self.denoiser.network, keep_fp32_wrapper=False)
        return self.history

    @cached_property
    def _network(self) -> torch.nn.Module:
        network: torch.nn.Module = self.accelerator.unwrap_model(self.denoiser.network)
        return network

    def _step(self) -> dict[str, float]:
        """Make one optimiser step and return what to log."""
        settings = self.settings
        self.denoiser.network.train()
        sums: dict[str, float] = {}
        for micro in range(settings.gradient_accumulation_steps):
            last = micro == settings.gradient_accumulation_steps - 1
            with _no_sync_unless(last, self.accelerator, self.denoiser.network):
                terms = self._micro_step(micro)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value / settings.gradient_accumulation_steps
        norm = float(self.accelerator.clip_grad_norm_(self.parameters, settings.max_grad_norm))
        if not math.isfinite(norm) and settings.mixed_precision != "fp16":  # fp16's scaler skips such steps
            raise TrainingError(self._not_finite("gradient norm", norm))
        learning_rate = self.lr_scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        self.ema.step(self.parameters)
        return {**sums, "learning_rate": learning_rate, "grad_norm": norm}

    def _micro_step(self, micro: int) -> dict[str, float]:
        settings, rank = self.settings, self.accelerator.process_index
        images = self._batch(micro)
        noise = generator(_NOISE, settings.seed, rank, self.step, micro)
        torch.manual_seed(noise.initial_seed())  # dropout draws from the global generator
        shared = generator(_TIMESTEP, settings.seed, self.step, micro)
        batch = noisy_batch(self.denoiser, images, settings, noise, shared)
        terms = self.objective(batch)
        total = self.objective.total(terms)
        logged = {"total": total, **terms}
        values = {
            name: float(value)
            for name, value in zip(logged, self._mean(torch.stack(list(logged.values()))), strict=True)
        }
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainingError(self._not_finite(f"loss term {name!r}", value))
        self.accelerator.backward(total / settings.gradient_accumulation_steps)
        return values

    def _batch(self, micro: int) -> Tensor:
        """Return this process's share of the global batch, without replacement where that is possible."""
        settings, number = self.settings, len(self.images)
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        draw = generator(_BATCH, settings.seed, self.step, micro)
        size = settings.batch_size * processes
        rounds = [torch.randperm(number, generator=draw) for _ in range(-(-size // number))]
        flips = torch.rand(size, generator=draw) < 0.5
        mine = slice(rank * settings.batch_size, (rank + 1) * settings.batch_size)
        images = self.images[torch.cat(rounds)[:size][mine]].float() / 127.5 - 1
        if settings.horizontal_flip:
            images = torch.where(flips[mine].view(-1, 1, 1, 1), images.flip(3), images)
        return images.to(self.accelerator.device)

    def _gather(self, x: Tensor) -> Tensor:
        return x if self.accelerator.num_processes == 1 else _gather(x)

    def _mean(self, values: Tensor) -> list[float]:
        mean: list[float] = self.accelerator.reduce(values.detach().float(), "mean").tolist()
        return mean

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.settings.steps

    def _state(self) -> dict[str, Any]:
        return {
            "network": self._network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "ema": self.ema.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
            "history": self.history,
        }

    def _checkpoint(self) -> None:
        """Make the state durable; only then may a tracker see the steps that led to it."""
        if self.accelerator.is_main_process:
            checkpoint.save(self.checkpoints, self.step, self._state())
            if self.tracker is not None:
                self.tracker.log_history(self.history[self._logged :])
            self._logged = self.step
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        found = checkpoint.latest(self.checkpoints)
        if found is None:
            return
        self.step, state = found
        if self.step > self.settings.steps:
            raise TrainingError(
                f"{self.checkpoints} is at step {self.step}, beyond the {self.settings.steps} asked for. "
                "Delete that folder, or ask for more steps"
            )
        self._network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        self.ema.load_state_dict(state["ema"])
        self.ema.to(self.accelerator.device)
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.history = state["history"]
        self._logged = self.step
        if self.accelerator.is_main_process:
            tqdm.write(f"going on from step {self.step} of {self.checkpoints}")
            if self.tracker is not None:  # killed between checkpoint and log, the tracker lacks some of them
                self.tracker.log_history(self.history)

    def _log_preview(self) -> None:
        if self.preview is None or not self.accelerator.is_main_process:
            return
        self.ema.store(self.parameters)
        self._use_average()
        with torch.random.fork_rng():
            image = self.preview(self.denoiser)
        self.ema.restore(self.parameters)
        name = f"previews/step-{self.step:06d}.png"
        path = self.checkpoints / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        if self.tracker is not None:
            self.tracker.log_image(image, name)

    def _use_average(self) -> None:
        if self.settings.ema_decay > 0:
            self.ema.copy_to(self.parameters)

    def _shown(self, values: Mapping[str, float]) -> list[str]:
        return [name for name in values if name not in ("learning_rate", "grad_norm")]

    def _not_finite(self, what: str, value: float) -> str:
        return (
            f"{what} is {value} at step {self.step + 1}; training stopped before it reached the "
            f"weights. Lower learning_rate (now {self.settings.learning_rate}) or the weight of that "
            "term, or use mixed_precision: no"
        )


def previewer(settings: SampleSettings, number: int = 16) -> Callable[[Denoiser], Image.Image]:
    """Return a function that draws a grid of a model's samples, from the sampling stage's own noise."""

    def preview(denoiser: Denoiser) -> Image.Image:
        from domainstudio.datasets.pictures import grid

        seeds = range(settings.seed, settings.seed + number)
        images = sample(denoiser, seeds, steps=settings.steps, mixed_precision=settings.mixed_precision)
        return grid(images, columns=8)

    return preview


def _no_sync_unless(last: bool, accelerator: Accelerator, network: torch.nn.Module) -> Any:
    return nullcontext() if last else accelerator.no_sync(network)


def _check_images(images: NDArray[np.uint8], denoiser: Denoiser) -> None:
    if not len(images):
        raise TrainingError("there are no training images")
    _, height, width = denoiser.shape
    if images.shape[2:] != (height, width):
        raise TrainingError(
            f"the images have {images.shape[2]}x{images.shape[3]} pixels and the model {height}x{width}: set "
            f"prepare.resolution to {height}"
        )


def _check_full_precision(parameters: Sequence[Tensor]) -> None:
    if any(p.dtype != torch.float32 for p in parameters):
        raise TrainingError(
            "trainable parameters must be float32: load the model in float32 and choose "
            "finetune.mixed_precision"
        )
