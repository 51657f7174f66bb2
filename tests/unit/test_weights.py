"""Models are complete and finite when they are loaded; what is not is named with its file."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from domainstudio import models
from domainstudio.config import LoraSettings
from domainstudio.errors import CheckpointError, DataError
from domainstudio.models import digest, lora
from domainstudio.models.stored import StoredModel
from domainstudio.models.tiny_vae import load_decoder
from domainstudio.sampling import sample
from tests.models import tiny_class_denoiser, tiny_denoiser, tiny_latent_denoiser, tiny_text_denoiser

DIFFUSERS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for make in (tiny_denoiser, tiny_class_denoiser, tiny_latent_denoiser, tiny_text_denoiser):
        make().save(root / make.__name__)
    adapted = models.load(root / "tiny_denoiser")
    lora.attach(adapted, LoraSettings(rank=2), seed=0)
    adapted.save(root / "adapted")
    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    AutoencoderTiny(latent_channels=4, **channels, **blocks).save_pretrained(root / "tiny_vae")
    return root


def load(folder):
    if folder.name == "tiny_vae":
        return load_decoder(str(folder), tiny_text_denoiser())
    return models.load(folder)


def lose(weights, name):
    del weights[name]


def add(weights, name):
    weights["a.new.weight"] = weights[name].clone()


def spoil(weights, name):
    weights[name].view(-1)[-1] = torch.nan


def widen(weights, name):
    weights[name] = torch.cat([weights[name], weights[name]])


FILES = {
    "tiny_denoiser": ["unet/" + DIFFUSERS],
    "tiny_class_denoiser": ["unet/" + DIFFUSERS],
    "tiny_latent_denoiser": ["unet/" + DIFFUSERS, "vqvae/" + DIFFUSERS],
    "tiny_text_denoiser": ["unet/" + DIFFUSERS, "vae/" + DIFFUSERS, "text_encoder/model.safetensors"],
    "tiny_vae": [DIFFUSERS],
    "adapted": ["pytorch_lora_weights.safetensors"],
}


@pytest.mark.parametrize(("kind", "file"), [(kind, file) for kind, files in FILES.items() for file in files])
def test_weights_that_are_not_whole_are_refused_by_name(folders, tmp_path, kind, file, capfd):
    folder = shutil.copytree(folders / kind, tmp_path / kind)
    load(folder)
    capfd.readouterr()
    whole = load_file(folder / file)
    name = sorted(name for name, value in whole.items() if value.ndim > 1)[-1]
    short = name.removeprefix("text_model.")
    for damage, said in (
        (lose, short),
        (add, "a.new.weight"),
        (spoil, f"{short} that are not"),
        (widen, short),
    ):
        changed = {key: value.clone() for key, value in whole.items()}
        damage(changed, name)
        save_file(changed, folder / file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError) as refused:
            load(folder)
        assert said in str(refused.value) and str(folder) in str(refused.value), damage
        assert f"{folder / file} " in str(refused.value), damage
        lines = capfd.readouterr().err.split()
        assert not {"initialized", "TRAIN", "UNEXPECTED", "MISMATCH"} & set(lines), damage


def test_a_prediction_that_is_not_finite_is_no_picture():
    denoiser = tiny_denoiser()
    with torch.no_grad():
        next(denoiser.network.parameters()).view(-1)[0] = torch.inf
    with pytest.raises(DataError, match="a prediction is not finite"):
        sample(denoiser, [1], steps=2)


def test_an_adapted_model_with_a_changed_bit_is_refused(tmp_path):
    tiny_denoiser().save(tmp_path)
    record = tmp_path / "provenance.json"
    record.write_text(json.dumps({"digest": digest(tmp_path)}))
    assert StoredModel(tmp_path).digest == digest(tmp_path)
    path = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    changed = bytearray(path.read_bytes())
    changed[-4] ^= 1
    path.write_bytes(changed)
    with pytest.raises(CheckpointError, match="is damaged, or was changed"):
        _ = StoredModel(tmp_path).digest
