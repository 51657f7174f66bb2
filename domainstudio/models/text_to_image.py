"""What text-to-image models in latent space share: a pipeline of network, VAE and text encoders.

A family is a file with two classes: a `PromptedNetwork`, which says how its network is told a text, and a
`TextToImageDenoiser`, which names the pipeline's parts. Then it is a line in `loading.KINDS`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import diffusers
import torch
from torch import nn

from domainstudio.errors import CheckpointError, ConfigError, DomainStudioError, MissingExtraError
from domainstudio.models import adapter_folder, lora
from domainstudio.models.adapters import TEXT_ENCODERS
from domainstudio.models.condition import to_device
from domainstudio.models.denoiser import Prediction
from domainstudio.models.folders import read_index, sample_size, save_pipeline
from domainstudio.models.latents import decode_latents, draw_latents, encode_images, factor
from domainstudio.models.new_tokens import add_tokens, merged_tokens
from domainstudio.models.schedule import at_least_float32
from domainstudio.models.text_parts import check_folder, check_present, load_networks, make_portable
from domainstudio.storage.weights import quiet

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import Tensor

    from domainstudio.models.adapters import Adapters
    from domainstudio.models.condition import Condition
    from domainstudio.models.schedule import Schedule
    from domainstudio.models.text_parts import Parts


class PromptedNetwork(nn.Module, ABC):
    """A network and its text encoders in one forward pass, so that both can be trained, also over processes.

    Args:
        network: the denoiser of latents; it becomes the attribute that `part` names.
        text_encoders: in the pipeline's order.
    """

    part: ClassVar[str]
    """The network's name in the pipeline: `unet` or `transformer`."""
    kohya_prefix: ClassVar[str] = "lora_transformer_"
    """What ComfyUI's names of a transformer's adapters begin with, where alpha is written too."""

    def __init__(self, network: nn.Module, text_encoders: Sequence[nn.Module]) -> None:
        super().__init__()
        self.add_module(self.part, network)
        self.text_encoders = nn.ModuleList(text_encoders)

    def forward(self, xt: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Return the network's output; a condition of `input_ids` goes through the text encoders first."""
        if "input_ids" in condition:
            condition = {**condition, **self.embed(condition)}
        return self.denoise(xt, timesteps, condition)

    @abstractmethod
    def denoise(self, xt: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Return the network's output for embeddings, with the shape (N, C, H, W) of xt."""

    @abstractmethod
    def embed(self, told: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode what `TextToImageDenoiser.told` returns, as the family's pipeline does."""

    def train_text_encoders(self, train: bool) -> None:
        """Train those text encoders that can be trained, or not."""
        self.text_encoders.requires_grad_(train)


class TextToImageDenoiser(ABC):
    """A pipeline told by texts: x0 is the image's latent, scaled as the network expects it.

    Args:
        pipeline: the loaded pipeline; its parts are used in place.
        where: what to call it in errors.
    """

    kind = "text-to-image"
    pipelines: frozenset[str]
    parts: ClassVar[Mapping[str, Parts]]
    """The parts of each class of pipeline."""
    optional: ClassVar[Collection[str]] = ()
    """Parts that a pipeline may lack."""
    network_class: ClassVar[type[PromptedNetwork]]
    """The family's network."""
    trainable_encoders: ClassVar[int] = 2
    """How many text encoders, from the first, can be trained and get new tokens and adapters."""
    options: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Options of `from_pretrained` for each class of pipeline."""
    conditional = True
    classes = ()
    learned_variance = False
    guidance_patch = 0
    name_or_path = ""
    adapters: Adapters | None = None

    def __init__(self, pipeline: Any, where: str) -> None:
        check_present(pipeline, self.parts[type(pipeline).__name__], where, self.optional)
        self.check(pipeline, where)
        self.pipeline = pipeline
        self.vae: AutoencoderKL = pipeline.vae
        names = [name for name in TEXT_ENCODERS if getattr(pipeline, name, None) is not None]
        self.tokenizers = [getattr(pipeline, name.replace("text_encoder", "tokenizer")) for name in names]
        encoders = [getattr(pipeline, name) for name in names]
        self._unwrapped = self.network_class(getattr(pipeline, self.network_class.part), encoders)
        self.network: nn.Module = self._unwrapped
        self.schedule = self.schedule_of(pipeline, where)
        self.vae.requires_grad_(False).eval()
        self.network.requires_grad_(False)
        self._shared = False
        self.train(unet=True)

    @classmethod
    @abstractmethod
    def check(cls, pipeline: Any, where: str) -> None:
        """Refuse a pipeline whose parts are of another kind or belong to different models.

        Args:
            pipeline: the loaded pipeline; no part is missing.
            where: what to call it in errors.

        Raises:
            CheckpointError: with the part's name.
        """

    @classmethod
    @abstractmethod
    def schedule_of(cls, pipeline: Any, where: str) -> Schedule:
        """Return the noise levels of the pipeline, whatever sampler it has.

        Raises:
            CheckpointError: the scheduler is of another family.
        """

    @abstractmethod
    def told(self, values: Sequence[str]) -> dict[str, Tensor]:
        """Return what `PromptedNetwork.embed` takes of texts: `input_ids`, and what goes with them.

        Raises:
            ConfigError: a prompt has more tokens than the model takes.
        """

    @abstractmethod
    def key(self, values: Sequence[str], size: tuple[int, int]) -> list[Any]:
        """Return what decides embeddings beside texts, weights and configurations of the text encoders."""

    def sizes(self, number: int, size: tuple[int, int]) -> dict[str, Tensor]:
        """Return what the network is told of the images' size, of as many images; most are told nothing."""
        return {}

    def train(
        self, *, unet: bool = True, text_encoders: bool = False, new_tokens: Mapping[str, str] | None = None
    ) -> None:
        """Choose what is trained (see `Denoiser.train`). If text is, conditions are tokens from then on."""
        if text_encoders and self._shared:
            raise ValueError("the frozen source shares the text encoders: call train before frozen_source")
        if self.adapters is not None:
            raise ValueError("the model has adapters, and they alone are trained")
        if (text_encoders or new_tokens) and not self.trainable_encoders:
            raise ConfigError(
                f"the text encoder of a {type(self.pipeline).__name__} is a language model, which is not "
                "trained: set finetune.train_text_encoder and lora.text_encoder to false, and no "
                "prompts.new_tokens"
            )
        self.denoising.requires_grad_(unet)
        self._unwrapped.train_text_encoders(text_encoders)
        if new_tokens:
            learning = slice(self.trainable_encoders)
            add_tokens(self.tokenizers[learning], self.text_encoders[learning], new_tokens)
        self.trains_text = text_encoders or bool(new_tokens)

    @property
    def denoising(self) -> Any:
        """The network without the text encoders."""
        return getattr(self._unwrapped, self.network_class.part)

    @property
    def text_encoders(self) -> list[Any]:
        """The text encoders, one for each tokenizer."""
        return list(self._unwrapped.text_encoders)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one latent."""
        config = self.denoising.config
        return config.in_channels, *sample_size(config, self.network_class.part)

    @property
    def resolution(self) -> tuple[int, int]:
        """Height and width of its images, in pixels."""
        return self.shape[1] * factor(self.vae), self.shape[2] * factor(self.vae)

    @property
    def multiple(self) -> int:
        """What sides must be multiples of: latents have even sides, for the wavelet and patches of two."""
        return 2 * factor(self.vae)

    def encode(self, images: Tensor) -> Tensor:
        """Return mean and standard deviation of the latents, with shape (N, 2C, H, W)."""
        return encode_images(images, self.vae)

    def x0(self, encoded: Tensor, generator: torch.Generator) -> Tensor:
        """Draw latents with a CPU generator, moved and scaled as the network expects them."""
        return draw_latents(encoded, self.vae, generator)

    def decode(self, x0: Tensor) -> Tensor:
        """Return the images of scaled latents; gradients flow through the frozen VAE."""
        return decode_latents(x0, self.vae)

    def condition(self, values: Sequence[str], size: tuple[int, int] | None = None) -> Condition:
        """Return the prompts' tokens where text encoders are trained, else their embeddings.

        Args:
            values: the prompts.
            size: height and width of the images, for models that take it; by default `resolution`.

        Raises:
            ConfigError: a prompt has more tokens than the model takes.
        """
        device = next(self._unwrapped.parameters()).device
        condition = to_device(self.told(values), device)
        if not self.trains_text:
            with torch.no_grad():
                embedded = self._unwrapped.embed(condition)
            condition = {
                name: at_least_float32(value) if value.is_floating_point() else value
                for name, value in embedded.items()
            }
        return condition | to_device(self.sizes(len(values), size or self.resolution), device)

    def condition_key(self, values: Sequence[str], size: tuple[int, int] | None = None) -> list[Any] | None:
        """Return what decides the embeddings of prompts; `None` where text encoders are trained."""
        if self.trains_text:
            return None
        configs = [encoder.config.to_dict() for encoder in self.text_encoders]
        return [list(values), *self.key(values, size or self.resolution), configs]

    def predict(self, xt: Tensor, timesteps: Tensor, condition: Condition) -> Prediction:
        """Return the network's prediction."""
        return Prediction(self.network(xt, timesteps, condition))

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations of the network, of trained text encoders, and of the VAE's decoder."""
        self.denoising.enable_gradient_checkpointing()
        if self.vae._supports_gradient_checkpointing:
            self.vae.enable_gradient_checkpointing()
        if self.trains_text:
            for encoder in self.text_encoders[: self.trainable_encoders]:
                new = "activation_checkpointing_enable"  # newer transformers deprecate the other name
                name = new if hasattr(encoder, new) else "gradient_checkpointing_enable"
                getattr(encoder, name)({"use_reentrant": False})

    def frozen_source(self) -> Self:
        """Return a frozen copy of what is trained, with the same VAE, or the network without adapters."""
        source = copy.copy(self)
        if self.adapters is not None:
            source.network = lora.SourceView(self._unwrapped)
            return source
        number = self.trainable_encoders if self.trains_text else 0
        encoders = [
            copy.deepcopy(each) if index < number else each for index, each in enumerate(self.text_encoders)
        ]
        self._shared = not self.trains_text
        source._unwrapped = self.network_class(copy.deepcopy(self.denoising), encoders)
        source._unwrapped.eval().requires_grad_(False)
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

    @classmethod
    def reads(cls, folder: Path) -> bool:
        """Return true: the pipeline's class decides."""
        return True

    @classmethod
    def load(cls, folder: Path, half: torch.dtype | None = None) -> Self:
        """Read a pipeline folder (see `loading.Kind`)."""
        index = read_index(folder)
        name = index["_class_name"]
        parts = cls.parts[name]
        check_folder(folder, index, parts, cls.optional)
        try:
            options = {**cls.options.get(name, {}), **load_networks(folder, index, parts, half)}
            with quiet("transformers"):  # which warns of image processors that no part here is
                pipeline = getattr(diffusers, name).from_pretrained(
                    folder, use_safetensors=True, local_files_only=True, **options
                )
        except ImportError as error:
            raise MissingExtraError(
                'transformers is not installed. Install it: pip install "domainstudio[text]"'
            ) from error
        except DomainStudioError:
            raise
        except Exception as error:  # tokenizers raise this class itself
            raise CheckpointError(
                f"{folder} is not a usable {name}: {error}. A file is damaged, or a part of another kind: "
                "copy the folder again"
            ) from error
        return cls(pipeline, str(folder))
