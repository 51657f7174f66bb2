"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): flow matching by a transformer told by two CLIPs and T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.nn import functional

from domainstudio.errors import CheckpointError
from domainstudio.models.flow_schedule import FlowSchedule
from domainstudio.models.folders import sample_size
from domainstudio.models.text_parts import check_part, check_text, token_ids
from domainstudio.models.text_to_image import PromptedNetwork, TextToImageDenoiser

if TYPE_CHECKING:
    from torch import Tensor

    from domainstudio.models.schedule import Schedule
    from domainstudio.models.text_parts import Parts

T5_LENGTH = 256
"""Tokens that T5 reads of a prompt: the pipeline's own default."""


class ConditionedSD3(PromptedNetwork):
    """SD3's transformer, two CLIPs, which can be trained, and T5, which stays as it is and may be missing."""

    part = "transformer"
    transformer: Any

    def denoise(self, xt: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Return the velocity for embeddings."""
        output: Tensor = self.transformer(
            hidden_states=xt,
            timestep=timesteps,
            encoder_hidden_states=condition["encoder_hidden_states"],
            pooled_projections=condition["pooled_projections"],
        ).sample
        return output

    def embed(self, told: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Join the texts as the pipeline does: the CLIPs' channels side by side, padded, then T5's tokens.

        Args:
            told: `input_ids` of the CLIPs, with shape (N, 2, L), and `t5`, T5's output, with shape (N, T, C).
        """
        clips = zip(self.text_encoders, told["input_ids"].unbind(1), strict=False)
        outputs = [encoder(ids, output_hidden_states=True) for encoder, ids in clips]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        t5 = told["t5"]
        padded = functional.pad(hidden, (0, t5.shape[-1] - hidden.shape[-1]))
        return {
            "encoder_hidden_states": torch.cat([padded, t5], dim=1),
            "pooled_projections": torch.cat([output[0] for output in outputs], dim=-1),
        }

    def read_t5(self, input_ids: Tensor) -> Tensor:
        """Return T5's output for ids, zeros where there is no T5, with shape (N, T, C)."""
        if len(self.text_encoders) < 3:
            width = self.transformer.config.joint_attention_dim
            return torch.zeros((*input_ids.shape, width), device=input_ids.device)
        with torch.no_grad():
            output: Tensor = self.text_encoders[2](input_ids)[0]
        return output

    def train_text_encoders(self, train: bool) -> None:
        """Train the CLIPs or not; T5 never is."""
        self.text_encoders[:2].requires_grad_(train)


class StableDiffusion3Denoiser(TextToImageDenoiser):
    """A Stable Diffusion 3 pipeline (see `TextToImageDenoiser`)."""

    network_class = ConditionedSD3
    parts: ClassVar[Mapping[str, Parts]] = {
        "StableDiffusion3Pipeline": {
            "transformer": "SD3Transformer2DModel",
            "vae": "AutoencoderKL",
            "scheduler": None,
            **{f"tokenizer{number}": None for number in ("", "_2", "_3")},
            "text_encoder": "CLIPTextModelWithProjection",
            "text_encoder_2": "CLIPTextModelWithProjection",
            "text_encoder_3": "T5EncoderModel",
        }
    }
    pipelines = frozenset(parts)
    optional = ("text_encoder_3", "tokenizer_3")

    @classmethod
    def check(cls, pipeline: Any, where: str) -> None:
        """Refuse parts that belong to different models."""
        check_part(pipeline, "transformer", "SD3Transformer2DModel", where)
        check_part(pipeline, "vae", "AutoencoderKL", where)
        config, channels = pipeline.transformer.config, pipeline.vae.config.latent_channels
        sample_size(config, f"{where}/transformer")
        if not channels == config.in_channels == config.out_channels:
            raise CheckpointError(
                f"{where}: the VAE makes latents of {channels} channels, the transformer reads "
                f"{config.in_channels} and writes {config.out_channels}: the parts belong to different models"
            )
        encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
        pooled = sum(encoder.config.projection_dim for encoder in encoders)
        if pooled != config.pooled_projection_dim:
            raise CheckpointError(
                f"{where}: the transformer reads {config.pooled_projection_dim} channels of pooled text and "
                f"the text encoders make {pooled}: the parts belong to different models"
            )
        t5 = pipeline.text_encoder_3
        if t5 is not None:
            check_text(t5.config.d_model, config.joint_attention_dim, where, "text_encoder_3")

    @classmethod
    def schedule_of(cls, pipeline: Any, where: str) -> Schedule:
        """Return the noise levels of flow matching, shifted statically."""
        return FlowSchedule.of(pipeline.scheduler, where, patch=pipeline.transformer.config.patch_size)

    def told(self, values: Sequence[str]) -> dict[str, Tensor]:
        """Return token ids of the CLIPs, and T5's output."""
        clips, t5 = self._tokens(values)
        network, device = self._unwrapped, next(self._unwrapped.parameters()).device
        assert isinstance(network, ConditionedSD3)
        return {"input_ids": clips, "t5": network.read_t5(t5.to(device))}

    def key(self, values: Sequence[str], size: tuple[int, int]) -> list[Any]:
        """Return the tokens."""
        return [tokens.tolist() for tokens in self._tokens(values)]

    def _tokens(self, values: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids of the CLIPs, with shape (N, 2, L), and of T5, with shape (N, T), zeros without it."""
        length = self.tokenizers[0].model_max_length  # the pipeline's length for both
        cut = len(self.tokenizers) == 3  # T5 reads the rest
        ids = [token_ids(each, values, length, cut=cut) for each in self.tokenizers[:2]]
        clips, longest = torch.stack(ids, dim=1), t5_length(self.pipeline)
        if not cut:
            return clips, torch.zeros((len(values), longest), dtype=torch.long)
        return clips, token_ids(self.tokenizers[2], values, longest)


def t5_length(pipeline: Any) -> int:
    """Return T5's tokens, the pipeline's `max_sequence_length`: fewer where its tokenizer says so."""
    tokenizer = pipeline.tokenizer_3
    return T5_LENGTH if tokenizer is None else min(T5_LENGTH, tokenizer.model_max_length)
