"""Teaching a small text encoder what its texts show, before a denoiser learns to read it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import nn
from torch.nn import functional

from domainstudio.seeding import generator
from domainstudio.training.steps import run_steps

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from torch import Tensor

    from domainstudio.config import TextEncoderSettings


def train_text_encoder(
    pipeline: StableDiffusionPipeline,
    texts: Sequence[Sequence[str]],
    latents: Tensor,
    settings: TextEncoderSettings,
    folder: Path,
) -> None:
    """Train a pipeline's text encoder in place, from the last checkpoint if there is one.

    Its pooled output, through a linear layer that is dropped afterwards, predicts the latents of the image
    that a text means; the loss is the mean squared error. What Stable Diffusion gets from CLIP's training on
    pairs of texts and images, a small encoder gets from this one: texts of images that look alike come to
    lie close together, and a UNet that starts from it learns to obey its prompts much sooner.

    Args:
        pipeline: holds the text encoder, on the CPU, and its tokenizer.
        texts: of each image; several are variants.
        latents: of each image, with shape (N, ...).
        settings: the training run.
        folder: for resumable states.
    """
    torch.manual_seed(settings.seed)
    text_encoder: Any = pipeline.text_encoder
    targets = latents.flatten(1)
    head = nn.Linear(text_encoder.config.hidden_size, targets.shape[1])
    parameters = [*text_encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, settings.steps // 10, settings.steps)
    pairs = torch.tensor([index for index, each in enumerate(texts) for _ in each])
    tokens = _tokens(pipeline.tokenizer, [text for each in texts for text in each])

    def take_step(step: int) -> float:
        chosen = torch.randint(len(pairs), (settings.batch_size,), generator=generator(settings.seed, step))
        predicted = head(text_encoder(tokens[chosen]).pooler_output)
        loss = functional.mse_loss(predicted, targets[pairs[chosen]])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
        return float(loss.detach())

    run_steps(
        take_step,
        {"text_encoder": text_encoder, "head": head, "optimizer": optimizer, "lr_scheduler": lr_scheduler},
        settings.steps,
        folder,
        every=settings.checkpoint_every,
        name="text encoder",
    )


def _tokens(tokenizer: Any, texts: list[str]) -> Tensor:
    """Return the texts' tokens, all of the same length: with shape (N, L)."""
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    tokens: Tensor = tokenizer(texts, max_length=tokenizer.model_max_length, **options).input_ids
    return tokens
