"""Z-Image (arXiv 2511.22699): flow matching by a transformer of one stream, told by a Qwen3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from domainstudio.models.condition import LENGTHS
from domainstudio.models.flow_schedule import FlowSchedule
from domainstudio.models.language_model import LanguageModelDenoiser, ToldNetwork
from domainstudio.models.text_parts import check_latents, check_part, check_text

if TYPE_CHECKING:
    from torch import Tensor

    from domainstudio.models.schedule import Schedule
    from domainstudio.models.text_parts import Parts

PATCH = 2
"""Latents, along a side, of a token."""


class ConditionedZImage(ToldNetwork):
    """Z-Image's transformer, whose time runs from noise to image, and the language model."""

    kohya_prefix = "lycoris_"

    def denoise(self, xt: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Return the velocity noise - x0: the transformer is told 1 - σ, and predicts x0 - noise."""
        images = list(xt.unsqueeze(2).unbind())  # of one frame
        output = self.transformer(images, (1000 - timesteps) / 1000, self.texts(condition)).sample
        return -torch.stack(output).squeeze(2)

    def texts(self, condition: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the embeddings of each row without their padding, with shape (L, C)."""
        lengths = condition[LENGTHS].tolist()
        return [text[:length] for text, length in zip(condition["prompt_embeds"], lengths, strict=True)]


class ZImageDenoiser(LanguageModelDenoiser):
    """A Z-Image pipeline (see `TextToImageDenoiser`)."""

    network_class = ConditionedZImage
    parts: ClassVar[Mapping[str, Parts]] = {
        "ZImagePipeline": {
            "transformer": "ZImageTransformer2DModel",
            "vae": "AutoencoderKL",
            "scheduler": None,
            "tokenizer": None,
            "text_encoder": "Qwen3Model",
        }
    }
    pipelines = frozenset(parts)
    thinking = True

    @classmethod
    def check(cls, pipeline: Any, where: str) -> None:
        """Refuse parts that belong to different models."""
        check_part(pipeline, "transformer", "ZImageTransformer2DModel", where)
        check_part(pipeline, "vae", "AutoencoderKL", where)
        config = pipeline.transformer.config
        check_latents(pipeline.vae.config.latent_channels, config.in_channels, where)
        check_text(pipeline.text_encoder.config.hidden_size, config.cap_feat_dim, where)
        cls.check_resolution(pipeline, where)

    @classmethod
    def schedule_of(cls, pipeline: Any, where: str) -> Schedule:
        """Return the noise levels of flow matching, shifted statically, from 1 to 1 / steps before that."""
        return FlowSchedule.of(
            pipeline.scheduler,
            where,
            patch=PATCH,
            grid=lambda steps: torch.linspace(1, 1 / steps, steps).tolist(),
        )

    def encoded(self, text: str, device: torch.device) -> dict[str, Tensor]:
        """Return the text's embeddings, padded with zeros, and how many they are."""
        [embeds], _ = self.pipeline.encode_prompt(
            [text], device, do_classifier_free_guidance=False, max_sequence_length=self.length
        )
        return self.padded(embeds[None])
