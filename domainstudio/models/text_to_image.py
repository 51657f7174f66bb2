"""Text-to-image models in latent space: Stable Diffusion 1.x, 2.x and XL pipeline folders."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import diffusers
import torch
from torch import nn

from domainstudio.errors import CheckpointError, ConfigError, MissingExtraError
from domainstudio.models import adapter_folder, lora
from domainstudio.models.denoiser import Prediction
from domainstudio.models.folders import read_index, save_pipeline
from domainstudio.models.latents import decode_latents, draw_latents, encode_images, factor
from domainstudio.models.new_tokens import add_tokens, merged_tokens
from domainstudio.models.text_parts import (
    PIPELINES,
    check_folder,
    check_parts,
    load_networks,
    make_portable,
    training_schedule,
)

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import Tensor

    from domainstudio.models.adapters import Adapters
    from domainstudio.models.condition import Condition

_UNUSABLE = (OSError, LookupError, AttributeError, TypeError, ValueError, RuntimeError)
"""What diffusers' and transformers' loaders raise."""


class ConditionedUNet(nn.Module):
    """A UNet and its text encoders in one forward pass, so that both can be trained, also over processes.

    Args:
        unet: the denoiser of latents.
        text_encoders: one (Stable Diffusion 1.x and 2.x) or two (XL).
    """

    def __init__(self, unet: nn.Module, text_encoders: Sequence[nn.Module]) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoders = nn.ModuleList(text_encoders)

    def forward(self, xt: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Return the UNet's output; a condition of `input_ids` goes through the text encoders first."""
        if "input_ids" in condition:
            condition = {**condition, **self.embed(condition["input_ids"], condition.get("has_text"))}
        added = {name: condition[name] for name in ("text_embeds", "time_ids") if name in condition}
        output: Tensor = self.unet(
            xt,
            timesteps,
            encoder_hidden_states=condition["encoder_hidden_states"],
            added_cond_kwargs=added or None,
        ).sample
        return output

    def embed(self, input_ids: Tensor, has_text: Tensor | None = None) -> dict[str, Tensor]:
        """Encode tokens as diffusers' pipelines do.

        One encoder gives its last hidden state. Two give their second-to-last hidden states, joined along
        the channels, and the second one's pooled projection.

        Args:
            input_ids: token ids for each encoder, with shape (N, encoders, L).
            has_text: whether a row has a text, with shape (N,); the embeddings of the others are zeros.
        """
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


class TextToImageDenoiser:
    """A Stable Diffusion pipeline: x0 is the image's latent, scaled as the UNet expects it.

    Args:
        pipeline: the loaded pipeline; its parts are used in place.
        where: what to call it in errors.
    """

    kind = "text-to-image"
    pipelines = PIPELINES
    conditional = True
    classes = ()
    learned_variance = False
    name_or_path = ""
    adapters: Adapters | None = None

    def __init__(self, pipeline: Any, where: str) -> None:
        check_parts(pipeline, where)
        self.pipeline = pipeline
        self.vae: AutoencoderKL = pipeline.vae
        names = [name for name in ("", "_2") if hasattr(pipeline, f"text_encoder{name}")]
        self.tokenizers = [getattr(pipeline, f"tokenizer{name}") for name in names]
        encoders = [getattr(pipeline, f"text_encoder{name}") for name in names]
        self._unwrapped = ConditionedUNet(pipeline.unet, encoders)
        self.network: nn.Module = self._unwrapped
        self.noise_scheduler = training_schedule(pipeline.scheduler, where)
        self.vae.requires_grad_(False).eval()
        self.network.requires_grad_(False)
        self._shared = False
        self.train(unet=True)

    def train(
        self, *, unet: bool = True, text_encoders: bool = False, new_tokens: Mapping[str, str] | None = None
    ) -> None:
        """Choose what is trained (see `Denoiser.train`). If text is, conditions are tokens from then on."""
        if text_encoders and self._shared:
            raise ValueError("the frozen source shares the text encoders: call train before frozen_source")
        if self.adapters is not None:
            raise ValueError("the model has adapters, and they alone are trained")
        self._unwrapped.unet.requires_grad_(unet)
        self._unwrapped.train_text_encoders(text_encoders)
        if new_tokens:
            add_tokens(self.tokenizers, self.text_encoders, new_tokens)
        self.trains_text = text_encoders or bool(new_tokens)

    @property
    def text_encoders(self) -> list[Any]:
        """The text encoders, one for each tokenizer."""
        return list(self._unwrapped.text_encoders)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one latent."""
        config = self.pipeline.unet.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, height, width

    @property
    def resolution(self) -> tuple[int, int]:
        """Height and width of its images, in pixels."""
        return self.shape[1] * factor(self.vae), self.shape[2] * factor(self.vae)

    @property
    def multiple(self) -> int:
        """What sides must be multiples of: latents have even sides, for the wavelet; the UNet takes any."""
        return 2 * factor(self.vae)

    def encode(self, images: Tensor) -> Tensor:
        """Return mean and standard deviation of the latents, with shape (N, 2C, H, W)."""
        return encode_images(images, self.vae)

    def x0(self, encoded: Tensor, generator: torch.Generator) -> Tensor:
        """Draw latents with a CPU generator, moved and scaled as the UNet expects them."""
        return draw_latents(encoded, self.vae, generator)

    def decode(self, x0: Tensor) -> Tensor:
        """Return the images of scaled latents; gradients flow through the frozen VAE."""
        return decode_latents(x0, self.vae)

    def condition(self, values: Sequence[str], size: tuple[int, int] | None = None) -> Condition:
        """Return the prompts' tokens where text encoders are trained, else their embeddings.

        Of "" the embeddings are zeros where the pipeline says `force_zeros_for_empty_prompt` (XL).

        Args:
            values: the prompts.
            size: height and width of the images, for XL; by default `resolution`.

        Raises:
            ConfigError: a prompt has more tokens than the model takes.
        """
        device = next(self._unwrapped.parameters()).device
        condition: dict[str, Tensor] = {"input_ids": self._tokens(values).to(device)}
        if self.pipeline.config.get("force_zeros_for_empty_prompt"):
            condition["has_text"] = torch.tensor([value != "" for value in values], device=device)
        if not self.trains_text:
            with torch.no_grad():
                condition = self._unwrapped.embed(**condition)
        if len(self.tokenizers) == 2:
            condition["time_ids"] = self._time_ids(len(values), size or self.resolution).to(device)
        return condition

    def condition_key(self, values: Sequence[str], size: tuple[int, int] | None = None) -> list[Any] | None:
        """Return what decides the embeddings of prompts; `None` where text encoders are trained."""
        if self.trains_text:
            return None
        zeros = self.pipeline.config.get("force_zeros_for_empty_prompt")
        configs = [encoder.config.to_dict() for encoder in self.text_encoders]
        return [list(values), self._tokens(values).tolist(), zeros, size or self.resolution, configs]

    def predict(self, xt: Tensor, timesteps: Tensor, condition: Condition) -> Prediction:
        """Return the UNet's prediction."""
        return Prediction(self.network(xt, timesteps, condition))

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations of the UNet, of trained text encoders, and of the VAE's decoder."""
        self._unwrapped.unet.enable_gradient_checkpointing()  # type: ignore[operator]
        self.vae.enable_gradient_checkpointing()
        if self.trains_text:
            for encoder in self._unwrapped.text_encoders:
                new = "activation_checkpointing_enable"  # newer transformers deprecate the other name
                name = new if hasattr(encoder, new) else "gradient_checkpointing_enable"
                getattr(encoder, name)({"use_reentrant": False})

    def frozen_source(self) -> Self:
        """Return a frozen copy of what is trained, with the same VAE, or the network without adapters."""
        source = copy.copy(self)
        if self.adapters is not None:
            source.network = lora.SourceView(self._unwrapped)
            return source
        unet = copy.deepcopy(self._unwrapped.unet)
        encoders = list(self._unwrapped.text_encoders)
        if self.trains_text:
            encoders = [copy.deepcopy(encoder) for encoder in encoders]
        self._shared = not self.trains_text
        source._unwrapped = ConditionedUNet(unet, encoders).eval().requires_grad_(False)
        source.network = source._unwrapped
        return source

    def to(self, device: torch.device | str) -> Self:
        """Move every part to a device."""
        self.network.to(device)
        self.vae.to(device)
        return self

    def save(self, folder: Path, *, half: bool = False) -> None:
        """Write the pipeline folder that `diffusers.DiffusionPipeline.from_pretrained` reads, or adapters."""
        if self.adapters is not None:
            adapter_folder.save(self, folder, type(self.pipeline).__name__, half=half)
            return
        with merged_tokens(self.text_encoders):
            save_pipeline(self.pipeline, folder, half=half)
        make_portable(folder, self.pipeline)

    def _tokens(self, values: Sequence[str]) -> Tensor:
        """Return token ids for each encoder, with shape (N, encoders, L).

        Raises:
            ConfigError: a prompt has more tokens than the model takes.
        """
        input_ids = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            longest = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
            for value in values:
                if (number := len(tokenizer(value, truncation=False).input_ids)) > longest:
                    raise ConfigError(
                        f"the prompt {value!r} has {number} tokens and the model takes {longest}, begin and "
                        "end included: shorten it"
                    )
            tokens = tokenizer(list(values), padding="max_length", max_length=longest, return_tensors="pt")
            input_ids.append(tokens.input_ids)
        return torch.stack(input_ids, dim=1)

    def _time_ids(self, number: int, size: tuple[int, int]) -> Tensor:
        """Return original size, crop's corner and target size (SDXL, arXiv 2307.01952, section 2.2)."""
        return torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32).expand(number, -1)

    @classmethod
    def reads(cls, folder: Path) -> bool:
        """Return true: the pipeline's class decides."""
        return True

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a pipeline folder in float32 (see `loading.Kind`)."""
        from safetensors import SafetensorError

        index = read_index(folder)
        check_folder(folder, index)
        options: dict[str, Any] = {}
        if index["_class_name"] == "StableDiffusionPipeline":
            options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        try:
            options |= load_networks(folder, index)
            pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(
                folder, use_safetensors=True, local_files_only=True, **options
            )
        except ImportError as error:
            raise MissingExtraError(
                'transformers is not installed. Install it: pip install "domainstudio[text]"'
            ) from error
        except (*_UNUSABLE, SafetensorError) as error:
            raise CheckpointError(
                f"{folder} is not a usable {index['_class_name']}: {error}. A file is damaged, or a part "
                "of another kind: copy the folder again"
            ) from error
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.float()
        return cls(pipeline, str(folder))
