"""Qwen-Image (arXiv 2508.02324): flow matching by a transformer of packed latents, told by a Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch.nn import functional

from domainstudio.errors import CheckpointError
from domainstudio.models.condition import LENGTHS
from domainstudio.models.flow_schedule import FlowSchedule
from domainstudio.models.language_model import LENGTH, LanguageModelDenoiser, ToldNetwork
from domainstudio.models.latents import channels, draw_unscaled, encode_images
from domainstudio.models.schedule import at_least_float32
from domainstudio.models.text_parts import check_latents, check_part, check_text, token_ids

if TYPE_CHECKING:
    from torch import Tensor

    from domainstudio.models.schedule import Schedule
    from domainstudio.models.text_parts import Parts

PATCH = 2
"""Latents, along a side, of a token."""


class ConditionedQwenImage(ToldNetwork):
    """Qwen-Image's transformer of tokens with places, and the language model."""

    kohya_prefix = "lycoris_"

    def denoise(self, xt: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Return the velocity."""
        packed = functional.pixel_unshuffle(xt, PATCH)
        texts, mask = self.texts(condition)
        output: Tensor = self.transformer(
            hidden_states=packed.flatten(2).transpose(1, 2),
            timestep=timesteps / 1000,
            encoder_hidden_states=texts,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, *packed.shape[2:])]] * len(xt),  # of one frame
        ).sample
        return functional.pixel_shuffle(output.transpose(1, 2).reshape(packed.shape), PATCH)

    def texts(self, condition: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return embeddings as long as the longest, (N, L, C), and which of them are text, (N, L).

        Without padding there is no mask: attention is faster then.
        """
        lengths = condition[LENGTHS]
        least, longest = (int(length) for length in lengths.aminmax())
        texts = condition["prompt_embeds"][:, :longest]
        if least == longest:
            return texts, None
        return texts, (torch.arange(longest, device=lengths.device) < lengths[:, None]).to(texts.device)


class QwenImageDenoiser(LanguageModelDenoiser):
    """A Qwen-Image pipeline (see `TextToImageDenoiser`), whose VAE takes videos: an image is one frame."""

    network_class = ConditionedQwenImage
    parts: ClassVar[Mapping[str, Parts]] = {
        "QwenImagePipeline": {
            "transformer": "QwenImageTransformer2DModel",
            "vae": "AutoencoderKLQwenImage",
            "scheduler": None,
            "tokenizer": None,
            "text_encoder": "Qwen2_5_VLForConditionalGeneration",
        }
    }
    pipelines = frozenset(parts)
    guidance_patch = PATCH

    @classmethod
    def check(cls, pipeline: Any, where: str) -> None:
        """Refuse parts that belong to different models, and a model distilled for guidance."""
        check_part(pipeline, "transformer", "QwenImageTransformer2DModel", where)
        check_part(pipeline, "vae", "AutoencoderKLQwenImage", where)
        config = pipeline.transformer.config
        check_latents(PATCH**2 * channels(pipeline.vae), config.in_channels, where)
        width = pipeline.text_encoder.config.get_text_config().hidden_size
        check_text(width, config.joint_attention_dim, where)
        if config.guidance_embeds:
            raise CheckpointError(
                f"{where} is distilled for guidance, and diffusers' transformer cannot be told it: adapt the "
                "base model, Qwen/Qwen-Image"
            )
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

    @property
    def length(self) -> int:
        """Tokens of a prompt, without those of the template that are left out of the embeddings."""
        return min(LENGTH, int(self.tokenizers[0].model_max_length) - self._left_out)

    @property
    def _left_out(self) -> int:
        return int(self.pipeline.prompt_template_encode_start_idx)

    def encoded(self, text: str, device: torch.device) -> dict[str, Tensor]:
        """Return the embeddings of a text in the template, of which the system's words are left out."""
        embeds, _ = self.pipeline.encode_prompt([text], device, max_sequence_length=self.length)
        return self.padded(embeds)

    def train(
        self, *, unet: bool = True, text_encoders: bool = False, new_tokens: Mapping[str, str] | None = None
    ) -> None:
        """Choose what is trained (see `Denoiser.train`); what no output depends on is never trained."""
        super().train(unet=unet, text_encoders=text_encoders, new_tokens=new_tokens)
        last = self.denoising.transformer_blocks[-1]
        for unused in (last.attn.to_add_out, last.txt_mlp):
            unused.requires_grad_(False)

    def encode(self, images: Tensor) -> Tensor:
        """Return mean and standard deviation of the latents, with shape (N, 2C, H, W)."""
        return encode_images(images.unsqueeze(2), self.vae).squeeze(2)

    def x0(self, encoded: Tensor, generator: torch.Generator) -> Tensor:
        """Draw latents with a CPU generator, each channel with mean 0 and variance 1."""
        mean, deviation = self._moments(encoded)
        return (draw_unscaled(encoded, generator) - mean) / deviation

    def decode(self, x0: Tensor) -> Tensor:
        """Return the images of latents; gradients flow through the frozen VAE, which cuts off at -1 and 1."""
        x0 = at_least_float32(x0)
        mean, deviation = self._moments(x0)
        latents = (x0 * deviation + mean).unsqueeze(2)
        return at_least_float32(self.vae.decode(latents.to(self.vae.dtype)).sample.squeeze(2))

    def _moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the VAE's latents, with shape (1, C, 1, 1)."""
        config: Any = self.vae.config
        mean, deviation = (like.new_tensor(each) for each in (config.latents_mean, config.latents_std))
        return mean.view(1, -1, 1, 1), deviation.view(1, -1, 1, 1)

    def _tokens(self, values: Sequence[str]) -> Tensor:
        """Return token ids of texts in the template, padded, with shape (N, L)."""
        texts = [self.pipeline.prompt_template_encode.format(value) for value in values]
        return token_ids(self.tokenizers[0], texts, self.length + self._left_out)
