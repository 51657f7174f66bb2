"""FLUX.1: flow matching by a transformer of packed latents, told by CLIP and T5, and by its guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch.nn import functional

from domainstudio.models.flow_schedule import FlowSchedule
from domainstudio.models.language_model import LanguageModelDenoiser, ToldNetwork
from domainstudio.models.text_parts import check_latents, check_part, check_text, token_ids

if TYPE_CHECKING:
    from torch import Tensor

    from domainstudio.models.schedule import Schedule
    from domainstudio.models.text_parts import Parts

PATCH = 2
"""Latents, along a side, of a token."""

GUIDANCE = 3.5
"""What a distilled transformer is told in training: the default of diffusers' scripts."""


class ConditionedFlux1(ToldNetwork):
    """FLUX.1's transformer of tokens with places, and the text encoders."""

    def denoise(self, xt: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Return the velocity."""
        packed, texts = functional.pixel_unshuffle(xt, PATCH), condition["prompt_embeds"]
        axes = [torch.arange(side, device=xt.device) for side in (1, *packed.shape[2:])]
        output = self.transformer(
            hidden_states=packed.flatten(2).transpose(1, 2),
            timestep=timesteps / 1000,
            guidance=condition.get("guidance"),
            pooled_projections=condition["pooled_prompt_embeds"],
            encoder_hidden_states=texts,
            txt_ids=torch.zeros((texts.shape[1], 3), device=xt.device),
            img_ids=torch.cartesian_prod(*axes).float(),
        ).sample
        return functional.pixel_shuffle(output.transpose(1, 2).reshape(packed.shape), PATCH)


class Flux1Denoiser(LanguageModelDenoiser):
    """A FLUX.1 pipeline (see `TextToImageDenoiser`)."""

    network_class = ConditionedFlux1
    parts: ClassVar[Mapping[str, Parts]] = {
        "FluxPipeline": {
            "transformer": "FluxTransformer2DModel",
            "vae": "AutoencoderKL",
            "scheduler": None,
            "tokenizer": None,
            "tokenizer_2": None,
            "text_encoder": "CLIPTextModel",
            "text_encoder_2": "T5EncoderModel",
        }
    }
    pipelines = frozenset(parts)

    @classmethod
    def check(cls, pipeline: Any, where: str) -> None:
        """Refuse parts that belong to different models."""
        check_part(pipeline, "transformer", "FluxTransformer2DModel", where)
        check_part(pipeline, "vae", "AutoencoderKL", where)
        config = pipeline.transformer.config
        clip, t5 = pipeline.text_encoder.config, pipeline.text_encoder_2.config
        check_latents(PATCH**2 * pipeline.vae.config.latent_channels, config.in_channels, where)
        check_text(clip.hidden_size, config.pooled_projection_dim, where, "text_encoder")
        check_text(t5.d_model, config.joint_attention_dim, where, "text_encoder_2")
        cls.check_resolution(pipeline, where)

    @classmethod
    def schedule_of(cls, pipeline: Any, where: str) -> Schedule:
        """Return the noise levels of flow matching, shifted by the number of tokens."""
        return FlowSchedule.of(
            pipeline.scheduler,
            where,
            patch=PATCH,
            grid=lambda steps: np.linspace(1.0, 1 / steps, steps).tolist(),
        )

    def encoded(self, text: str, device: torch.device) -> dict[str, Tensor]:
        """Return T5's output, and CLIP's pooled one, for which a long text is cut."""
        embeds, pooled, _ = self.pipeline.encode_prompt(
            [text], device=device, max_sequence_length=self.length
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def sizes(self, number: int, size: tuple[int, int]) -> dict[str, Tensor]:
        """Return the guidance that a distilled transformer is told; sampling tells it another one."""
        distilled = self.denoising.config.guidance_embeds
        return {"guidance": torch.full((number,), GUIDANCE)} if distilled else {}

    def key(self, values: Sequence[str], size: tuple[int, int]) -> list[Any]:
        """Return the tokens, and whether the network is told its guidance."""
        return [*super().key(values, size), bool(self.denoising.config.guidance_embeds)]

    def _tokens(self, values: Sequence[str]) -> Tensor:
        """Return T5's token ids, padded, with shape (N, L)."""
        return token_ids(self.tokenizers[-1], values, self.length)
