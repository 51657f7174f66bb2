"""`params.yaml` as typed, frozen settings: parsed once, every unknown or misspelt key refused.

One section per pipeline stage, and three mappings: `targets` (image domains to adapt to), `methods`
(weights of the loss terms) and `adaptations` (a source, a target, a method and overrides).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from domainstudio.errors import ConfigError

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=64)]
"""A name that is safe as a folder, a DVC stage, an MLflow model and a URL."""

MIN_PAIRED_BATCH = 3
"""With fewer images each softmax over the others has one entry, so every pairwise term is 0."""


class Section(BaseModel):
    """Base of all settings: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


S = TypeVar("S", bound=Section)


class PrepareSettings(Section):
    """How images are read, checked, cropped and packed."""

    resolution: int = Field(ge=8, le=2048, multiple_of=8)
    """Height and width of the prepared images, in pixels."""
    crop: Literal["center", "pad"] = "center"
    """`center` keeps the largest centred square; `pad` keeps everything on a square of `background`."""
    background: str = "#ffffff"
    """Colour under transparent pixels and around padded images, as `#rrggbb`."""
    min_size: int = Field(default=16, ge=1)
    """Images whose shorter side has fewer pixels are refused."""
    on_refusal: Literal["stop", "skip"] = "stop"
    """`stop`: a refused file ends the stage, listing all of them. `skip`: they are left out and listed in
    the manifest. Stray files that are no images are never errors."""


class TargetSettings(Section):
    """A target domain: the few images to learn from, and the whole domain to measure against."""

    shots: str
    """Origin of the training images: a folder, an `s3://bucket/prefix`, or a `.yaml` that describes a
    demo domain."""
    number: int | None = Field(default=None, ge=1)
    """How many of them to take, drawn with `seed`; `null` takes all."""
    seed: int = Field(default=0, ge=0)
    """Seed of that draw."""
    domain: str
    """Origin of the whole target domain, the reference of the Fréchet distance. Where it is not
    available, name the shots again: the report then says so."""


class UNetSettings(Section):
    """Architecture of an unconditional UNet trained from scratch (`diffusers.UNet2DModel`)."""

    block_out_channels: tuple[int, ...]
    """Channels of each resolution, from fine to coarse."""
    attention: tuple[bool, ...]
    """Whether each resolution has self-attention; as many entries as `block_out_channels`."""
    layers_per_block: int = Field(default=1, ge=1)
    """Residual blocks per resolution."""
    attention_head_dim: int = Field(default=32, ge=1)
    """Channels of one attention head."""
    norm_num_groups: int = Field(default=16, ge=1)
    """Groups of the group normalisation; divides every entry of `block_out_channels`."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout inside the residual blocks."""
    learned_variance: bool = False
    """Predict the variance too (improved DDPM): twice the output channels, and the `vlb` term."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.attention) != len(self.block_out_channels):
            raise ValueError(
                f"attention has {len(self.attention)} entries and block_out_channels "
                f"{len(self.block_out_channels)}: give one true or false per resolution"
            )
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            raise ValueError(f"norm_num_groups {self.norm_num_groups} must divide {self.block_out_channels}")
        return self


class NoiseSettings(Section):
    """The forward diffusion of a model trained from scratch."""

    num_train_timesteps: int = Field(default=1000, ge=2)
    """Number of noise levels."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    """How noise grows with t, by diffusers' names; `squaredcos_cap_v2` is the cosine schedule."""
    prediction_type: Literal["epsilon", "v_prediction"] = "v_prediction"
    """What the network predicts. A schedule of zero terminal SNR needs `v_prediction`."""
    rescale_betas_zero_snr: bool = True
    """Rescale to zero terminal signal-to-noise ratio (arXiv 2305.08891)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr needs prediction_type v_prediction: pure noise says nothing about x0 "
                "through epsilon"
            )
        return self


class TrainingSettings(Section):
    """One training run, of a source or of an adapted model."""

    steps: int = Field(ge=1)
    """Optimiser steps."""
    batch_size: int = Field(ge=1)
    """Images per process and micro-step. Pairwise losses need at least 3."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Micro-steps per optimiser step."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """What follows the warm-up, by diffusers' names."""
    lr_warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this L2 norm."""
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the averaged weights, which are what is saved; 0 saves the raw weights."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast type of the networks; losses and trainable weights stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    horizontal_flip: bool = False
    """Mirror each training image with probability one half."""
    timesteps: Literal["per_image", "shared"] = "per_image"
    """`shared` draws one noise level per step for the whole batch, so that pairs are comparable."""
    max_timestep: float = Field(default=1.0, gt=0, le=1)
    """Draw t from this first fraction of the noise levels."""
    seed: int = Field(default=0, ge=0)
    """Seed of every random draw, together with the process's rank and the step."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Steps between resumable checkpoints; trackers see the losses when a checkpoint is written."""
    preview_every: int = Field(default=0, ge=0)
    """Steps between preview grids from fixed noise; 0 makes none."""


class PretrainSettings(Section):
    """The stage `pretrain`: a source model from scratch."""

    images: str
    """Origin of the source domain's images (see `targets.*.shots`)."""
    unet: UNetSettings
    """The network."""
    noise: NoiseSettings
    """The forward diffusion."""
    training: TrainingSettings
    """The training run."""


class LossWeights(Section):
    """A method: the weight of every loss term. `mean` is over the batch unless the term says otherwise.

    A term of weight 0 is not computed, and a method without pairwise or detail terms never runs the
    source model: plain fine-tuning costs what it should.
    """

    simple: float = Field(default=1.0, ge=0)
    """Mean squared error of the predicted noise (or velocity)."""
    vlb: float = Field(default=0.001, ge=0)
    """Variational bound of the learned variance; used only where the model predicts it."""
    image: float = Field(default=0.0, ge=0)
    """KL of pairwise-similarity rows of x0, adapted against source. Under `pairwise_reduction`."""
    high_frequency: float = Field(default=0.0, ge=0)
    """The same on the Haar high frequencies of x0. Under `pairwise_reduction`."""
    high_frequency_mse: float = Field(default=0.0, ge=0)
    """Mean squared error between the high frequencies of the adapted x0 and of the training image."""
    pairwise_l2: float = Field(default=0.0, ge=0)
    """Mean squared error between the two batches' pairwise L2 distance matrices."""
    laplacian: float = Field(default=0.0, ge=0)
    """Negative cosine similarity of Laplacian-filtered images (adapted x0, training image)."""
    reconstruction: float = Field(default=0.0, ge=0)
    """Mean squared error of the adapted x0 against the training image. The same error of the source model
    is constant in training, so it is left out."""
    pairwise_reduction: Literal["sum", "mean"] = "sum"
    """`sum`: the paper's Σ_i. `mean`: the released code's element-wise mean, sum / (N(N-1))."""
    pairwise_temperature: float = Field(default=1.0, gt=0)
    """Temperature of the softmax over similarities; the paper's is 1. Below 1 near neighbours count more."""
    pairwise_center: bool = False
    """Subtract each model's batch mean before similarities are taken, so that they compare how images differ
    and not the paper that all share. The paper does not."""
    clamp_x0: bool = True
    """Clamp predicted x0 to the image range before the terms on x0, so that large t does not dominate."""
    noise_weighting: Literal["none", "alpha_bar", "one_minus_alpha_bar"] = "none"
    """Weight of each image in `image` and `high_frequency`, by its noise level: `alpha_bar` trusts clean
    predictions, as a one-step x0 means little at large t; `one_minus_alpha_bar` holds the structure, which is
    decided there, and leaves the details free."""

    @property
    def pairwise(self) -> bool:
        """Whether any term compares pairs of images."""
        return self.image > 0 or self.high_frequency > 0 or self.pairwise_l2 > 0

    @property
    def needs_source(self) -> bool:
        """Whether any term needs the source model's prediction."""
        return self.pairwise


class SampleSettings(Section):
    """The stage `sample`."""

    number: int = Field(ge=1)
    """Images per model; image i is drawn from the noise of seed `seed + i`, in every model."""
    seed: int = Field(default=0, ge=0)
    """Seed of the first image."""
    scheduler: Literal["ddpm", "ddim", "dpm-solver++"] = "ddim"
    """The sampler."""
    steps: int = Field(default=30, ge=1)
    """Denoising steps."""
    batch_size: int = Field(default=50, ge=1)
    """Images per forward pass."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast type while sampling."""


class EvaluateSettings(Section):
    """The stage `evaluate`."""

    features: str = "efficientnet-lite0"
    """Feature network, by its name in `domainstudio.metrics.features`. Figures of different networks are
    never comparable."""
    batch_size: int = Field(default=50, ge=1)
    """Images per forward pass of that network."""
    neighbours: int = Field(default=3, ge=1)
    """k of precision, recall, density and coverage."""
    kid_subset_size: int = Field(default=100, ge=2)
    """Images per subset of the kernel distance; at most the smaller set is used."""
    kid_subsets: int = Field(default=50, ge=1)
    """Number of subsets, whose mean and standard deviation are given."""
    memorized_below: float = Field(ge=0)
    """A generated image nearer than this to a training image (perceptual distance) counts as memorised."""
    seed: int = Field(default=0, ge=0)
    """Seed of the subsets."""


class RegistrySettings(Section):
    """The stage `register`."""

    experiment: str = "domainstudio"
    """MLflow experiment of the runs."""
    model_prefix: str = "domainstudio-"
    """A model is registered as this prefix and the adaptation's name."""
    alias: str = "champion"
    """Alias given to the new version."""


class AdaptationSettings(Section):
    """One adaptation: which source becomes which target, how."""

    source: Name
    """The pretrained model in `models/sources/<source>`."""
    target: Name
    """A key of `targets`."""
    method: Name
    """A key of `methods`."""
    finetune: dict[str, Any] = Field(default_factory=dict)
    """Overrides of the section `finetune` for this adaptation."""
    weights: dict[str, Any] = Field(default_factory=dict)
    """Overrides of the method's weights for this adaptation."""


class Adaptation(Section):
    """An adaptation with every default and override applied."""

    name: Name
    source: Name
    target: Name
    method: Name
    training: TrainingSettings
    weights: LossWeights

    @model_validator(mode="after")
    def _paired_batch(self) -> Self:
        if self.weights.pairwise and self.training.batch_size < MIN_PAIRED_BATCH:
            raise ValueError(
                f"finetune.batch_size must be at least {MIN_PAIRED_BATCH} per process, got "
                f"{self.training.batch_size}: with fewer images every pairwise loss is identically 0. Raise "
                "finetune.batch_size"
            )
        return self


class Settings(Section):
    """The whole of `params.yaml`."""

    prepare: PrepareSettings
    """How images become image sets."""
    pretrain: PretrainSettings
    """The demo's own source model."""
    sources: tuple[Name, ...]
    """Pretrained models, each a folder `models/sources/<name>` in diffusers' format."""
    targets: dict[Name, TargetSettings]
    """Target domains by name."""
    methods: dict[Name, LossWeights]
    """Loss weights by name."""
    finetune: TrainingSettings
    """Defaults of every adaptation's training."""
    adaptations: dict[Name, AdaptationSettings]
    """What to adapt: each makes one model."""
    sample: SampleSettings
    """How images are drawn from a model."""
    evaluate: EvaluateSettings
    """How they are measured."""
    registry: RegistrySettings
    """How models reach the registry."""

    @model_validator(mode="after")
    def _references(self) -> Self:
        for name, adaptation in self.adaptations.items():
            for key, known in (("source", self.sources), ("target", self.targets), ("method", self.methods)):
                if (value := getattr(adaptation, key)) not in known:
                    raise ValueError(
                        f"adaptations.{name}.{key} is {value!r}, but {key}s has only {sorted(known)}. "
                        f"Add it to {key}s, or correct the name"
                    )
        return self

    @cached_property
    def resolved(self) -> dict[str, Adaptation]:
        """Every adaptation with its overrides applied."""
        return {name: self._resolve(name, item) for name, item in self.adaptations.items()}

    def adaptation(self, name: str) -> Adaptation:
        """Return one adaptation with its overrides applied.

        Raises:
            ConfigError: `name` is not a key of `adaptations`.
        """
        if name not in self.resolved:
            raise ConfigError(f"adaptations has no {name!r}; there are {sorted(self.resolved)}")
        return self.resolved[name]

    def _resolve(self, name: str, item: AdaptationSettings) -> Adaptation:
        method = self.methods[item.method]
        return _validate(
            Adaptation,
            {
                "name": name,
                "source": item.source,
                "target": item.target,
                "method": item.method,
                "training": {**self.finetune.model_dump(), **item.finetune},
                "weights": {**method.model_dump(), **item.weights},
            },
            f"adaptations.{name}",
        )


def load(path: str | Path = "params.yaml") -> Settings:
    """Read and check `params.yaml`, adaptations and their overrides included.

    Raises:
        ConfigError: the file is missing, is not YAML, or a key is missing, unknown or out of range.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist: run from the project's root, or name the file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} must hold a mapping of sections, got {type(values).__name__}")
    settings = _validate(Settings, values, str(path))
    _ = settings.resolved
    return settings


def _validate(model: type[S], values: Mapping[str, Any], where: str) -> S:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or '(whole)'}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"{where} is not usable:\n" + "\n".join(lines)) from error
