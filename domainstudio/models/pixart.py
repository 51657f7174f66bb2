"""PixArt-α (arXiv 2310.00426) and PixArt-Σ (arXiv 2403.04692): DDPM's noise, a transformer told by T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers.utils import is_bs4_available, is_ftfy_available

from domainstudio.errors import CheckpointError
from domainstudio.models.diffusion_schedule import DiffusionSchedule
from domainstudio.models.folders import sample_size
from domainstudio.models.text_parts import check_part, check_text, token_ids
from domainstudio.models.text_to_image import PromptedNetwork, TextToImageDenoiser

if TYPE_CHECKING:
    from torch import Tensor

    from domainstudio.models.schedule import Schedule
    from domainstudio.models.text_parts import Parts

LENGTHS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
"""Tokens of a prompt: the pipelines' own defaults."""

_PARTS: Parts = {
    "transformer": "PixArtTransformer2DModel",
    "vae": "AutoencoderKL",
    "scheduler": None,
    "tokenizer": None,
    "text_encoder": "T5EncoderModel",
}


class ConditionedPixArt(PromptedNetwork):
    """PixArt's transformer, and T5, which stays as it is."""

    part = "transformer"
    transformer: Any

    def denoise(self, xt: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Return ε for embeddings; a learned variance beside it is dropped, as in the pipelines."""
        sizes = {name: condition.get(name) for name in ("resolution", "aspect_ratio")}
        output: Tensor = self.transformer(
            xt,
            timestep=timesteps,
            encoder_hidden_states=condition["encoder_hidden_states"],
            encoder_attention_mask=condition["encoder_attention_mask"],
            added_cond_kwargs=sizes,
        ).sample
        return output[:, : xt.shape[1]]

    def embed(self, told: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode `input_ids`, of which `encoder_attention_mask` marks the text, both with shape (N, L)."""
        mask = told["encoder_attention_mask"]
        hidden = self.text_encoders[0](told["input_ids"], attention_mask=mask)[0]
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}

    def train_text_encoders(self, train: bool) -> None:
        """Train nothing: T5 stays as it is."""


class PixArtDenoiser(TextToImageDenoiser):
    """A PixArt pipeline (see `TextToImageDenoiser`)."""

    network_class = ConditionedPixArt
    parts: ClassVar[Mapping[str, Parts]] = dict.fromkeys(LENGTHS, _PARTS)
    pipelines = frozenset(parts)
    trainable_encoders = 0

    @classmethod
    def check(cls, pipeline: Any, where: str) -> None:
        """Refuse parts that belong to different models."""
        check_part(pipeline, "transformer", "PixArtTransformer2DModel", where)
        check_part(pipeline, "vae", "AutoencoderKL", where)
        config, channels = pipeline.transformer.config, pipeline.vae.config.latent_channels
        sample_size(config, f"{where}/transformer")
        if config.in_channels != channels or config.out_channels not in (channels, 2 * channels):
            raise CheckpointError(
                f"{where}: the VAE makes latents of {channels} channels, the transformer reads "
                f"{config.in_channels} and writes {config.out_channels}: the parts belong to different models"
            )
        check_text(pipeline.text_encoder.config.d_model, config.caption_channels, where)

    @classmethod
    def schedule_of(cls, pipeline: Any, where: str) -> Schedule:
        """Return the forward diffusion of a DDPM."""
        return DiffusionSchedule.of(pipeline.scheduler, where)

    def told(self, values: Sequence[str]) -> dict[str, Tensor]:
        """Return token ids, and which of them are text."""
        ids = self._tokens(values)
        lengths = torch.tensor([len(self.tokenizers[0](text).input_ids) for text in self._texts(values)])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": ids, "encoder_attention_mask": mask}

    def sizes(self, number: int, size: tuple[int, int]) -> dict[str, Tensor]:
        """Return resolution and aspect ratio, which PixArt-α of 1024 pixels is told."""
        if not self.denoising.use_additional_conditions:
            return {}
        height, width = size
        return {
            "resolution": torch.tensor([[float(height), float(width)]]).expand(number, -1),
            "aspect_ratio": torch.tensor([[height / width]]).expand(number, -1),
        }

    def key(self, values: Sequence[str], size: tuple[int, int]) -> list[Any]:
        """Return the tokens, and the size where the network is told it."""
        return [self._tokens(values).tolist(), size]

    def _tokens(self, values: Sequence[str]) -> Tensor:
        """Return token ids, padded, with shape (N, L)."""
        tokenizer = self.tokenizers[0]
        longest = min(LENGTHS[type(self.pipeline).__name__], tokenizer.model_max_length)
        return token_ids(tokenizer, self._texts(values), longest)

    def _texts(self, values: Sequence[str]) -> list[str]:
        """Return prompts as the pipelines write them: in lower case, or cleaned where that is installed."""
        clean = is_bs4_available() and is_ftfy_available()
        texts: list[str] = self.pipeline._text_preprocessing(list(values), clean_caption=clean)
        return texts
