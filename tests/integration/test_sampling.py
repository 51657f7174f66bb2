"""Sampling: the same seed gives the same picture, however images are batched and wherever it stopped."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from domainstudio import models
from domainstudio.config import SampleSettings
from domainstudio.errors import CheckpointError, ConfigError, DataError
from domainstudio.sampling import load_samples, sample, sample_to_folder
from tests.models import tiny_class_denoiser, tiny_denoiser


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "dpm-solver++"])
def test_an_image_depends_on_its_seed_only(scheduler):
    model = tiny_denoiser()
    together = sample(model, [3, 4, 5], scheduler=scheduler, steps=4)
    alone = sample(model, [5], scheduler=scheduler, steps=4)
    assert together.shape == (3, 3, 8, 8)
    assert np.abs(together[2].astype(int) - alone[0]).max() <= 1  # batches change the order of additions
    assert (together[0] != together[1]).any()


def test_more_steps_than_noise_levels_are_refused():
    denoiser = tiny_denoiser(num_train_timesteps=20)
    with pytest.raises(ConfigError, match=r"sample\.steps must be at most 20, .*got 21"):
        sample(denoiser, [0], steps=21)


def test_the_samplers_differ():
    model = tiny_denoiser()
    results = [sample(model, [1], scheduler=s, steps=6) for s in ("ddpm", "ddim", "dpm-solver++")]
    assert (results[0] != results[1]).any()
    assert (results[1] != results[2]).any()


@pytest.mark.parametrize("learned_variance", [False, True])
def test_plain_diffusers_gives_the_same_pictures(tmp_path, learned_variance):
    model = tiny_denoiser(learned_variance=learned_variance)
    model.save(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    theirs = pipeline(batch_size=2, generator=generators, num_inference_steps=5, output_type="np").images
    ours = sample(model, [7, 8], scheduler="ddpm" if learned_variance else "ddim", steps=5)
    np.testing.assert_array_equal(ours.transpose(0, 2, 3, 1), (theirs * 255).round().astype(np.uint8))


def test_a_saved_model_is_the_same_model(tmp_path):
    model = tiny_denoiser()
    model.save(tmp_path / "whole")
    again = models.load(tmp_path / "whole")
    np.testing.assert_array_equal(sample(model, [1, 2], steps=3), sample(again, [1, 2], steps=3))
    model.save(tmp_path / "half", half=True)
    dtypes = {p.dtype for p in models.load(tmp_path / "half").network.parameters()}
    assert dtypes == {torch.float32}, "half precision is for files"


def settings(**changes):
    return SampleSettings(**{"number": 5, "seed": 10, "steps": 3, "batch_size": 2, **changes})


def test_a_folder_of_samples(tmp_path):
    model = tiny_denoiser()
    sample_to_folder(model, tmp_path, settings(), model="m")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [entry["seed"] for entry in manifest["images"]] == [10, 11, 12, 13, 14]
    assert (tmp_path / "grid.png").is_file()
    np.testing.assert_array_equal(load_samples(tmp_path)[:2], sample(model, [10, 11], steps=3))


def test_interrupted_sampling_goes_on(tmp_path, monkeypatch):
    model = tiny_denoiser()
    sample_to_folder(model, tmp_path / "whole", settings())
    calls = []
    predict = model.predict

    def counting(*args):
        calls.append(len(args[0]))
        if len(calls) > 4:
            raise KeyboardInterrupt
        return predict(*args)

    monkeypatch.setattr(model, "predict", counting)
    with pytest.raises(KeyboardInterrupt):
        sample_to_folder(model, tmp_path / "cut", settings())
    monkeypatch.setattr(model, "predict", predict)
    assert len(list((tmp_path / "cut/images").iterdir())) == 2
    sample_to_folder(model, tmp_path / "cut", settings())
    np.testing.assert_array_equal(load_samples(tmp_path / "whole"), load_samples(tmp_path / "cut"))


@pytest.mark.parametrize("damage", ["bit", "cut", "size"])
def test_a_damaged_image_is_drawn_again_and_refused_when_read(tmp_path, damage, caplog):
    sample_to_folder(tiny_denoiser(), tmp_path, settings())
    path = tmp_path / "images/000003.png"
    whole = path.read_bytes()
    if damage == "size":
        Image.new("RGB", (9, 8)).save(path)
    else:
        pixels = whole.index(b"IDAT") + 40
        path.write_bytes(
            whole[:pixels] + (damage == "bit") * (bytes([whole[pixels] ^ 1]) + whole[pixels + 1 :])
        )
        with pytest.raises(DataError, match=r"000003\.png is damaged"):
            load_samples(tmp_path)
    sample_to_folder(tiny_denoiser(), tmp_path, settings())
    assert re.search(r"000003\.png is .*: it is drawn again", caplog.text)
    assert path.read_bytes() == whole


def test_incomplete_samples_are_refused_by_name(tmp_path):
    sample_to_folder(tiny_denoiser(), tmp_path, settings())
    (tmp_path / "images/000003.png").unlink()
    with pytest.raises(DataError, match=r"000003\.png"):
        load_samples(tmp_path)


def pickle_weights(folder):
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    torch.save(tiny_denoiser().network.state_dict(), weights.with_suffix(".bin"))
    weights.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), r"has no model_index\.json"),
        (pickle_weights, "safetensors"),
        (
            lambda folder: (folder / "model_index.json").write_text('{"_class_name": "SanaPipeline"}'),
            "SanaPipeline",
        ),
    ],
)
def test_what_is_no_model_is_refused_by_name(tmp_path, damage, message):
    tiny_denoiser().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        models.load(tmp_path)


def test_guidance_works_with_a_learned_variance():
    model = tiny_class_denoiser(learned_variance=True)
    classes = [model.classes[0]] * 2
    plain, guided = (
        sample(model, [1, 2], classes, guidance_scale=scale, scheduler="ddpm", steps=3)
        for scale in (1.0, 3.0)
    )
    assert plain.shape == guided.shape == (2, 3, 8, 8)
    assert (plain != guided).any()
