"""Unconditional models of latents, with a VAE or a VQ model, against plain diffusers; and their training."""

import json
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, LDMPipeline

from domainstudio import models
from domainstudio.data.pictures import save_png
from domainstudio.errors import CheckpointError
from domainstudio.models.latent import LatentDenoiser
from domainstudio.sampling import sample
from domainstudio.training.examples import Examples
from domainstudio.training.latents import encode_all
from domainstudio.training.objective import Objective
from domainstudio.training.trainer import Trainer
from stages import pretrain
from tests.integration.training_parts import resume, same, state
from tests.models import (
    DOMAINSTUDIO,
    tiny_latent_denoiser,
    tiny_text_images,
    tiny_text_pipeline,
    training_settings,
)
from tests.project import ROOT

LATENT = DOMAINSTUDIO.model_copy(update={"space": "latent"})
both = pytest.mark.parametrize("quantized", [False, True])


def pictures(number=6):
    return torch.from_numpy(tiny_text_images(number))


def in_range(images):
    return images.float() / 127.5 - 1


@both
def test_plain_diffusers_draws_the_same_pictures_from_a_saved_model(tmp_path, quantized):
    denoiser = tiny_latent_denoiser(quantized=quantized)
    denoiser.save(tmp_path)
    assert models.kind_of(tmp_path) == "latent"
    loaded = models.load(tmp_path)
    assert isinstance(loaded, LatentDenoiser) and not loaded.conditional
    assert (loaded.resolution, loaded.shape) == ((16, 16), (3 if quantized else 4, 8, 8))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True)
    assert type(pipeline) is LDMPipeline
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    theirs = pipeline(batch_size=2, generator=generators, num_inference_steps=5, output_type="np").images
    ours = sample(loaded, [7, 8], scheduler="ddim", steps=5)
    plain = (theirs * 255).round().transpose(0, 3, 1, 2)
    assert np.abs(ours - plain).max() <= 1
    assert plain.std() > 5
    assert np.abs(sample(denoiser, [7, 8], scheduler="ddim", steps=5).astype(int) - ours).max() <= 1


@both
def test_half_precision_is_for_files_only(tmp_path, quantized):
    tiny_latent_denoiser(quantized=quantized).save(tmp_path, half=True)
    loaded: Any = models.load(tmp_path)
    assert {p.dtype for part in (loaded.network, loaded.vae) for p in part.parameters()} == {torch.float32}
    sizes = [path.stat().st_size for path in tmp_path.glob("*/*.safetensors")]
    numbers = sum(p.numel() for part in (loaded.network, loaded.vae) for p in part.parameters())
    assert len(sizes) == 2 and sum(sizes) < 2.5 * numbers + 40_000


def test_latents_of_a_vae_are_drawn_and_scaled_as_the_unet_expects_them_and_back():
    denoiser = tiny_latent_denoiser()
    images = in_range(pictures(2))
    with torch.no_grad():
        latents = denoiser.vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(1))
        x0 = denoiser.x0(denoiser.encode(images), torch.Generator().manual_seed(1))
        torch.testing.assert_close(x0, latents * 0.5)
        torch.testing.assert_close(denoiser.decode(x0), denoiser.vae.decode(latents).sample)
    assert x0.shape == (2, *denoiser.shape)


def test_latents_of_a_vq_model_are_not_drawn_by_lot():
    denoiser = tiny_latent_denoiser(quantized=True)
    images = in_range(pictures(2))
    with torch.no_grad():
        latents = denoiser.vae.encode(images).latents
        first, second = (
            denoiser.x0(denoiser.encode(images), torch.Generator().manual_seed(seed)) for seed in (1, 2)
        )
        torch.testing.assert_close(denoiser.decode(first), denoiser.vae.decode(latents).sample)
    torch.testing.assert_close(first, latents * 0.5)
    assert torch.equal(first, second) and first.shape == (2, *denoiser.shape)


def test_a_vq_model_older_than_scaling_factors_is_not_scaled(tmp_path):
    tiny_latent_denoiser(quantized=True).save(tmp_path / "old")
    path = tmp_path / "old/vqvae/config.json"
    settings = json.loads(path.read_text()).items()
    path.write_text(json.dumps({name: value for name, value in settings if name != "scaling_factor"}))
    denoiser: Any = models.load(tmp_path / "old")
    encoded = denoiser.encode(in_range(pictures(2)))
    torch.testing.assert_close(denoiser.x0(encoded, torch.Generator()), encoded[:, :3])
    denoiser.save(tmp_path / "new")
    assert LDMPipeline.from_pretrained(tmp_path / "new").vqvae.config.scaling_factor == 1.0


@both
def test_images_are_encoded_once(tmp_path, quantized, monkeypatch):
    denoiser = tiny_latent_denoiser(quantized=quantized)
    first = encode_all(denoiser, pictures(), True, tmp_path)
    assert first is not None and first.shape == (2, 6, 2 * denoiser.shape[0], 8, 8)
    torch.testing.assert_close(first[1], denoiser.encode(in_range(pictures().flip(3))))
    monkeypatch.setattr(denoiser, "encode", None)  # encoding again would fail
    again = encode_all(denoiser, pictures(), True, tmp_path)
    assert again is not None and torch.equal(again, first)


def trainer(folder, quantized=False, weights=DOMAINSTUDIO, latents=None, **values):
    denoiser = tiny_latent_denoiser(quantized=quantized)
    objective = Objective(denoiser, weights, denoiser.frozen_source())
    settings = training_settings(**{"steps": 2, **values})
    return Trainer(objective, Examples.unconditional(tiny_text_images()), settings, folder, latents=latents)


@both
@pytest.mark.parametrize("weights", [DOMAINSTUDIO, LATENT])
def test_the_unet_alone_is_trained(tmp_path, quantized, weights):
    training = trainer(tmp_path, quantized, weights)
    denoiser, source = training.denoiser, training.objective.source
    parts = {"unet": denoiser.network, "vae": denoiser.vae, "source": source.network}
    before = {name: state(part) for name, part in parts.items()}
    history = training.train()
    terms = ("total", "simple", "image", "high_frequency", "high_frequency_mse")
    assert all(math.isfinite(record[term]) and record[term] > 0 for record in history[1:] for term in terms)
    assert [name for name, part in parts.items() if not same(before[name], state(part))] == ["unet"]


def test_resumed_with_kept_latents_is_bit_identical_to_undisturbed(tmp_path):
    resume(trainer, tmp_path, horizontal_flip=True)
    assert len(list((tmp_path / "latents").iterdir())) == 1


def name_encoder(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "vqvae": ["diffusers", "AsymmetricVAE"]}))


def cut(folder):
    weights = folder / "vqvae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def resize(size):
    def damage(folder):
        path = folder / "unet/config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": size}))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (name_encoder, "encodes with 'AsymmetricVAE'; these are known: AutoencoderKL, VQModel"),
        (cut, r"vqvae is not a usable AutoencoderKL: .*It needs config\.json and"),
        (lambda folder: (folder / "vqvae/config.json").unlink(), r"vqvae is not a usable AutoencoderKL"),
        (lambda folder: (folder / "unet/config.json").unlink(), r"is not a usable pipeline.* unet/"),
        (resize(None), r"unet/config.json: sample_size is None; set it to the height of x0"),
        (resize([8]), r"unet/config.json: sample_size is \[8\]; set it"),
        (resize([8, 0]), r"unet/config.json: sample_size is \[8, 0\]; set it"),
        (resize("8"), r"unet/config.json: sample_size is '8'; set it"),
        (resize(True), r"unet/config.json: sample_size is True; set it"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(tmp_path, damage, message):
    tiny_latent_denoiser().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        models.load(tmp_path)


def settings_of_a_small_model(values):
    section = values["pretrain_latent"]
    section |= {"images": "images", "number": 5, "resolution": 16, "vae": "vae"}
    section["unet"] |= {"block_out_channels": [8, 16], "attention": [False, True], "norm_num_groups": 4}
    section["unet"]["attention_head_dim"] = 8
    section["training"] |= {"steps": 3, "batch_size": 3, "checkpoint_every": 1, "preview_every": 3}
    section["training"]["lr_warmup_steps"] = 0
    values["prepare"]["min_size"] = 8
    values["sample"]["steps"] = 2
    return values


@pytest.mark.slow
def test_the_stage_trains_a_model_of_a_trained_vaes_latents(tmp_path, monkeypatch):
    values = settings_of_a_small_model(yaml.safe_load((ROOT / "params.yaml").read_text()))
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    save_png(tiny_text_images(8), [tmp_path / f"images/{index}.png" for index in range(8)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pretrain", "pretrain_latent"])
    with pytest.raises(
        CheckpointError, match=r"vae is not a usable AutoencoderKL: there is no vae/config\.json"
    ):
        pretrain.main()
    tiny_text_pipeline("sd1").vae.save_pretrained("vae")
    pretrain.main()
    folder = tmp_path / "models/sources/avataaars"
    denoiser = models.load(folder)
    assert (denoiser.kind, denoiser.resolution, denoiser.shape) == ("latent", (16, 16), (4, 8, 8))
    assert denoiser.vae is not None and denoiser.vae.config.scaling_factor == 0.18215
    card = (folder / "README.md").read_text()
    assert "latents of `vae`" in card and "5 images" in card
    written = models.digest(folder)
    pretrain.main()  # it is trained already
    assert models.digest(folder) == written
