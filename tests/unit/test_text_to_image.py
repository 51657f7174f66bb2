"""Text-to-image models against plain diffusers: conditions, sampling, latents and folders."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from safetensors.torch import load_file

from domainstudio import models
from domainstudio.errors import ConfigError
from domainstudio.models.stable_diffusion import StableDiffusionDenoiser
from domainstudio.sampling import sample
from tests.models import PROMPT_LENGTH, tiny_text_denoiser, tiny_text_images, tiny_text_pipeline

KINDS = ["sd1", "sd2", "sdxl"]
TOLD = ["a red house", "two green trees"]
SEEDS = [5, 6]


def noisy(number=2):
    return torch.randn((number, 4, 8, 8), generator=torch.Generator().manual_seed(3))


def drawn(pipeline, scheduler=DDIMScheduler, guidance_scale=1.0, negative=None, **options):
    """Return what plain diffusers draws, as uint8 with shape (N, 3, H, W)."""
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **options)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        TOLD,
        negative_prompt=negative,
        guidance_scale=guidance_scale,
        num_inference_steps=4,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="np",
    ).images
    return (pictures.transpose(0, 3, 1, 2) * 255).round().astype(np.uint8)


def difference(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max()


def plain_embeddings(pipeline, negative):
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    result = pipeline.encode_prompt(prompt=TOLD, negative_prompt=negative, **options)
    told, nothing = (
        dict(zip(["encoder_hidden_states", "text_embeds"], each, strict=False))
        for each in (result[0::2], result[1::2])
    )
    if len(result) == 4:
        side, start = (16, 16), (0, 0)
        size = pipeline._get_add_time_ids(side, start, side, torch.float32, text_encoder_projection_dim=12)
        told["time_ids"] = nothing["time_ids"] = size.repeat(2, 1)
    return told, nothing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("negative", ["", "a blue cup"])
def test_conditions_are_the_pipelines_own(kind, negative):
    pipeline = tiny_text_pipeline(kind)
    denoiser = StableDiffusionDenoiser(pipeline, kind)
    expected, nothing = plain_embeddings(pipeline, [negative] * 2 if negative else None)
    torch.testing.assert_close(denoiser.condition(TOLD), expected)
    torch.testing.assert_close(denoiser.condition([negative] * 2), nothing)
    more = {"text_embeds", "time_ids"} if kind == "sdxl" else set()
    assert set(expected) == {"encoder_hidden_states", *more}


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_the_pipelines_own(kind):
    pipeline = tiny_text_pipeline(kind)
    expected, _ = plain_embeddings(pipeline, None)
    hidden = expected.pop("encoder_hidden_states")
    timesteps = torch.tensor([10, 700])
    plain = pipeline.unet(noisy(), timesteps, encoder_hidden_states=hidden, added_cond_kwargs=expected).sample
    denoiser = StableDiffusionDenoiser(pipeline, kind)
    found = denoiser.predict(noisy(), timesteps, denoiser.condition(TOLD))
    torch.testing.assert_close(found.output, plain)
    assert found.variance is None


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_say_the_same_as_embeddings(kind):
    """Trained text encoders are told tokens; "" means the same to them."""
    denoiser = tiny_text_denoiser(kind)
    values, timesteps = ["a red house", ""], torch.tensor([10, 700])
    embedded = denoiser.condition(values)
    denoiser.train(text_encoders=True)
    tokens = denoiser.condition(values)
    assert tokens["input_ids"].shape == (2, 2 if kind == "sdxl" else 1, PROMPT_LENGTH)
    assert "encoder_hidden_states" not in tokens
    torch.testing.assert_close(
        denoiser.predict(noisy(), timesteps, tokens).output,
        denoiser.predict(noisy(), timesteps, embedded).output,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_encoded_where_the_pipeline_has_no_zeros_for_it(kind):
    pipeline = tiny_text_pipeline(kind)
    if kind == "sdxl":
        pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    hidden = StableDiffusionDenoiser(pipeline, kind).condition([""])["encoder_hidden_states"]
    assert hidden.abs().min() > 0
    _, expected = plain_embeddings(pipeline, None)
    torch.testing.assert_close(hidden[0], expected["encoder_hidden_states"][0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("guidance_scale", "negative"), [(1.0, ""), (5.0, ""), (5.0, "a blue cup")])
def test_samples_are_those_of_plain_diffusers(kind, guidance_scale, negative):
    options = {"negative": negative, "guidance_scale": guidance_scale, "steps": 4}
    found, other = (sample(tiny_text_denoiser(kind), SEEDS, told, **options) for told in (TOLD, TOLD[::-1]))
    without = [negative] * 2 if negative else None
    expected = drawn(tiny_text_pipeline(kind), guidance_scale=guidance_scale, negative=without)
    assert difference(found, expected) <= 1
    assert expected.std() > 20
    assert difference(other, expected) > 2


@pytest.mark.parametrize(
    ("name", "scheduler", "options"),
    [
        ("ddpm", DDPMScheduler, {}),
        ("dpm-solver++", DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    ],
)
def test_other_samplers_are_those_of_plain_diffusers(name, scheduler, options):
    found = sample(tiny_text_denoiser("sd2"), SEEDS, TOLD, guidance_scale=3.0, scheduler=name, steps=4)
    expected = drawn(tiny_text_pipeline("sd2"), scheduler, guidance_scale=3.0, **options)
    assert difference(found, expected) <= 1


def test_latents_are_scaled_as_the_unet_expects_them_and_back():
    """Fails where encoding or decoding forgets the scaling factor."""
    denoiser = tiny_text_denoiser()
    vae, images = denoiser.vae, torch.from_numpy(tiny_text_images(2)).float() / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(1))
        x0 = denoiser.x0(denoiser.encode(images), torch.Generator().manual_seed(1))
        torch.testing.assert_close(x0, latents * 0.18215)
        torch.testing.assert_close(denoiser.decode(x0), vae.decode(latents).sample)
    assert x0.shape == (2, *denoiser.shape)
    assert denoiser.resolution == (16, 16)
    assert not torch.allclose(vae.decode(x0).sample, vae.decode(latents).sample, atol=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half", [False, True])
def test_saved_folders_are_read_by_plain_diffusers(tmp_path, kind, half):
    denoiser = tiny_text_denoiser(kind)
    denoiser.save(tmp_path, half=half)
    plain = DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True)
    stored = {value.dtype for path in tmp_path.glob("*/*.safetensors") for value in load_file(path).values()}
    assert stored == {torch.float16 if half else torch.float32}
    assert denoiser.vae.dtype == denoiser.pipeline.unet.dtype == torch.float32
    assert type(plain.scheduler) is type(denoiser.pipeline.scheduler)
    loaded: Any = models.load(tmp_path)
    assert {p.dtype for part in (loaded.network, loaded.vae) for p in part.parameters()} == {torch.float32}
    assert not loaded.vae.training and not any(p.requires_grad for p in loaded.vae.parameters())
    mine, again = (sample(each, SEEDS, TOLD, guidance_scale=3.0, steps=4) for each in (denoiser, loaded))
    assert difference(drawn(plain.to(torch.float32), guidance_scale=3.0), mine) <= (4 if half else 1)
    assert difference(again, mine) <= (4 if half else 0)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_saved_folders_are_readable_by_older_versions_too(tmp_path, kind):
    """Transformers before 5 look for vocab.json and merges.txt, and for weights named text_model.*."""
    from transformers import CLIPTokenizer

    denoiser = tiny_text_denoiser(kind)
    denoiser.save(tmp_path)
    for name, tokenizer in zip(["tokenizer", "tokenizer_2"], denoiser.tokenizers, strict=False):
        (tmp_path / name / "tokenizer.json").unlink()
        again = CLIPTokenizer.from_pretrained(tmp_path / name)
        text = "Two green trees, don't 7 <|endoftext|>"
        assert again(text).input_ids == tokenizer(text).input_ids
    for path in tmp_path.glob("text_encoder*/model.safetensors"):
        names = set(load_file(path)) - {"text_projection.weight"}
        assert all(name.startswith("text_model.") for name in names)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_prompt_that_is_too_long_is_refused(kind):
    denoiser = tiny_text_denoiser(kind)
    fits = "7 " * (PROMPT_LENGTH - 2)
    assert denoiser.condition([fits])["encoder_hidden_states"].shape[1] == PROMPT_LENGTH
    too_long = r"the prompt '7 .* has 17 tokens and the model takes 16, begin and"
    with pytest.raises(ConfigError, match=too_long):
        denoiser.condition(["a cup", fits + "7"])
