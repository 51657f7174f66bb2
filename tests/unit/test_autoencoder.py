"""Training a small VAE: resumed as if undisturbed, and latents of unit variance."""

import shutil

import numpy as np
import torch

from domainstudio.config import AutoencoderSettings
from domainstudio.demo.autoencoder import augment, train_autoencoder
from tests.models import tiny_images

SETTINGS = AutoencoderSettings(
    block_out_channels=(8, 8), norm_num_groups=4, steps=6, batch_size=4, checkpoint_every=2
)


def trained(folder, images=None, **changes):
    images = tiny_images() if images is None else images
    return train_autoencoder(images, SETTINGS.model_copy(update=changes), folder, torch.device("cpu"))


def test_a_resumed_training_ends_the_same(tmp_path):
    whole, _ = trained(tmp_path / "a"), trained(tmp_path / "b")
    shutil.rmtree(max((tmp_path / "b").glob("step-*")))  # what a kill before the last checkpoint leaves
    resumed = trained(tmp_path / "b")
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
    assert whole.config.scaling_factor == resumed.config.scaling_factor


def test_it_learns_and_its_latents_are_scaled_to_unit_variance(tmp_path):
    ramp = np.linspace(0, 255, 8, dtype=np.uint8)
    images = np.stack([np.broadcast_to(ramp // (i + 1), (3, 8, 8)) for i in range(4)])
    x = torch.from_numpy(images).float() / 127.5 - 1

    def error(vae):
        with torch.no_grad():
            return (vae.decode(vae.encode(x).latent_dist.mean).sample - x).abs().mean()

    vae = trained(tmp_path / "b", images, steps=60, learning_rate=5e-3, checkpoint_every=60)
    assert error(vae) < error(trained(tmp_path / "a", images, steps=1)) / 2
    with torch.no_grad():
        latents = vae.encode(x).latent_dist.mean * vae.config.scaling_factor
    assert abs(latents.std() - 1) < 0.01


def test_augmented_images_stay_in_range_and_follow_their_generator():
    images = torch.from_numpy(tiny_images(32))
    first, again, other = (augment(images, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert first.shape == images.shape and first.abs().max() <= 1
    assert torch.equal(first, again) and not torch.equal(first, other)
