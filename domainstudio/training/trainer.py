"""One training loop for every kind of model and every method."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from domainstudio.data.pictures import write_png
from domainstudio.distributed import this_process
from domainstudio.errors import TrainingError
from domainstudio.models.condition import concatenate
from domainstudio.precision import usable_precision
from domainstudio.seeding import generator
from domainstudio.storage import candidates, checkpoint
from domainstudio.training.checks import check_full_precision, check_images
from domainstudio.training.compiling import compile_step
from domainstudio.training.examples import Examples, Feed
from domainstudio.training.objective import noisy_batch
from domainstudio.training.optimizer import lower_frozen, make_lr_scheduler, make_optimizer
from domainstudio.training.resting import rest
from domainstudio.training.resuming import check_agreement, check_fits, check_history, states_of
from domainstudio.training.saving import StateWriter
from domainstudio.training.sharding import is_sharded, sharded_like, sharded_moments, whole

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from domainstudio.config import TrainingSettings
    from domainstudio.models.denoiser import Denoiser
    from domainstudio.training.objective import Batch, Objective

Record = Mapping[str, float]
"""One step's log: `step`, `timestamp` in ms, `seconds` of training, and the values."""

_NO_LOSSES = ("learning_rate", "grad_norm")
_BATCH, _NOISE, _TIMESTEP, _BUCKET = 0, 1, 2, 3  # what a generator is for


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
        objective: the model to train, in place, and the loss.
        examples: the training images with their conditions; of several sizes, one for each bucket. A batch
            comes from one bucket, drawn with a probability proportional to its images.
        settings: the training run.
        checkpoints: folder of this run's resumable states.
        prior: images of the source domain for prior preservation, as many per step as training images; of the
            same sizes.
        latents: folder that keeps encoded images, for models that encode.
        tracker: gets each finished stretch of steps once its checkpoint is durable.
        preview: draws a picture of the averaged model's samples, kept in `checkpoints/previews/`.

    Raises:
        TrainingError: the images do not fit the model.
    """

    def __init__(
        self,
        objective: Objective,
        examples: Examples | Sequence[Examples],
        settings: TrainingSettings,
        checkpoints: Path,
        *,
        prior: Examples | Sequence[Examples] | None = None,
        latents: Path | None = None,
        tracker: Tracker | None = None,
        preview: Callable[[Denoiser], Image.Image] | None = None,
    ) -> None:
        if prior is None and objective.weights.uses_prior:
            raise TrainingError("the method's prior weight is above 0: give images of the source domain")
        groups = [_listed(each) for each in (examples, prior) if each is not None]
        for each in chain(*groups):
            check_images(each, objective.adapted)
        self.objective, self.denoiser, self.settings = objective, objective.adapted, settings
        self.checkpoints, self.tracker, self.preview = checkpoints, tracker, preview
        self.step = 0
        self.history: list[Record] = []
        self._logged, self._states = 0, StateWriter(checkpoints)
        precision = usable_precision(settings.mixed_precision, this_process().device)
        self.accelerator = Accelerator(mixed_precision=precision)
        # Processes that hold shards keep a whole copy beside, to draw with and to save.
        self._whole = copy.deepcopy(self.denoiser) if is_sharded(self.accelerator) else None
        self.denoiser.to(self.accelerator.device)
        pixels = objective.looks_at_pixels
        self.buckets = [
            [Feed(each, self.denoiser, settings, latents, pixels=pixels) for each in bucket]
            for bucket in zip(*groups, strict=True)
        ]
        self._prepare()

    def _prepare(self) -> None:
        """Make the optimiser, and give network and optimiser to accelerate."""
        denoiser, source, settings = self.denoiser, self.objective.source, self.settings
        if settings.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        check_full_precision(self._trained(denoiser.network).values())
        optimizer = make_optimizer(denoiser.network, settings)
        self.lr_scheduler = make_lr_scheduler(optimizer, settings)
        for model in (denoiser, source):
            if model is not None and "no" not in (
                settings.frozen_precision,
                self.accelerator.mixed_precision,
            ):
                lower_frozen(model.network, settings.frozen_precision)
        if settings.compile:
            compile_step(self.objective)
        denoiser.network, self.optimizer = self.accelerator.prepare(denoiser.network, optimizer)
        self.parameters = list(self._trained(self._network).values())
        self.ema = None
        if settings.ema_decay > 0:
            self.ema = EMAModel(self.parameters, decay=settings.ema_decay, foreach=self._whole is None)
        if source is not None:
            source.to(self.accelerator.device)
        encoders = denoiser.text_encoders
        needed = any(p.requires_grad for encoder in encoders for p in encoder.parameters())
        if not needed and self.accelerator.num_processes == 1:  # others compare all buffers before each step
            rest(encoders)

    def train(self) -> list[Record]:
        """Run to the last step and leave the averaged weights in the model.

        Returns:
            The history of all steps, those before an interruption included.

        Raises:
            TrainingError: a loss or a gradient is not finite; the weights are those before that step.
        """
        self._resume()
        try:
            self._take_steps()
        finally:  # a state that is being written when a step fails is not lost
            self._log_durable(wait=True)
        self._use_average()
        if self._whole is not None:
            self.denoiser = self._with_weights(self._whole)
        else:
            unwrapped = self.accelerator.unwrap_model(self.denoiser.network, keep_fp32_wrapper=False)
            self.denoiser.network = unwrapped
        return self.history

    def _take_steps(self) -> None:
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
                values = self.take_step()
                self.step += 1
                now = {"timestamp": int(time.time() * 1000), "seconds": before + time.monotonic() - started}
                self.history.append({"step": self.step, **now, **values})
                progress.update()
                if self.step % 10 == 0:
                    losses = ((name, value) for name, value in values.items() if name not in _NO_LOSSES)
                    progress.set_postfix({name: f"{value:.4f}" for name, value in losses})
                if settings.preview_every and self._due(settings.preview_every):
                    self._log_preview()
                if settings.candidate_every and self._due(settings.candidate_every):
                    self._keep_candidate()
                if self._due(settings.checkpoint_every):
                    self._checkpoint()
                self._log_durable(wait=False)

    @staticmethod
    def _trained(network: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in network.named_parameters() if p.requires_grad}

    def _with_weights(self, copied: Denoiser) -> Denoiser:
        """Return a whole copy of the model with the weights as they are now. All processes must take part."""
        copied.network.load_state_dict(whole(self._trained(self._network)), strict=False)
        return copied

    @cached_property
    def _network(self) -> torch.nn.Module:
        network: torch.nn.Module = self.accelerator.unwrap_model(self.denoiser.network)
        return network

    def take_step(self) -> dict[str, float]:
        """Make one optimiser step and return what to log; `train` counts, logs and keeps the steps."""
        settings = self.settings
        self.denoiser.network.train()
        sums: dict[str, Tensor] = {}
        for micro in range(settings.gradient_accumulation_steps):
            last = micro == settings.gradient_accumulation_steps - 1
            with _no_sync_unless(last, self.accelerator, self.denoiser.network):
                terms = self._micro_step(micro)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value / settings.gradient_accumulation_steps
        norm = whole(self.accelerator.clip_grad_norm_(self.parameters, settings.max_grad_norm))
        values = self._finite(sums, norm)
        learning_rate = float(self.lr_scheduler.get_last_lr()[0])
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(self.parameters)
        return {**values, "learning_rate": learning_rate}

    def _finite(self, sums: Mapping[str, Tensor], norm: Tensor) -> dict[str, float]:
        """Return the means over processes and the norm of the gradient: the step's only wait for a GPU."""
        logged = self.accelerator.reduce(torch.stack([*sums.values()]), "mean")
        found = torch.cat([logged, norm.detach().reshape(1).to(logged)]).tolist()
        values: dict[str, float] = dict(zip((*sums, "grad_norm"), found, strict=True))
        for name, value in values.items():
            skipped = name == "grad_norm" and self.settings.mixed_precision == "fp16"  # by fp16's scaler
            if not math.isfinite(value) and not skipped:
                what = "gradient norm" if name == "grad_norm" else f"loss term {name!r}"
                raise TrainingError(self._not_finite(what, value))
        return values

    def _micro_step(self, micro: int) -> dict[str, Tensor]:
        settings, rank = self.settings, self.accelerator.process_index
        noise = generator(_NOISE, settings.seed, rank, self.step, micro)
        torch.manual_seed(noise.initial_seed())  # dropout draws from the global generator
        shared = generator(_TIMESTEP, settings.seed, self.step, micro)
        batch = noisy_batch(self.denoiser, self._batch(micro, noise), settings, noise, shared)
        terms = self.objective(batch, self.accelerator.autocast)
        total = self.objective.total(terms)
        self.accelerator.backward(total / settings.gradient_accumulation_steps)
        return {name: value.detach().float() for name, value in {"total": total, **terms}.items()}

    def _batch(self, micro: int, noise: torch.Generator) -> Batch:
        """Return this process's share of the global batch, images of the prior last."""
        settings, accelerator = self.settings, self.accelerator
        processes, rank = accelerator.num_processes, accelerator.process_index
        batch, *others = (
            feed.draw(
                generator(_BATCH + 10 * index, settings.seed, self.step, micro),
                noise,
                settings.batch_size,
                processes,
                rank,
            )
            for index, feed in enumerate(self._bucket(micro))
        )
        for prior in others:
            joined = concatenate(batch.condition, prior.condition)
            batch = replace(batch, x0=torch.cat([batch.x0, prior.x0]), condition=joined)
        return batch

    def _bucket(self, micro: int) -> list[Feed]:
        """Return the feeds of one bucket: training images, then the prior's. The same in every process."""
        if len(self.buckets) == 1:
            return self.buckets[0]
        draw = generator(_BUCKET, self.settings.seed, self.step, micro)
        sizes = torch.tensor([float(len(feeds[0].examples)) for feeds in self.buckets])
        return self.buckets[int(torch.multinomial(sizes, 1, generator=draw))]

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.settings.steps

    def _parts(self) -> dict[str, Any]:
        """Return all that a step changes, by name."""
        return {
            "network": self._trained(self._network),
            "optimizer": self.optimizer,
            "lr_scheduler": self.lr_scheduler,
            "ema": self.ema or {},
            "scaler": self.accelerator.scaler or {},
        }

    def _checkpoint(self) -> None:
        state = whole({**states_of(self._parts()), "history": self.history})
        if self.accelerator.is_main_process:
            self._log_durable(wait=True)
            self._states.write(self.step, state)
        self.accelerator.wait_for_everyone()

    def _log_durable(self, *, wait: bool) -> None:
        """Show the tracker the steps that led to the last durable state; it may see no others."""
        durable = self._states.durable(wait=wait)
        if durable > self._logged:
            if self.tracker is not None:
                self.tracker.log_history(self.history[self._logged : durable])
            self._logged = durable

    def _keep_candidate(self) -> None:
        """Keep the averaged weights of what is trained, before a state of this step can be resumed from."""
        averages = self.ema.shadow_params if self.ema is not None else self.parameters
        weights = whole(dict(zip(self._trained(self._network), averages, strict=True)))
        if self.accelerator.is_main_process:
            candidates.save(self.checkpoints, self.step, weights)

    def _check(self, step: int, state: Mapping[str, Any]) -> None:
        parts = self._parts()
        if not (parts["scaler"] and state.get("scaler")):  # another precision, on another device
            del parts["scaler"]
        check_fits(state, parts, {"history", "scaler"})
        check_history(state.get("history"), step)

    def _resume(self) -> None:
        found = checkpoint.latest(self.checkpoints, self._check)
        check_agreement(found[0] if found else 0)
        if found is None:
            return
        self.step, state = found
        if self.step > self.settings.steps:
            raise TrainingError(
                f"{self.checkpoints} is at step {self.step}, beyond the {self.settings.steps} asked for. "
                "Delete that folder, or ask for more steps"
            )
        trained = self._trained(self._network)
        weights = {name: sharded_like(value, trained[name]) for name, value in state["network"].items()}
        self._network.load_state_dict(weights, strict=False)
        self.optimizer.load_state_dict(sharded_moments(state["optimizer"], self.optimizer))
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.ema is not None:
            averages = zip(state["ema"]["shadow_params"], self.parameters, strict=True)
            average = [sharded_like(value, parameter) for value, parameter in averages]
            self.ema.load_state_dict({**state["ema"], "shadow_params": average})
            self.ema.to(self.accelerator.device)
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.history, self._logged = state["history"], self.step
        if self.accelerator.is_main_process:
            tqdm.write(f"going on from step {self.step} of {self.checkpoints}")
            if self.tracker is not None:  # killed between checkpoint and log, the tracker lacks some of them
                self.tracker.log_history(self.history)

    def _log_preview(self) -> None:
        main = self.accelerator.is_main_process
        if self.preview is None or not (main or self._whole is not None):
            return
        with self._averaged() as denoiser, torch.random.fork_rng():
            image = self.preview(denoiser) if main else None
        if image is None:
            return
        name = f"previews/step-{self.step:06d}.png"
        write_png(image, self.checkpoints / name)
        if self.tracker is not None:
            self.tracker.log_image(image, name)

    @contextmanager
    def _averaged(self) -> Iterator[Denoiser]:
        """Give the model with its averaged weights, such that one process alone can draw with it."""
        if self.ema is not None:
            self.ema.store(self.parameters)
        self._use_average()
        wrapped = self.denoiser.network
        if self._whole is None:
            self.denoiser.network = self._network
            yield self.denoiser
        else:
            yield self._with_weights(self._whole).to(self.accelerator.device)
            self._whole.to("cpu")
        self.denoiser.network = wrapped
        if self.ema is not None:
            self.ema.restore(self.parameters)

    def _use_average(self) -> None:
        if self.ema is not None:
            self.ema.copy_to(self.parameters)

    def _not_finite(self, what: str, value: float) -> str:
        return (
            f"{what} is {value} at step {self.step + 1}; training stopped before it reached the "
            f"weights. Lower learning_rate (now {self.settings.learning_rate}) or the weight of that "
            "term, or use mixed_precision: no"
        )


def _no_sync_unless(last: bool, accelerator: Accelerator, network: torch.nn.Module) -> Any:
    return nullcontext() if last else accelerator.no_sync(network)


def _listed(examples: Examples | Sequence[Examples]) -> Sequence[Examples]:
    return [examples] if isinstance(examples, Examples) else examples
