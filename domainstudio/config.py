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

Style = Literal["grey", "sepia", "blueprint", "negative", "pastel", "stencil"]
"""A style that `domainstudio.datasets.styles` can give to images."""

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
    aspect_buckets: bool = False
    """Train on the shots in shapes of about `resolution`² pixels, each image in that of the nearest aspect
    ratio, in place of squares. For models that take several sizes: text-to-image ones, and pixel-space ones
    whose UNet can halve every side. The domain stays square."""
    on_refusal: Literal["stop", "skip"] = "stop"
    """`stop`: a refused file ends the stage, listing all of them. `skip`: they are left out and listed in
    the manifest. Stray files that are no images are never errors."""


class SourceSettings(Section):
    """A pretrained model, the folder `models/sources/<name>` in diffusers' format."""

    subjects: str
    """A text file with a subject or class per line, which models that are told something draw in turn. A
    subject takes the place of `{caption}` and `{label}` in an adaptation's prompts; the source model is told
    it as it is."""


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


class AutoencoderSettings(Section):
    """A small VAE trained from scratch (`diffusers.AutoencoderKL`)."""

    block_out_channels: tuple[int, ...] = (32, 64)
    """Channels of each resolution; each but the last halves height and width."""
    layers_per_block: int = Field(default=1, ge=1)
    """Residual blocks per resolution."""
    latent_channels: int = Field(default=4, ge=1)
    """Channels of a latent."""
    norm_num_groups: int = Field(default=16, ge=1)
    """Groups of the group normalisation."""
    kl_weight: float = Field(default=1e-4, ge=0)
    """Weight of the latents' divergence from a standard normal, per latent value."""
    steps: int = Field(ge=1)
    """Optimiser steps."""
    batch_size: int = Field(default=32, ge=1)
    """Images per step."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of AdamW, which a cosine brings to 0."""
    seed: int = Field(default=0, ge=0)
    """Seed of every random draw."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between resumable checkpoints."""


class TextModelSettings(Section):
    """A small text-to-image model trained from scratch, in Stable Diffusion's layout."""

    block_out_channels: tuple[int, ...]
    """The UNet's channels of each resolution."""
    attention: tuple[bool, ...]
    """Whether each resolution attends to itself and to the prompt."""
    layers_per_block: int = Field(default=1, ge=1)
    """Residual blocks per resolution."""
    attention_heads: int = Field(default=4, ge=1)
    """Heads of each attention layer."""
    norm_num_groups: int = Field(default=16, ge=1)
    """Groups of the group normalisation."""
    text_width: int = Field(default=128, multiple_of=32)
    """Channels of the text encoder; 32 per head."""
    text_layers: int = Field(default=3, ge=1)
    """Layers of the text encoder."""
    vocabulary: int = Field(default=1024, ge=514)
    """Largest number of tokens, of which 514 are always there: begin, end, and every byte in two forms."""
    prompt_length: int = Field(default=24, ge=4)
    """Tokens of a prompt, begin and end included."""


class TextEncoderSettings(Section):
    """A small text encoder's training, on what its texts show."""

    steps: int = Field(ge=1)
    """Optimiser steps."""
    batch_size: int = Field(default=128, ge=1)
    """Texts per step."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of AdamW, which a cosine brings to 0."""
    seed: int = Field(default=0, ge=0)
    """Seed of every random draw."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between resumable checkpoints."""


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
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit` keeps its state in 8 bits (bitsandbytes, CUDA only): 2 bytes per trained weight, not 8."""
    frozen_precision: Literal["no", "bf16", "fp16"] = "no"
    """Type in which frozen UNets are kept: the source model's, and the base of adapters. VAE and text
    encoders stay float32. Needs `mixed_precision`."""
    compile: bool = False
    """Compile the network (`torch.compile`): a slow first step, then faster ones."""
    horizontal_flip: bool = False
    """Mirror each training image with probability one half."""
    timesteps: Literal["per_image", "shared"] = "per_image"
    """`shared` draws one noise level per step for the whole batch, so that pairs are comparable."""
    max_timestep: float = Field(default=1.0, gt=0, le=1)
    """Draw t from this first fraction of the noise levels."""
    condition_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of training an image without its prompt or class, for classifier-free guidance."""
    train_text_encoder: bool = False
    """Train the text encoders too; then prompts are encoded at every step."""
    seed: int = Field(default=0, ge=0)
    """Seed of every random draw, together with the process's rank and the step."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Steps between resumable checkpoints; trackers see the losses when a checkpoint is written."""
    preview_every: int = Field(default=0, ge=0)
    """Steps between preview grids from fixed noise; 0 makes none."""

    @model_validator(mode="after")
    def _frozen_precision(self) -> Self:
        if self.frozen_precision != "no" and self.mixed_precision != self.frozen_precision:
            raise ValueError(
                f"frozen_precision {self.frozen_precision} needs mixed_precision {self.frozen_precision}, "
                f"got {self.mixed_precision}: trained and frozen weights meet under autocast only"
            )
        return self


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


class PretrainTextSettings(Section):
    """The stage `pretrain_text`: a small text-to-image source model from scratch."""

    held_out: int = Field(default=0, ge=0)
    """Images kept from training, to see what the model makes of prompts that it has never met."""
    held_out_seed: int = Field(default=0, ge=0)
    """Seed of that draw."""
    styles: tuple[Style, ...] = ()
    """Styles in which half of the images are shown, told as "… in grey style": from them the model learns
    that such words go with every subject, as those for a new style will."""
    vae: AutoencoderSettings
    """The autoencoder, trained first."""
    model: TextModelSettings
    """UNet and text encoder."""
    text_encoder: TextEncoderSettings
    """The text encoder's own training, before the UNet's."""
    noise: NoiseSettings
    """The forward diffusion."""
    training: TrainingSettings
    """The training run."""


class PretrainClassSettings(Section):
    """The stage `pretrain_class`: a class-conditional source model from an unconditional one.

    Its classes are the labels of the prepared source images.
    """

    source: Name
    """The unconditional model to start from, in `models/sources/<source>`."""
    training: TrainingSettings
    """The training run. Its `condition_dropout` trains the null class that guidance needs."""


class LossWeights(Section):
    """A method: the weight of every loss term. `mean` is over the batch unless the term says otherwise.

    A term of weight 0 is not computed, and a method without pairwise terms never runs the source model:
    plain fine-tuning costs what it should.
    """

    simple: float = Field(default=1.0, ge=0)
    """Mean squared error of the predicted noise (or velocity)."""
    prior: float = Field(default=0.0, ge=0)
    """Mean squared error on images of the source domain under the source prompt (prior preservation,
    DreamBooth, arXiv 2208.12242). The adaptation's `prior` says which images."""
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
    space: Literal["pixel", "latent"] = "pixel"
    """Where the terms on x0 compare: images, decoded where the model works in latents, or x0 as it is."""
    tiny_vae: str | None = None
    """Decode for those terms with this `AutoencoderTiny`, a folder or a hub id, in place of the model's own
    VAE: less memory and time, and a rougher picture."""
    min_snr_gamma: float | None = Field(default=None, gt=0)
    """γ of Min-SNR weighting of the denoising errors (arXiv 2303.09556); `null` weighs all levels alike."""
    clamp_x0: bool = True
    """Clamp predicted x0 to the image range before the terms on x0, so that large t does not dominate."""
    noise_weighting: Literal["none", "alpha_bar", "one_minus_alpha_bar"] = "none"
    """Weight of each image in `image` and `high_frequency`, by its noise level: `alpha_bar` trusts clean
    predictions, as a one-step x0 means little at large t; `one_minus_alpha_bar` holds the structure, which is
    decided there, and leaves the details free."""

    @property
    def pairwise(self) -> bool:
        """Whether any term compares pairs of images, and so needs the source model's prediction."""
        return self.image > 0 or self.high_frequency > 0 or self.pairwise_l2 > 0


class LoraSettings(Section):
    """Low-rank adapters in place of full fine-tuning (arXiv 2106.09685)."""

    rank: int = Field(default=8, ge=1)
    """Rank r of each update."""
    alpha: float | None = Field(default=None, gt=0)
    """Updates are scaled by alpha / rank; `null` means alpha = rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' input."""
    modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Layers that get an adapter, by the end of their names: the attention's projections."""
    text_encoder: bool = False
    """Adapters in the text encoders too."""


class Method(LossWeights):
    """A method: loss weights, and whether the whole network or adapters are trained."""

    lora: LoraSettings | None = None
    """Adapters to train; `null` trains the whole network."""


class PromptPair(Section):
    """What each model is told of a training image: prompts, or classes.

    `{caption}` and `{label}` stand for the image's own. Models that are told nothing ignore them.
    """

    source: str = "{caption}"
    """What the source model is told, and the adapted model on images of the source domain."""
    target: str = "{caption} in [V] style"
    """What the adapted model is told of an image of the target domain."""


class PromptSettings(PromptPair):
    """Prompts or classes of the training images.

    To personalise, put images of the subject and of the style into two folders of one target, and say of each
    folder what its images are told: then "a [S] dog in [V] style" joins both.
    """

    new_tokens: dict[str, str] = Field(default_factory=dict)
    """New words for the text encoder, such as "[V]", each with a known word that its embedding begins as.
    Their embeddings are trained, the other words' are not."""
    by_label: dict[str, PromptPair] = Field(default_factory=dict)
    """Other prompts for images of some labels (folders of the target)."""


class PriorSettings(Section):
    """Images of the source domain for prior preservation, used where the method's `prior` is above 0."""

    images: Literal["generated", "source"] = "generated"
    """`generated`: drawn from the source model, once, and kept. `source`: the prepared source images."""
    number: int = Field(default=200, ge=1)
    """How many."""
    seed: int = Field(default=0, ge=0)
    """Seed of the first generated image, or of the draw among the source images."""


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
    guidance_scale: float = Field(default=1.0, ge=0)
    """Classifier-free guidance of models that are told something; 1 is without."""
    negative: str = ""
    """Prompt or class that guidance leads away from; "" is the model without a condition."""
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
    clip: str | None = None
    """CLIP model for the CLIP score and Intra-CLIP: a folder in transformers' layout, or a hub id; `null`
    measures neither. DVC does not watch that folder; its weights' hash stands in metrics.json."""
    seed: int = Field(default=0, ge=0)
    """Seed of the subsets."""


class ToleranceSettings(Section):
    """How much worse than the champion's a figure may be, as a share of the champion's; `null`: no rule."""

    frechet_distance: float = Field(default=0.05, ge=0)
    """Of the Fréchet distance: nearness to the domain."""
    kid: float | None = Field(default=None, ge=0)
    """Of the kernel distance. Near 0 its own spread is larger than any share of it."""
    intra_distance: float = Field(default=0.05, ge=0)
    """Of the intra distance: diversity."""
    top_1: float | None = Field(default=None, ge=0)
    """Of the share of samples that keep their subject, of models that are told subjects."""


class GateSettings(Section):
    """What a new version must show to take the champion's place, measured in the same way."""

    max_memorized_share: float = Field(default=0.05, ge=0, le=1)
    """Largest share of samples that are copies of training images, whatever the champion's is. Of real images
    of the demo's domain 2% are as near to a training image."""
    tolerance: ToleranceSettings = ToleranceSettings()
    """How much worse each figure may be."""
    margin: float = Field(default=0.05, ge=0)
    """At least one figure with a tolerance must be better by this share of the champion's."""


class RegistrySettings(Section):
    """The stage `register`."""

    experiment: str = "domainstudio"
    """MLflow experiment of the runs."""
    model_prefix: str = "domainstudio-"
    """A model is registered as this prefix and the adaptation's name."""
    alias: str = "champion"
    """Alias of the version to use. The one before it has `previous_<alias>`, a newer one that did not take
    its place `challenger`."""
    gate: GateSettings | None = GateSettings()
    """What a new version must show to get the alias; `null` gives it to the newest."""


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
    """Overrides of the method for this adaptation."""
    prompts: PromptSettings = PromptSettings()
    """Prompts or classes of the training images."""
    prior: PriorSettings = PriorSettings()
    """Images for prior preservation."""


class Adaptation(Section):
    """An adaptation with every default and override applied."""

    name: Name
    source: Name
    target: Name
    method: Name
    training: TrainingSettings
    weights: Method
    prompts: PromptSettings
    prior: PriorSettings

    @model_validator(mode="after")
    def _paired_batch(self) -> Self:
        if self.weights.pairwise and self.training.batch_size < MIN_PAIRED_BATCH:
            raise ValueError(
                f"finetune.batch_size must be at least {MIN_PAIRED_BATCH} per process, got "
                f"{self.training.batch_size}: with fewer images every pairwise loss is identically 0. Raise "
                "finetune.batch_size"
            )
        return self


class LaunchSettings(Section):
    """Several processes for each stage that trains, draws or measures: one per GPU, by accelerate."""

    processes: int = Field(default=1, ge=1)
    """Processes, and GPUs, of such a stage on this machine. A training's batch is `batch_size` of each."""
    accelerate_config: str | None = None
    """A file that `accelerate config` wrote, for FSDP (version 2) or several nodes; its own number of
    processes then counts."""


class RangeSettings(Section):
    """Numbers to draw from; whole ones where both ends are whole."""

    low: int | float
    """Smallest value."""
    high: int | float
    """Largest value."""
    scale: Literal["linear", "log"] = "linear"
    """`log` draws each order of magnitude as often as any other: for learning rates and weights."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"scale log needs low above 0, got {self.low}")
        return self


class ObjectiveSettings(Section):
    """What makes a setting the best: metrics of the samples by their names in metrics.json, such as
    `frechet_distance`, `intra_distance`, `coverage` or `clip_score`; means over the sweep's `seeds`.
    """

    metric: str = "frechet_distance"
    """What is compared."""
    direction: Literal["minimize", "maximize"] = "minimize"
    """Which values are better."""
    at_most: dict[str, float] = Field(default_factory=dict)
    """Largest values of metrics, such as `{memorized_share: 0.05}`, for a setting to be the best."""
    at_least: dict[str, float] = Field(default_factory=dict)
    """Smallest values, likewise."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Every metric that decides, the compared one first."""
        return tuple(dict.fromkeys([self.metric, *self.at_most, *self.at_least]))


class SweepSettings(Section):
    """Settings of an adaptation to try side by side, each of them a trial on a Ray cluster.

    Keys of `grid` and `random` are dotted keys of an adaptation: `source`, `target`, `method`,
    `weights.image`, `finetune.learning_rate`, `prior.number` and so on.
    """

    adaptation: Name
    """A key of `adaptations`, whose values hold for whatever is not swept."""
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Values of each key; every combination is tried."""
    random: dict[str, tuple[Any, ...] | RangeSettings] = Field(default_factory=dict)
    """Values or a range of each key, from which `draws` settings are drawn; with a grid, each with all of its
    combinations."""
    draws: int | None = Field(default=None, ge=1)
    """How many. More of them begin with the same ones."""
    draw_seed: int = Field(default=0, ge=0)
    """Seed of the draws."""
    seeds: tuple[int, ...] = ()
    """Seeds of training: each setting is trained with each. None: the adaptation's own."""
    objective: ObjectiveSettings = ObjectiveSettings()
    """Which setting is the best."""
    gpus: float = Field(default=1.0, ge=0, le=1)
    """GPUs of a trial, which is one process: 1, or a fraction such as 0.5 for two trials on each GPU."""
    cpus: float = Field(default=1.0, ge=0)
    """CPU cores of a trial, for Ray's bookkeeping."""
    retries: int = Field(default=3, ge=0)
    """Further attempts at a trial whose node or process died; one that raised an error is not tried again."""
    send_inputs: bool = False
    """Send images and source models through Ray, to nodes that do not see this project's folder."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.grid and not self.random:
            raise ValueError("neither grid nor random has a key: there is nothing to try")
        if twice := sorted(self.grid.keys() & self.random.keys()):
            raise ValueError(f"{', '.join(twice)}: in grid and in random; keep one")
        if empty := sorted(key for key, values in {**self.grid, **self.random}.items() if values == ()):
            raise ValueError(f"{', '.join(empty)}: no values")
        if bool(self.random) != (self.draws is not None):
            raise ValueError("random needs draws, the number of settings to draw, and draws needs random")
        if self.seeds and "finetune.seed" in {**self.grid, **self.random}:
            raise ValueError("finetune.seed: in grid or random, and given by seeds; keep one")
        return self


class Settings(Section):
    """The whole of `params.yaml`."""

    prepare: PrepareSettings
    """How images become image sets."""
    pretrain: PretrainSettings
    """The demo's own source model."""
    pretrain_text: PretrainTextSettings
    """The demo's own text-to-image source model."""
    pretrain_class: PretrainClassSettings
    """The demo's own class-conditional source model."""
    sources: dict[Name, SourceSettings]
    """Pretrained models by name."""
    targets: dict[Name, TargetSettings]
    """Target domains by name."""
    methods: dict[Name, Method]
    """Loss weights, and what is trained, by name."""
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
    launch: LaunchSettings = LaunchSettings()
    """How many processes do the work."""
    sweeps: dict[Name, SweepSettings] = Field(default_factory=dict)
    """Settings to try side by side, by name of the sweep."""

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

    def overridden(self, name: str, values: Mapping[str, Any]) -> Adaptation:
        """Return one adaptation with further overrides applied.

        Args:
            name: a key of `adaptations`.
            values: by dotted key of the adaptation, such as `method` or `weights.image`.

        Raises:
            ConfigError: a name, key or value is not possible.
        """
        self.adaptation(name)
        item = self.adaptations[name].model_dump(exclude_unset=True)
        for key, value in values.items():
            section, (*path, last) = item, key.split(".")
            for part in path:
                if not isinstance(section.get(part), dict):
                    section[part] = {}
                section = section[part]
            section[last] = value
        whole = self.model_dump(exclude_unset=True, exclude={"sweeps"}) | {"adaptations": {name: item}}
        where = f"adaptations.{name} with {', '.join(f'{key} {value}' for key, value in values.items())}"
        return _validate(Settings, whole, where).adaptation(name)

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
                "weights": _merged(method.model_dump(), item.weights),
                "prompts": item.prompts,
                "prior": item.prior,
            },
            f"adaptations.{name}",
        )


def load(path: str | Path = "params.yaml", *overlays: str | Path) -> Settings:
    """Read and check `params.yaml`, adaptations and their overrides included.

    Args:
        path: the file.
        overlays: files whose keys are added to those of the sections, or replace them.

    Raises:
        ConfigError: a file is missing, is not YAML, or a key is missing, unknown or out of range.
    """
    values = _read(Path(path))
    for overlay in overlays:
        for name, section in _read(Path(overlay)).items():
            values[name] = {**values.get(name, {}), **section} if isinstance(section, Mapping) else section
    settings = _validate(Settings, values, " and ".join(map(str, (path, *overlays))))
    _ = settings.resolved
    return settings


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist: run from the project's root, or name the file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} must hold a mapping of sections, got {type(values).__name__}")
    return dict(values)


def _merged(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with overrides, also of single keys of a section inside, such as `lora.rank`."""
    merged = dict(values)
    for key, value in overrides.items():
        inside = values.get(key)
        both = isinstance(inside, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(inside, value) if both else value  # type: ignore[arg-type]
    return merged


def _validate(model: type[S], values: Mapping[str, Any], where: str) -> S:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or '(whole)'}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"{where} is not usable:\n" + "\n".join(lines)) from error
