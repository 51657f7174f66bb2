"""Flux.2 klein: flow matching by a transformer of packed latents, told by three layers of a Qwen3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch.nn import functional

from domainstudio.errors import CheckpointError
from domainstudio.models.flow_schedule import FlowSchedule
from domainstudio.models.language_model import LanguageModelDenoiser, ToldNetwork
from domainstudio.models.latents import draw_unscaled
from domainstudio.models.schedule import at_least_float32
from domainstudio.models.text_parts import check_latents, check_part, check_text

if TYPE_CHECKING:
    from torch import Tensor

    from domainstudio.models.schedule import Schedule
    from domainstudio.models.text_parts import Parts

LAYERS = 3
"""Hidden states of the language model that are joined along the channels."""


class ConditionedFlux2(ToldNetwork):
    """Flux.2's transformer of tokens with places, and the language model."""

    def denoise(self, xt: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Return the velocity; each position of xt is a token."""
        texts = condition["prompt_embeds"]
        sides, text_sides = (1, *xt.shape[2:], 1), (1, 1, 1, texts.shape[1])
        places, text_places = (
            torch.cartesian_prod(*[torch.arange(side, device=xt.device) for side in axes])
            for axes in (sides, text_sides)
        )
        output: Tensor = self.transformer(
            hidden_states=xt.flatten(2).transpose(1, 2),
            timestep=timesteps / 1000,
            encoder_hidden_states=texts,
            img_ids=places,
            txt_ids=text_places,
        ).sample
        return output.transpose(1, 2).reshape(xt.shape)


class Flux2Denoiser(LanguageModelDenoiser):
    """A Flux.2 klein pipeline (see `TextToImageDenoiser`): x0 is latents packed 2x2 along the channels."""

    network_class = ConditionedFlux2
    parts: ClassVar[Mapping[str, Parts]] = {
        "Flux2KleinPipeline": {
            "transformer": "Flux2Transformer2DModel",
            "vae": "AutoencoderKLFlux2",
            "scheduler": None,
            "tokenizer": None,
            "text_encoder": "Qwen3ForCausalLM",
        }
    }
    pipelines = frozenset(parts)
    packed = 2

    @classmethod
    def check(cls, pipeline: Any, where: str) -> None:
        """Refuse parts that belong to different models, and a model distilled to few steps."""
        check_part(pipeline, "transformer", "Flux2Transformer2DModel", where)
        check_part(pipeline, "vae", "AutoencoderKLFlux2", where)
        config = pipeline.transformer.config
        check_latents(cls.packed**2 * pipeline.vae.config.latent_channels, config.in_channels, where)
        check_text(LAYERS * pipeline.text_encoder.config.hidden_size, config.joint_attention_dim, where)
        if pipeline.config.is_distilled or config.guidance_embeds:
            raise CheckpointError(
                f"{where} is distilled, and training would undo that: adapt the base model, such as "
                "black-forest-labs/FLUX.2-klein-base-4B"
            )
        cls.check_resolution(pipeline, where)

    @classmethod
    def schedule_of(cls, pipeline: Any, where: str) -> Schedule:
        """Return the noise levels of flow matching, shifted by the number of tokens and of steps."""
        return FlowSchedule.of(
            pipeline.scheduler,
            where,
            patch=1,
            grid=lambda steps: np.linspace(1.0, 1 / steps, steps).tolist(),
            mu=_mu,
        )

    def encoded(self, text: str, device: torch.device) -> dict[str, Tensor]:
        """Return the text's embeddings, those of the padding too, which the transformer reads."""
        embeds, _ = self.pipeline.encode_prompt([text], device, max_sequence_length=self.length)
        return {"prompt_embeds": embeds}

    def x0(self, encoded: Tensor, generator: torch.Generator) -> Tensor:
        """Draw latents with a CPU generator, packed, each channel with mean 0 and variance 1."""
        packed = functional.pixel_unshuffle(draw_unscaled(encoded, generator), self.packed)
        mean, deviation = self._moments(packed)
        return (packed - mean) / deviation

    def decode(self, x0: Tensor) -> Tensor:
        """Return the images of packed latents; gradients flow through the frozen VAE."""
        x0 = at_least_float32(x0)
        mean, deviation = self._moments(x0)
        latents = functional.pixel_shuffle(x0 * deviation + mean, self.packed)
        return at_least_float32(self.vae.decode(latents.to(self.vae.dtype)).sample)

    def _moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of packed latents, with shape (1, C, 1, 1)."""
        norm: Any = self.vae.bn
        mean, variance = (each.view(1, -1, 1, 1).to(like) for each in (norm.running_mean, norm.running_var))
        return mean, (variance + self.vae.config.batch_norm_eps).sqrt()


def _mu(tokens: int, steps: int) -> float:
    """Return the logarithm of the shift, as the pipeline has it."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu  # slow to import

    return float(compute_empirical_mu(tokens, steps))
