"""A small decoder is distilled from a model's VAE, and reads latents as the terms give them."""

import json
import sys

import numpy as np
import pytest
import torch

from benchmarks import tiny_vae
from domainstudio import models
from domainstudio.models.tiny_vae import load_decoder
from tests.models import image_set
from tests.project import ROOT


@pytest.mark.slow
def test_it_learns_what_the_whole_decoder_makes_of_latents(tmp_path, monkeypatch, capsys):
    squares = np.random.default_rng(0).integers(0, 256, (8, 3, 4, 4), dtype=np.uint8)
    images = squares.repeat(8, axis=2).repeat(8, axis=3)
    image_set(images).save(tmp_path / "images")
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    options = "--images images --output tiny --channels 8 --steps 80 --batch-size 8"
    monkeypatch.setattr(sys, "argv", ["tiny_vae", "--source", "noto-text", *options.split()])
    tiny_vae.main()
    printed = json.loads(capsys.readouterr().out)

    denoiser = models.load("models/sources/noto-text")
    assert denoiser.vae is not None
    with torch.no_grad():
        encoded = denoiser.encode(torch.from_numpy(images).float() / 127.5 - 1)
        encoded[:, 4:] = 0  # deviations: x0 is the mean
        x0 = denoiser.x0(encoded, torch.Generator())
        small, whole = load_decoder("tiny", denoiser)(x0), denoiser.decode(x0)
    error, spread = (small - whole).abs().mean(), (whole - whole.mean(0)).abs().mean()
    assert error < 0.65 * spread, "the mean image would do about as well"
    assert printed["images"]["error"] == pytest.approx(float(error), abs=1e-3)
    assert printed["parameters"][1] < printed["parameters"][0] / 10
