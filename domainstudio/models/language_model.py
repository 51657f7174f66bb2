"""Transformers that are told by language models and take images of any size.

The language models stay as they are, and the family's own pipeline encodes prompts. The network's
configuration names no size, so that of the images is `sample_size` of the VAE's configuration.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.nn import functional

from domainstudio.errors import CheckpointError
from domainstudio.models.condition import LENGTHS
from domainstudio.models.latents import channels, factor
from domainstudio.models.text_parts import token_ids
from domainstudio.models.text_to_image import PromptedNetwork, TextToImageDenoiser

if TYPE_CHECKING:
    from torch import Tensor

LENGTH = 512
"""Tokens of a prompt, the chat's own words included: the pipelines' default."""


class ToldNetwork(PromptedNetwork):
    """A transformer, and the language model, which stays as it is."""

    part = "transformer"
    transformer: Any

    def embed(self, told: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what `LanguageModelDenoiser.told` returns, which is encoded already."""
        return dict(told)

    def train_text_encoders(self, train: bool) -> None:
        """Train nothing."""


class LanguageModelDenoiser(TextToImageDenoiser):
    """A pipeline whose prompts are encoded by itself (see `TextToImageDenoiser`)."""

    trainable_encoders = 0
    packed: ClassVar[int] = 1
    """Latents of the VAE, along a side, that are one position of x0."""
    thinking: ClassVar[bool] = False
    """How the chat's template is asked for a prompt, as in the family's pipeline."""

    @abstractmethod
    def encoded(self, text: str, device: torch.device) -> dict[str, Tensor]:
        """Return what the network is told of a text, with shape (1, ...), the same for every text."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one x0."""
        height, width = self.resolution
        pixels = factor(self.vae) * self.packed
        return channels(self.vae) * self.packed**2, height // pixels, width // pixels

    @property
    def resolution(self) -> tuple[int, int]:
        """Height and width of its images, in pixels."""
        side = self.vae.config.sample_size
        return side, side

    @property
    def multiple(self) -> int:
        """What sides must be multiples of: x0 has even sides, for the wavelet and patches of two."""
        return 2 * factor(self.vae) * self.packed

    @property
    def length(self) -> int:
        """Tokens of a prompt for the last text encoder, which reads all of it."""
        return min(LENGTH, int(self.tokenizers[-1].model_max_length))

    def told(self, values: Sequence[str]) -> dict[str, Tensor]:
        """Return what the network is told of texts, each encoded once, alone: that takes little memory."""
        self._tokens(values)  # refuses what is too long
        found = {text: self._encoded_here(text) for text in dict.fromkeys(values)}
        rows = [found[text] for text in values]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    @torch.no_grad()
    def _encoded_here(self, text: str) -> dict[str, Tensor]:
        """Return what `encoded` does, computed on the network's device."""
        device = next(self.denoising.parameters()).device
        for encoder in self.text_encoders:
            encoder.to(device)  # pipelines ask where it is; one that rests goes back after its call
        return self.encoded(text, device)

    def padded(self, embeds: Tensor) -> dict[str, Tensor]:
        """Return a text's embeddings, (1, L, C), padded with zeros to `length`, and how many they are."""
        number = embeds.shape[1]
        padded = functional.pad(embeds, (0, 0, 0, self.length - number))
        return {"prompt_embeds": padded, LENGTHS: torch.tensor([number])}

    def key(self, values: Sequence[str], size: tuple[int, int]) -> list[Any]:
        """Return the tokens."""
        return [type(self).__name__, self._tokens(values).tolist()]

    def _tokens(self, values: Sequence[str]) -> Tensor:
        """Return token ids of texts in the chat's template, padded, with shape (N, L)."""
        tokenizer = self.tokenizers[0]
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": self.thinking}
        texts = [
            tokenizer.apply_chat_template([{"role": "user", "content": value}], **options) for value in values
        ]
        return token_ids(tokenizer, texts, self.length)

    @classmethod
    def check_resolution(cls, pipeline: Any, where: str) -> None:
        """Refuse a pipeline that names no usable size of its images.

        Raises:
            CheckpointError: it names none, or one that its VAE and its network cannot divide.
        """
        config, multiple = pipeline.vae.config, 2 * factor(pipeline.vae) * cls.packed
        size = None if "sample_size" in config.get("_use_default_values", ()) else config.get("sample_size")
        if not isinstance(size, int) or size < multiple or size % multiple:
            raise CheckpointError(
                f"{where}/vae/config.json: sample_size is {size}, and it must be the height and width of the "
                f"images to draw and to learn from, a multiple of {multiple}: import the model with "
                "--resolution 1024, or the one that you need"
            )
