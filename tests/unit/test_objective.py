"""The objective: which model predicts what, where gradients go, and how terms are reduced and weighted."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from domainstudio.config import LossWeights, method
from domainstudio.training import losses
from domainstudio.training.objective import DETAIL_TERMS, PAIRWISE_TERMS, Batch, Objective, noisy_batch
from tests.models import DOMAINSTUDIO, PAIRWISE_L2, PLAIN, tiny_denoiser, tiny_images, training_settings


def generator(seed):
    return torch.Generator().manual_seed(seed)


def batch_of(denoiser, seed=1, shared=2, **settings):
    images = torch.from_numpy(tiny_images(4)).float() / 127.5 - 1
    batch = Batch(images, images, {}, {})
    return noisy_batch(denoiser, batch, training_settings(**settings), generator(seed), generator(shared))


def computed(weights=DOMAINSTUDIO, **settings):
    """Return an adapted model and its source, a batch, and the batch's terms."""
    adapted, source = tiny_denoiser(0), tiny_denoiser(1)
    batch = batch_of(adapted, **settings)
    return adapted, source, batch, Objective(adapted, weights, source)(batch)


def x0_of(model, batch):
    with torch.no_grad():
        output = model.predict(batch.xt, batch.timesteps, {}).output
    return model.schedule.to_x0(output, batch.xt, batch.timesteps)


def test_pairwise_terms_are_zero_where_the_adapted_model_is_the_source():
    terms = Objective(tiny_denoiser(), DOMAINSTUDIO, tiny_denoiser())(batch_of(tiny_denoiser()))
    assert terms["image"].abs() < 1e-7
    assert terms["high_frequency"].abs() < 1e-7
    assert terms["high_frequency_mse"] > 0


def test_the_source_prediction_comes_from_the_source_model():
    """Fails where both halves come from the adapted model, as in the released code."""
    adapted, source, batch, terms = computed()
    x0 = (x0_of(model, batch).clamp(-1, 1) for model in (adapted, source))
    expected = losses.pairwise_similarity_kl(*x0).sum()
    assert expected > 1e-6
    torch.testing.assert_close(terms["image"].detach(), expected)


@pytest.mark.parametrize("weights", [DOMAINSTUDIO, PAIRWISE_L2])
def test_gradients_reach_the_adapted_model_only(weights):
    adapted, source = tiny_denoiser(0), tiny_denoiser(1).frozen_source()
    for name, term in Objective(adapted, weights, source)(batch_of(adapted)).items():
        adapted.network.zero_grad()
        term.backward(retain_graph=True)
        assert sum(p.grad.abs().sum() for p in adapted.network.parameters() if p.grad is not None) > 0, name
    assert all(p.grad is None and not p.requires_grad for p in source.network.parameters())


def test_the_frozen_source_is_a_copy_in_eval_mode():
    model = tiny_denoiser(0)
    model.network.train()
    source = model.frozen_source()
    assert model.network.training and not source.network.training
    assert not any(p.requires_grad for p in source.network.parameters())
    with torch.no_grad():
        next(model.network.parameters()).add_(1)
    assert not torch.equal(next(model.network.parameters()), next(source.network.parameters()))


def test_plain_finetuning_never_runs_the_source_model():
    class Broken:
        network = torch.nn.Module()

        def predict(self, *_):
            raise AssertionError("the source model was called")

    broken: Any = Broken()
    terms = Objective(tiny_denoiser(), PLAIN, broken)(batch_of(tiny_denoiser()))
    assert set(terms) == {"simple"}


def test_the_mean_reduction_is_the_sum_over_the_pairs():
    *_, by_sum = computed()
    *_, by_mean = computed(DOMAINSTUDIO.model_copy(update={"pairwise_reduction": "mean"}))
    torch.testing.assert_close(by_mean["image"] * 4 * 3, by_sum["image"])


@pytest.mark.parametrize("weighting", ["alpha_bar", "one_minus_alpha_bar"])
def test_images_are_weighted_by_their_noise_level(weighting):
    weighted = DOMAINSTUDIO.model_copy(update={"noise_weighting": weighting})
    *_, plain_terms = computed(timesteps="shared")
    adapted, _, batch, terms = computed(weighted, timesteps="shared")
    a = adapted.schedule.levels[batch.timesteps[0]]
    a = a if weighting == "alpha_bar" else 1 - a
    for name in ("image", "high_frequency"):
        torch.testing.assert_close(terms[name], plain_terms[name] * a)
    for name in ("simple", "high_frequency_mse"):
        torch.testing.assert_close(terms[name], plain_terms[name])


def test_distances_are_weighted_by_each_images_noise_level():
    weights = PAIRWISE_L2.model_copy(update={"noise_weighting": "alpha_bar", "clamp_x0": False})
    adapted, source, batch, terms = computed(weights)
    x0s = (x0_of(model, batch).flatten(1) for model in (adapted, source))
    ours, theirs = (torch.cdist(x0, x0) for x0 in x0s)
    rows = (ours - theirs).square().mean(dim=1)
    trust = adapted.schedule.levels[batch.timesteps]
    torch.testing.assert_close(terms["pairwise_l2"].detach(), (trust * rows).mean(), rtol=1e-4, atol=1e-7)


def test_x0_of_pixel_models_are_images_in_either_space():
    """So `clamp_x0` applies to them in both."""
    weights = DOMAINSTUDIO.model_copy(update={"reconstruction": 1.0})
    *_, by_pixel = computed(weights)
    *_, by_latent = computed(weights.model_copy(update={"space": "latent"}))
    torch.testing.assert_close(by_latent, by_pixel)


@pytest.mark.parametrize("option", [{"pairwise_center": True}, {"pairwise_temperature": 0.2}])
def test_options_of_the_similarities(option):
    weights = DOMAINSTUDIO.model_copy(update={**option, "clamp_x0": False})
    adapted, source, batch, terms = computed(weights)

    def rows(model):
        x = x0_of(model, batch).flatten(1)
        x = x - x.mean(0) if "pairwise_center" in option else x
        cosine = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=2)
        others = cosine[~torch.eye(len(x), dtype=torch.bool)].view(len(x), -1)
        return (others / option.get("pairwise_temperature", 1.0)).softmax(1)

    p, q = rows(adapted), rows(source)
    torch.testing.assert_close(terms["image"].detach(), (p * (p / q).log()).sum(), rtol=1e-3, atol=1e-7)


def test_the_total_is_the_weighted_sum():
    adapted, source, _, terms = computed()
    expected = terms["simple"] + 0.5 * terms["image"] + 0.5 * terms["high_frequency"]
    total = Objective(adapted, DOMAINSTUDIO, source).total(terms)
    torch.testing.assert_close(total, expected + 0.05 * terms["high_frequency_mse"])


def test_the_variational_term_is_there_with_a_learned_variance_only():
    model = tiny_denoiser(learned_variance=True, prediction_type="epsilon", rescale_betas_zero_snr=False)
    terms = Objective(model, PLAIN, None)(batch_of(model))
    assert set(terms) == {"simple", "vlb"}
    assert terms["vlb"].isfinite()


def test_the_variational_term_of_the_last_timestep_is_finite_with_zero_terminal_snr():
    model = tiny_denoiser(learned_variance=True, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    batch = replace(batch_of(model), timesteps=torch.tensor([0, 1, 998, 999]))
    batch = replace(batch, xt=model.schedule.add_noise(batch.x0, batch.noise, batch.timesteps))
    vlb = Objective(model, PLAIN)(batch)["vlb"]
    vlb.backward()
    assert vlb.isfinite()
    assert all(p.grad.isfinite().all() for p in model.network.parameters() if p.grad is not None)


def timesteps(seed, shared, **settings):
    return batch_of(tiny_denoiser(), seed, shared, **settings).timesteps


def test_a_shared_timestep_is_shared_by_all_images_and_processes():
    drawn = [timesteps(seed=rank, shared=step, timesteps="shared") for step in range(20) for rank in (0, 1)]
    assert all(len(set(t.tolist())) == 1 for t in drawn)
    assert all(torch.equal(a, b) for a, b in zip(drawn[::2], drawn[1::2], strict=True))
    assert len({t[0].item() for t in drawn}) > 10


def test_the_range_of_timesteps_is_kept():
    low = [timesteps(seed=s, shared=s, max_timestep=0.1) for s in range(20)]
    assert 80 < torch.cat(low).max() < 100


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_gives_x0_back(prediction_type):
    model = tiny_denoiser(prediction_type=prediction_type, rescale_betas_zero_snr=False)
    batch = batch_of(model, max_timestep=0.8)
    schedule = model.schedule
    output = schedule.true_output(batch.x0, batch.noise, batch.timesteps)
    found = schedule.to_x0(output, batch.xt, batch.timesteps)
    torch.testing.assert_close(found, batch.x0, atol=1e-4, rtol=0)


def test_x0_matches_diffusers_own_conversion():
    from diffusers import DDIMScheduler

    model = tiny_denoiser()
    batch = batch_of(model, timesteps="shared")
    scheduler = DDIMScheduler.from_config(model.schedule.noise_scheduler.config, clip_sample=False)
    scheduler.set_timesteps(1000)
    output = model.predict(batch.xt, batch.timesteps, {}).output
    expected = scheduler.step(output, batch.timesteps[0], batch.xt).pred_original_sample
    torch.testing.assert_close(model.schedule.to_x0(output, batch.xt, batch.timesteps), expected)


def test_every_term_of_the_tables_has_a_weight():
    assert {*DETAIL_TERMS, *PAIRWISE_TERMS} <= LossWeights.model_fields.keys()
    assert set(method.PAIRWISE_TERMS) == PAIRWISE_TERMS.keys()
