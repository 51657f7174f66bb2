"""Stable Diffusion 1.x, 2.x and XL: a UNet told by one or two of CLIP's text encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from domainstudio.models.diffusion_schedule import DiffusionSchedule
from domainstudio.models.text_parts import check_part, check_stable_diffusion, token_ids
from domainstudio.models.text_to_image import PromptedNetwork, TextToImageDenoiser

if TYPE_CHECKING:
    from torch import Tensor

    from domainstudio.models.schedule import Schedule
    from domainstudio.models.text_parts import Parts

_PARTS: Parts = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "scheduler": None,
    "tokenizer": None,
    "text_encoder": "CLIPTextModel",
}


class ConditionedUNet(PromptedNetwork):
    """A UNet and its text encoders in one forward pass, so that both can be trained, also over processes.

    There is one text encoder (Stable Diffusion 1.x and 2.x) or two (XL).
    """

    part = "unet"
    unet: Any

    def denoise(self, xt: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Return the UNet's output for embeddings."""
        added = {name: condition[name] for name in ("text_embeds", "time_ids") if name in condition}
        hidden = condition["encoder_hidden_states"]
        output: Tensor = self.unet(
            xt,
            timesteps,
            encoder_hidden_states=hidden.to(self.unet.conv_in.weight.dtype),  # a CPU's autocast casts no norm
            added_cond_kwargs=added or None,
        ).sample
        return output

    def embed(self, told: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode tokens as diffusers' pipelines do.

        One encoder gives its last hidden state. Two give their second-to-last hidden states, joined along
        the channels, and the second one's pooled projection.

        Args:
            told: `input_ids` for each encoder, with shape (N, encoders, L), and `has_text`, whether a row has
                a text, with shape (N,); the embeddings of the others are zeros.
        """
        input_ids, has_text = told["input_ids"], told.get("has_text")
        if len(self.text_encoders) == 1:
            embeddings = {"encoder_hidden_states": self.text_encoders[0](input_ids[:, 0])[0]}
        else:
            outputs = [
                encoder(ids, output_hidden_states=True)
                for encoder, ids in zip(self.text_encoders, input_ids.unbind(1), strict=True)
            ]
            hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
            embeddings = {"encoder_hidden_states": hidden, "text_embeds": outputs[-1][0]}
        if has_text is None:
            return embeddings
        return {name: each * has_text.view(-1, *[1] * (each.ndim - 1)) for name, each in embeddings.items()}

    def train_text_encoders(self, train: bool) -> None:
        """Train text encoders or not; of the first of two, the last layer has no output that is used."""
        self.text_encoders.requires_grad_(train)
        if len(self.text_encoders) == 2:
            for name, module in self.text_encoders[0].named_modules():
                if name.endswith("encoder.layers"):
                    module[-1].requires_grad_(False)
                elif name.endswith("final_layer_norm"):
                    module.requires_grad_(False)


class StableDiffusionDenoiser(TextToImageDenoiser):
    """A Stable Diffusion pipeline (see `TextToImageDenoiser`)."""

    network_class = ConditionedUNet
    parts: ClassVar[Mapping[str, Parts]] = {
        "StableDiffusionPipeline": _PARTS,
        "StableDiffusionXLPipeline": {
            **_PARTS,
            "tokenizer_2": None,
            "text_encoder_2": "CLIPTextModelWithProjection",
        },
    }
    pipelines = frozenset(parts)
    options: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "StableDiffusionPipeline": {
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
    }

    @classmethod
    def check(cls, pipeline: Any, where: str) -> None:
        """Refuse parts that belong to different models."""
        check_part(pipeline, "unet", "UNet2DConditionModel", where)
        check_part(pipeline, "vae", "AutoencoderKL", where)
        check_stable_diffusion(pipeline, where)

    @classmethod
    def schedule_of(cls, pipeline: Any, where: str) -> Schedule:
        """Return the forward diffusion of a DDPM."""
        return DiffusionSchedule.of(pipeline.scheduler, where)

    def told(self, values: Sequence[str]) -> dict[str, Tensor]:
        """Return token ids, and of XL whether there is a text.

        Of "" the embeddings are zeros where the pipeline says `force_zeros_for_empty_prompt` (XL).
        """
        told = {"input_ids": self._tokens(values)}
        if self.pipeline.config.get("force_zeros_for_empty_prompt"):
            told["has_text"] = torch.tensor([value != "" for value in values])
        return told

    def sizes(self, number: int, size: tuple[int, int]) -> dict[str, Tensor]:
        """Return original size, crop's corner and target size (SDXL, arXiv 2307.01952, section 2.2)."""
        if len(self.tokenizers) == 1:
            return {}
        ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32).expand(number, -1)
        return {"time_ids": ids}

    def key(self, values: Sequence[str], size: tuple[int, int]) -> list[Any]:
        """Return tokens, and what is done with them."""
        zeros = self.pipeline.config.get("force_zeros_for_empty_prompt")
        return [self._tokens(values).tolist(), zeros, size]

    def _tokens(self, values: Sequence[str]) -> Tensor:
        """Return token ids for each encoder, with shape (N, encoders, L)."""
        input_ids = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            longest = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
            input_ids.append(token_ids(tokenizer, values, longest))
        return torch.stack(input_ids, dim=1)
