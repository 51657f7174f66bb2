"""The objective of a text-to-image model: who predicts what, where gradients go, and that they are right."""

from contextlib import contextmanager
from itertools import product

import pytest
import torch

from domainstudio.config import LossWeights
from domainstudio.models.condition import concatenate
from domainstudio.training import losses
from domainstudio.training.objective import Batch, Objective, noisy_batch
from domainstudio.training.wavelet import high_frequency
from tests.models import DOMAINSTUDIO, tiny_text_denoiser, tiny_text_images, training_settings

NUMBER, PRIOR = 4, 3
TARGET = ["a red house [V]", "a small boat [V]", "the moon [V]", "a blue cup [V]"]
SOURCE = ["a red house", "a small boat", "the moon", "a blue cup"]
DETAILS = ("high_frequency_mse", "laplacian", "reconstruction")
TERMS = ("simple", "prior", "prior_reconstruction", "image", "high_frequency", "pairwise_l2", *DETAILS)
NONE = dict.fromkeys((*TERMS, "vlb"), 0.0)


def only(*terms, **options):
    return LossWeights(**{**NONE, **dict.fromkeys(terms, 1.0), **options})


def generator(seed):
    return torch.Generator().manual_seed(seed)


def batch_of(denoiser, source, dtype=torch.float32, low=0.3):
    """Return a batch of the target domain's images and of prior preservation, at small noise levels."""
    images = torch.from_numpy(tiny_text_images(NUMBER + PRIOR)).to(dtype) / 127.5 - 1
    x0 = denoiser.x0(denoiser.encode(images), generator(0))
    told = concatenate(denoiser.condition(TARGET), denoiser.condition(SOURCE[:PRIOR]))
    batch = Batch(images[:NUMBER], x0, told, source.condition(SOURCE))
    return noisy_batch(denoiser, batch, training_settings(max_timestep=low), generator(1), generator(2))


def models(kind="sd1", **trained):
    """Return an adapted model that has left its source, and that source."""
    adapted = tiny_text_denoiser(kind)
    adapted.train(**trained)
    source = adapted.frozen_source()
    with torch.no_grad():
        for index, parameter in enumerate(p for p in adapted.network.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=generator(index)) * 0.05)
    return adapted, source


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}


def assert_frozen(*modules):
    for module in modules:
        assert all(p.grad is None and not p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("term", TERMS)
def test_gradients_reach_trained_text_encoders(term):
    adapted, source = models(text_encoders=True)
    Objective(adapted, only(term), source)(batch_of(adapted, source))[term].backward()
    assert len(gradients(adapted.pipeline.text_encoder)) > 20
    assert_frozen(adapted.vae, source.network)


@pytest.mark.parametrize(
    ("kind", "trained"),
    [
        *product(
            ["sd1", "sd2", "sdxl", "sd3"],
            [{}, {"text_encoders": True}, {"unet": False, "text_encoders": True}],
        ),
        *product(["z-image", "flux-1", "flux-2", "qwen-image"], [{}]),
    ],
)
def test_everything_that_is_trained_gets_a_gradient(kind, trained):
    """Over several processes a trained weight without a gradient is an error."""
    adapted, source = models(kind, **trained)
    Objective(adapted, only("simple"), source)(batch_of(adapted, source))["simple"].backward()
    without = [n for n, p in adapted.network.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert any(p.requires_grad for p in adapted.denoising.parameters()) == trained.get("unet", True)


@pytest.mark.parametrize("space", ["pixel", "latent"])
@pytest.mark.parametrize("term", TERMS)
def test_gradients_are_those_of_finite_differences_and_reach_the_adapted_unet_only(term, space):
    """In float64, along a random direction of all of the UNet's weights, through the VAE in pixel space."""
    adapted, source = models()
    for part in (adapted.network, adapted.vae, source.network):
        part.double()
    batch = batch_of(adapted, source, torch.float64)
    compute = Objective(adapted, only(term, space=space), source)
    terms = compute(batch)
    assert set(terms) == {term} and terms[term].dtype == torch.float64
    terms[term].backward()
    parameters = list(adapted.pipeline.unet.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
    assert len(gradients(adapted.pipeline.unet)) == len(parameters)
    assert_frozen(adapted.pipeline.text_encoder, adapted.vae, source.network)
    direction = [torch.randn(p.shape, generator=generator(i)).double() for i, p in enumerate(parameters)]
    expected = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True))

    def moved(size):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(size * d)
            return compute(batch)[term]

    found = (moved(1e-6) - moved(-2e-6)) / 2e-6
    assert expected.abs() > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("space", ["pixel", "latent"])
@pytest.mark.parametrize("text_encoders", [False, True])
def test_the_source_prediction_is_the_frozen_sources_under_the_source_prompt(space, text_encoders):
    """Fails where both halves come from the adapted model, as in the released code, or share a prompt."""
    adapted, source = models(text_encoders=text_encoders)
    batch = batch_of(adapted, source)
    terms = Objective(adapted, only("image", "high_frequency", space=space), source)(batch)

    def x0(model, prompts):
        """Return x0 by the pipeline's own parts."""
        pipeline = tiny_text_denoiser().pipeline if model is source else adapted.pipeline
        hidden = pipeline.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)[0]
        xt, timesteps = batch.xt[:NUMBER], batch.timesteps[:NUMBER]
        output = pipeline.unet(xt, timesteps, encoder_hidden_states=hidden).sample
        latents = adapted.schedule.to_x0(output, xt, timesteps)
        return latents if space == "latent" else pipeline.vae.decode(latents / 0.18215).sample.clamp(-1, 1)

    def similarity(*pair):
        return losses.pairwise_similarity_kl(*pair).sum()

    with torch.no_grad():
        right = x0(adapted, TARGET), x0(source, SOURCE)
        torch.testing.assert_close(terms["image"].detach(), similarity(*right), rtol=1e-3, atol=1e-9)
        torch.testing.assert_close(
            terms["high_frequency"].detach(), similarity(*map(high_frequency, right)), rtol=1e-3, atol=1e-9
        )
        for wrong in (
            (x0(adapted, TARGET), x0(adapted, SOURCE)),
            (x0(adapted, TARGET), x0(source, TARGET)),
            (x0(adapted, SOURCE), x0(source, SOURCE)),
        ):
            assert (similarity(*wrong) - similarity(*right)).abs() > 1e-2 * similarity(*right)


@contextmanager
def counted(denoiser):
    """Count forward passes of a UNet: how many rows each had, and whether with gradients."""
    calls = []
    handle = denoiser._unwrapped.unet.register_forward_hook(
        lambda module, inputs, output: calls.append((len(inputs[0]), torch.is_grad_enabled()))
    )
    yield calls
    handle.remove()


def test_one_pass_with_gradients_serves_all_terms_and_the_prior():
    adapted, source = models()
    weights = DOMAINSTUDIO.model_copy(update={"prior": 1.0})
    batch = batch_of(adapted, source)
    with counted(adapted) as mine, counted(source) as reference:
        terms = Objective(adapted, weights, source)(batch)
    assert mine == [(NUMBER + PRIOR, True)]
    assert reference == [(NUMBER, False)]
    assert set(terms) == {"simple", "prior", "image", "high_frequency", "high_frequency_mse"}


def test_the_prior_is_the_error_of_its_own_images_alone():
    adapted, source = models()
    batch = batch_of(adapted, source)
    terms = Objective(adapted, only("simple", "prior", "prior_reconstruction"), source)(batch)
    with torch.no_grad():
        error = adapted.predict(batch.xt, batch.timesteps, batch.condition).output - batch.noise
    torch.testing.assert_close(terms["simple"].detach(), error[:NUMBER].square().mean())
    torch.testing.assert_close(terms["prior"].detach(), error[NUMBER:].square().mean())
    # ε: x0 is off by sqrt(1 - ᾱ) / sqrt(ᾱ) times the error of ε
    a = adapted.schedule.levels[batch.timesteps].view(-1, 1, 1, 1)
    off = ((1 - a) / a).sqrt() * error
    torch.testing.assert_close(terms["prior_reconstruction"].detach(), off[NUMBER:].square().mean())
    terms["prior_reconstruction"].backward()
    assert gradients(adapted.network)


def test_detail_terms_compare_with_the_same_training_image():
    """Fails where another image is compared with, or its reconstruction, as in the released code."""
    adapted, source = models()
    batch = batch_of(adapted, source)
    terms = Objective(adapted, only("high_frequency_mse", "reconstruction"), source)(batch)
    with torch.no_grad():
        output = adapted.predict(batch.xt, batch.timesteps, batch.condition).output
        x0 = adapted.schedule.to_x0(output, batch.xt, batch.timesteps)[:NUMBER]
        images = adapted.decode(x0).clamp(-1, 1)
    pictures = torch.from_numpy(tiny_text_images(NUMBER)).float() / 127.5 - 1
    torch.testing.assert_close(terms["reconstruction"].detach(), (images - pictures).square().mean())
    expected = (high_frequency(images) - high_frequency(pictures)).square().mean()
    torch.testing.assert_close(terms["high_frequency_mse"].detach(), expected)


def test_the_frozen_source_stays_as_it_was():
    adapted = tiny_text_denoiser()
    adapted.train(text_encoders=True)
    source = adapted.frozen_source()
    before = {name: value.clone() for name, value in source.network.state_dict().items()}
    with torch.no_grad():
        for parameter in adapted.network.parameters():
            parameter.add_(1)
    adapted.network.train()
    assert all(torch.equal(value, before[name]) for name, value in source.network.state_dict().items())
    assert not source.network.training and source.vae is adapted.vae
    assert not any(p.requires_grad for p in source.network.parameters())


def test_a_source_that_shares_the_text_encoders_forbids_to_train_them():
    adapted = tiny_text_denoiser()
    source = adapted.frozen_source()
    assert source._unwrapped.text_encoders[0] is adapted._unwrapped.text_encoders[0]
    with pytest.raises(ValueError, match="the frozen source shares the text encoders"):
        adapted.train(text_encoders=True)
