"""The images that the loss terms compare: by a linear map, or by the VAE for one image after the other."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from domainstudio import models
from domainstudio.config import LossWeights
from domainstudio.models.denoiser import Prediction
from domainstudio.models.linear_decoder import LinearDecoder, fit
from domainstudio.training.decoders import make_decoder, one_by_one
from domainstudio.training.objective import Batch, Objective, noisy_batch
from tests.models import DOMAINSTUDIO, TEXT_RESOLUTION, tiny_images, tiny_latent_denoiser, training_settings
from tests.project import ROOT


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_linear_map_is_found_again():
    true = LinearDecoder(torch.randn(12, 4, 3, 3, generator=generator()), torch.randn(12), 2)
    latents = torch.randn(5, 4, 8, 6, generator=generator(1))
    found = fit((each, true(each)) for each in latents.split(2))
    unseen = torch.randn(2, 4, 10, 10, generator=generator(2), requires_grad=True)
    images = found(unseen)
    assert images.shape == (2, 3, 20, 20)
    torch.testing.assert_close(images, true(unseen), atol=1e-3, rtol=1e-3)
    images.sum().backward()
    assert unseen.grad is not None and unseen.grad.abs().sum() > 0


def test_drawings_in_black_teach_a_linear_map_colours(monkeypatch):
    """Fails where it is fitted to the training images as they are: the source model's x0 is coloured."""
    monkeypatch.chdir(ROOT)
    denoiser = models.load("models/sources/noto-text")
    grey = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (6, 1, 4, 4))
    drawings = torch.from_numpy(grey.repeat(8, axis=2).repeat(8, axis=3).repeat(3, axis=1))
    decode = make_decoder(denoiser, DOMAINSTUDIO, [drawings])
    squares = np.random.default_rng(1).integers(0, 256, (8, 3, 4, 4), dtype=np.uint8)
    images = torch.from_numpy(squares.repeat(8, axis=2).repeat(8, axis=3)).float() / 127.5 - 1
    with torch.no_grad():
        encoded = denoiser.encode(images)
        encoded[:, 4:] = 0
        error = (decode(denoiser.x0(encoded, generator())) - images).square().mean().sqrt()
    assert error < 0.5 * images.std()


def test_the_whole_decoder_holds_one_image_at_a_time():
    denoiser, rows = tiny_latent_denoiser(), []
    denoiser.vae.decoder.conv_in.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    x0 = torch.randn(3, *denoiser.shape, generator=generator(), requires_grad=True)
    weight = torch.randn(3, 3, TEXT_RESOLUTION, TEXT_RESOLUTION, generator=generator(1))
    (expected,) = torch.autograd.grad((denoiser.decode(x0) * weight).sum(), x0)
    rows.clear()
    kept = []

    def keep(x):
        kept.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        images = one_by_one(denoiser.decode)(x0)
    torch.testing.assert_close(images, denoiser.decode(x0))
    (found,) = torch.autograd.grad((images * weight).sum(), x0)
    torch.testing.assert_close(found, expected)
    assert rows == [1, 1, 1, 3, 1, 1, 1]  # once more in the backward pass
    assert all(shape == x0[:1].shape for shape in kept)  # nothing within the decoder is kept until then


def test_a_perfect_prediction_has_no_error_in_a_rough_map(monkeypatch):
    denoiser = tiny_latent_denoiser(prediction_type="epsilon", rescale_betas_zero_snr=False)
    images = torch.from_numpy(tiny_images(4, side=TEXT_RESOLUTION)).float() / 127.5 - 1
    x0 = denoiser.x0(denoiser.encode(images), generator())
    batch = noisy_batch(
        denoiser, Batch(images, x0, {}, {}), training_settings(max_timestep=0.3), generator(1), generator(2)
    )
    truth = denoiser.schedule.true_output(x0, batch.noise, batch.timesteps)
    monkeypatch.setattr(denoiser, "predict", lambda *_: Prediction(truth))
    rough = LinearDecoder(torch.randn(12, 4, 3, 3, generator=generator(3)), torch.zeros(12), 2)
    weights = LossWeights(high_frequency_mse=1.0, reconstruction=1.0)
    terms = Objective(denoiser, weights, decode=rough, exact=False)(batch)
    assert terms["reconstruction"] < 1e-8 and terms["high_frequency_mse"] < 1e-8
    assert Objective(denoiser, weights, decode=rough)(batch)["reconstruction"] > 0.1


@pytest.mark.parametrize("values", [{"decoder": "tiny"}, {"tiny_vae": "madebyollin/taesd"}])
def test_a_tiny_vae_is_named_together_with_its_decoder(values):
    with pytest.raises(ValidationError, match="set decoder: tiny together with tiny_vae"):
        LossWeights(**values)


def test_what_a_linear_map_is_fitted_to_is_encoded_once(tmp_path, monkeypatch):
    denoiser = tiny_latent_denoiser()
    shots, prior = (torch.from_numpy(tiny_images(number, side=TEXT_RESOLUTION)) for number in (4, 5))
    first = make_decoder(denoiser, DOMAINSTUDIO, [shots], prior, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3  # shots, recoloured shots, prior
    monkeypatch.setattr(denoiser, "encode", None)
    again = make_decoder(denoiser, DOMAINSTUDIO, [shots], prior, tmp_path)
    x0 = torch.randn(2, *denoiser.shape)
    torch.testing.assert_close(functional.mse_loss(first(x0), again(x0)), torch.tensor(0.0))
