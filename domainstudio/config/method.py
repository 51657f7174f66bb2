"""Methods: weights of the loss terms, and what is trained."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from domainstudio.config.base import Section, Text

MIN_PAIRED_BATCH = 3
"""With fewer images each softmax over the others has one entry, so every pairwise term is 0."""

PAIRWISE_TERMS = ("image", "high_frequency", "pairwise_l2")
"""The terms that compare pairs of images."""

DETAIL_TERMS = ("high_frequency_mse", "laplacian", "reconstruction")
"""The terms that compare each x0 with its own training image."""


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
    """Mean squared error of the adapted x0 against the training image."""
    prior_reconstruction: float = Field(default=0.0, ge=0)
    """Mean squared error of the adapted x0 on the source domain's images, those of `prior`, in the
    model's own space: the source half of the brief's reconstruction."""
    pairwise_reduction: Literal["sum", "mean"] = "sum"
    """`sum`: the paper's Σ_i. `mean`: the released code's element-wise mean, sum / (N(N-1))."""
    pairwise_temperature: float = Field(default=1.0, gt=0)
    """Temperature of the softmax over similarities; the paper's is 1. Below 1 near neighbours count more."""
    pairwise_center: bool = False
    """Subtract each model's batch mean before similarities are taken. So they compare how images differ, and
    not the background that all share. The published method does not subtract it."""
    space: Literal["pixel", "latent"] = "pixel"
    """What the terms on x0 compare: `pixel` images, decoded if the model works in latents; `latent` x0 as it
    is."""
    decoder: Literal["linear", "tiny", "full"] = "linear"
    """What decodes latents to the images that the terms on x0 compare, under `space: pixel`. `linear`: one
    convolution, fitted to the training images and the prior's by least squares, at next to no cost. `tiny`:
    the small VAE of `tiny_vae`. `full`: the model's own VAE, image by image, at several times the cost of the
    rest of the step."""
    tiny_vae: Text | None = None
    """An `AutoencoderTiny`, a folder or a hub id, for `decoder: tiny`."""
    min_snr_gamma: float | None = Field(default=None, gt=0)
    """γ of Min-SNR weighting of the denoising errors (arXiv 2303.09556); `null` weighs all levels alike."""
    flow_weighting: Literal["none", "sigma_squared", "cosmap"] = "none"
    """Weight of the denoising errors of flow-matching models, by σ. `none` is the velocity's own error, as in
    the paper of SD3. `sigma_squared` is the error of x0, as in diffusers' script for SD3."""
    clamp_x0: bool = True
    """Clamp predicted x0 to the image range before the terms on x0, so that large t does not dominate.
    Latents have no such range: under `space: latent` those of latent models are not clamped."""
    noise_weighting: Literal["none", "alpha_bar", "one_minus_alpha_bar"] = "none"
    """Weight of each image in `image`, `high_frequency` and `pairwise_l2`, by its noise level. `alpha_bar`
    prefers low noise, where x0 is predicted well. `one_minus_alpha_bar` prefers high noise, where the
    structure of an image is decided, and leaves the details free."""

    @model_validator(mode="after")
    def _decodes(self) -> Self:
        if (self.decoder == "tiny") != (self.tiny_vae is not None):
            raise ValueError(
                f"decoder is {self.decoder} and tiny_vae is {self.tiny_vae}: set decoder: tiny together with "
                "tiny_vae, a folder or a hub id such as madebyollin/taesd, or neither"
            )
        return self

    @property
    def pairwise(self) -> bool:
        """Whether any term compares pairs of images, and so needs the source model's prediction."""
        return any(getattr(self, name) > 0 for name in PAIRWISE_TERMS)

    @property
    def compares_images(self) -> bool:
        """Whether any term compares images of x0."""
        return self.space == "pixel" and any(
            getattr(self, name) > 0 for name in (*PAIRWISE_TERMS, *DETAIL_TERMS)
        )

    @property
    def uses_prior(self) -> bool:
        """Whether any term needs images of the source domain."""
        return self.prior > 0 or self.prior_reconstruction > 0


class LoraSettings(Section):
    """Low-rank adapters in place of full fine-tuning (arXiv 2106.09685)."""

    rank: int = Field(default=8, ge=1)
    """Rank r of each update."""
    alpha: float | None = Field(default=None, gt=0)
    """Updates are scaled by alpha / rank; `null` means alpha = rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' input."""
    modules: tuple[Text, ...] = Field(default=("to_q", "to_k", "to_v", "to_out.0"), min_length=1)
    """Layers that get an adapter, by the end of their names: the attention's projections."""
    text_encoder: bool = False
    """Adapters in the text encoders too."""


class Method(LossWeights):
    """A method: loss weights, and whether the whole network or adapters are trained."""

    lora: LoraSettings | None = None
    """Adapters to train; `null` trains the whole network."""
