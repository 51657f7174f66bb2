"""Steps of other trainers, written anew from what their scripts compute, to measure beside ours.

They take the same model, batch and optimiser. What costs nothing is left out: progress bars, trackers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from domainstudio.training.wavelet import high_frequency

if TYPE_CHECKING:
    from domainstudio.models.condition import Condition
    from domainstudio.models.denoiser import Denoiser


@dataclass
class Loop:
    """What both loops have in common. The batch is the training images, then as many of the prior.

    Attributes:
        denoiser: the model to train, on its device.
        images: in [-1, 1], with shape (N, 3, H, W) or, with a prior, (2N, 3, H, W).
        condition: encoded prompts of these images.
        prior: whether the second half of the batch is of the prior.
        precision: autocast's type, and that of VAE and text encoders; `None` computes in float32.
        learning_rate: of AdamW.
    """

    denoiser: Denoiser
    images: Tensor
    condition: Condition
    prior: bool = True
    precision: torch.dtype | None = None
    learning_rate: float = 5e-6
    parameters: list[torch.nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.denoiser.network.train()
        self.parameters = [p for p in self.denoiser.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.learning_rate)
        if self.precision is not None:
            for part in (self.denoiser.vae, *self.denoiser.text_encoders):
                if part is not None:
                    part.to(self.precision)

    def take_step(self) -> None:
        """Train for one step."""
        raise NotImplementedError

    def predict(self, xt: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Return the network's output."""
        device = xt.device.type
        with torch.autocast(device, self.precision or torch.bfloat16, enabled=self.precision is not None):
            return self.denoiser.predict(xt, timesteps, condition).output.float()

    def denoising_error(self, x0: Tensor, condition: Condition) -> Tensor:
        """Return the error of the predicted noise: of both halves of the batch, and their sum."""
        schedule = self.denoiser.schedule
        noise = torch.randn_like(x0)
        timesteps = torch.randint(schedule.num_train_timesteps, (len(x0),), device=x0.device)
        output = self.predict(schedule.add_noise(x0, noise, timesteps), timesteps, condition)
        truth = schedule.true_output(x0, noise, timesteps)
        halves = zip(output.chunk(1 + self.prior), truth.chunk(1 + self.prior), strict=True)
        return torch.stack([functional.mse_loss(*each) for each in halves]).sum()


@dataclass
class DiffusersLoop(Loop):
    """Diffusers' `examples/dreambooth/train_dreambooth.py` with its defaults.

    Images and prompts are encoded in every step, gradients are clipped.

    Attributes:
        prompts: of each image; without them `condition` is taken.
    """

    prompts: Sequence[str] = ()

    def take_step(self) -> None:
        """Train for one step."""
        with torch.no_grad():
            encoded = self.denoiser.encode(self.images)
            x0 = self.denoiser.x0(encoded, torch.Generator().manual_seed(0))
            condition = self.denoiser.condition(self.prompts) if self.prompts else self.condition
        self.denoising_error(x0, condition).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@dataclass
class ReleasedLoop(Loop):
    """The released text-to-image algorithm (github.com/bbzhu-jy16/DomainStudio at cc69341).

    Latents and prompts are kept. The adapted network runs twice with gradients: at one noise level for the
    terms on images, at several for the denoising error. Both halves of the first batch are decoded with
    gradients. The source network is in memory and never runs. Similarities are formed pair by pair. In every
    step a batch of other images is read from its files. Gradients are not clipped.

    Attributes:
        files: the image files of a batch.
    """

    files: Sequence[Path] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.source = self.denoiser.frozen_source()
        with torch.no_grad():
            self.encoded = self.denoiser.encode(self.images)

    def take_step(self) -> None:
        """Train for one step."""
        x0 = self.denoiser.x0(self.encoded, torch.Generator().manual_seed(0))
        adapted, prior = self._images(x0).chunk(2)
        others = self._read() if self.files else self.images
        waves = high_frequency(adapted), high_frequency(prior)
        terms = [
            _divergence(adapted, prior),
            _divergence(*waves),
            functional.mse_loss(waves[0], high_frequency(others[: len(adapted)])),
        ]
        weighted = [weight * term for weight, term in zip((100, 100, 0.1), terms, strict=True)]
        total = self.denoising_error(x0, self.condition) + torch.stack(weighted).sum()
        total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _images(self, x0: Tensor) -> Tensor:
        """Return the images that are predicted at one noise level, decoded in two halves."""
        schedule = self.denoiser.schedule
        level = torch.randint(schedule.num_train_timesteps, (1,), device=x0.device)
        noise, timesteps = torch.randn_like(x0), level.expand(len(x0))
        xt = schedule.add_noise(x0, noise, timesteps)
        output = self.predict(xt, timesteps, self.condition)
        predicted = schedule.to_x0(output, xt, timesteps)
        return torch.cat([self.denoiser.decode(half) for half in predicted.chunk(2)])

    def _read(self) -> Tensor:
        """Return a batch of images, read from their files."""
        size = self.images.shape[3], self.images.shape[2]
        pictures = (Image.open(path).convert("RGB").resize(size) for path in self.files)
        pixels = np.stack([np.asarray(picture) for picture in pictures]).transpose(0, 3, 1, 2)
        return torch.from_numpy(pixels).to(self.images.device) / 127.5 - 1


def _divergence(adapted: Tensor, other: Tensor) -> Tensor:
    rows = [functional.softmax(_similarities(images), dim=1) for images in (adapted, other)]
    return functional.kl_div(torch.log(rows[0]), rows[1], reduction="none").mean()


def _similarities(images: Tensor) -> Tensor:
    """Return the cosine similarity of each image to each other one, with shape (N, N - 1)."""
    flat = images.flatten(1)
    cosine: Callable[[Tensor, Tensor], Tensor] = functional.cosine_similarity
    return torch.stack(
        [
            torch.cat([cosine(flat[i : i + 1], flat[j : j + 1]) for j in range(len(flat)) if j != i])
            for i in range(len(flat))
        ]
    )
