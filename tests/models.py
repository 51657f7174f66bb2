"""Small real models for tests."""

from __future__ import annotations

import numpy as np
import torch

from domainstudio.config import LossWeights, NoiseSettings, TrainingSettings, UNetSettings
from domainstudio.models.unconditional import UnconditionalDenoiser

RESOLUTION = 8


def tiny_denoiser(seed: int = 0, *, learned_variance: bool = False, **noise) -> UnconditionalDenoiser:
    """Return an untrained UNet of 8x8 pixels with attention."""
    torch.manual_seed(seed)
    unet = UNetSettings(
        block_out_channels=(8, 16),
        attention=(False, True),
        attention_head_dim=8,
        norm_num_groups=4,
        learned_variance=learned_variance,
    )
    return UnconditionalDenoiser.new(unet, NoiseSettings(**noise), RESOLUTION)


def tiny_images(number: int = 6, seed: int = 0) -> np.ndarray:
    """Return random uint8 images, with shape (number, 3, 8, 8)."""
    return np.random.default_rng(seed).integers(0, 256, (number, 3, RESOLUTION, RESOLUTION), dtype=np.uint8)


def training_settings(**changes) -> TrainingSettings:
    """Return settings of a training of a few steps."""
    return TrainingSettings(
        **{"steps": 6, "batch_size": 4, "learning_rate": 1e-3, "checkpoint_every": 2, **changes}
    )


PLAIN = LossWeights()
DOMAINSTUDIO = LossWeights(image=0.5, high_frequency=0.5, high_frequency_mse=0.05)
PAIRWISE_L2 = LossWeights(pairwise_l2=0.5, laplacian=0.5, reconstruction=1.0)
