"""LoRA files of other trainers: listed in order, loaded one after the other, refused by name."""

import shutil

import pytest
import torch

from domainstudio import models
from domainstudio.config import LoraSettings
from domainstudio.errors import CheckpointError
from domainstudio.models import lora
from domainstudio.models.adapter_folder import KOHYA, WEIGHTS
from domainstudio.sampling import sample
from domainstudio.selection.adapters import AdapterFile, list_adapters, usable, without
from tests.models import PROMPTS, close, tiny_denoiser, tiny_text_denoiser


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny Stable Diffusion on disk."""
    folder = tmp_path_factory.mktemp("source") / "sd"
    tiny_text_denoiser().save(folder)
    return folder


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    """A folder of adapters of it that change every layer they are in, text encoder included."""
    denoiser = models.load(source)
    lora.attach(denoiser, LoraSettings(rank=2, alpha=4, text_encoder=True), seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in denoiser.network.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.5)
    folder = tmp_path_factory.mktemp("trained")
    denoiser.save(folder)
    return folder, drawn(denoiser)


def drawn(denoiser):
    return sample(denoiser, [0, 1], PROMPTS[:2], steps=2)


@pytest.mark.parametrize("name", [WEIGHTS, KOHYA])
def test_files_of_diffusers_and_kohya_give_the_model_that_was_trained(source, trained, name):
    folder, expected = trained
    denoiser = models.load(source)
    before = drawn(denoiser)
    [candidate], left_out = usable(denoiser, [AdapterFile(folder / name, "a", 1)], "source")
    assert not left_out
    close(drawn(candidate.load()).astype(float), expected.astype(float))
    assert (expected != before).any()
    close(drawn(without(denoiser)).astype(float), before.astype(float))


def test_damaged_and_foreign_files_are_left_out_by_name(source, trained, tmp_path):
    folder, _ = trained
    whole = (folder / KOHYA).read_bytes()
    (tmp_path / "ink-000001.safetensors").write_bytes(whole)
    (tmp_path / "ink-000002.safetensors").write_bytes(whole[: len(whole) // 2])
    shutil.copy(source / "vae/diffusion_pytorch_model.safetensors", tmp_path / "ink-000003.safetensors")
    denoiser = models.load(source)
    candidates, left_out = usable(denoiser, list_adapters(tmp_path), "source")
    assert [candidate.name for candidate in candidates] == ["ink-000001"]
    assert left_out.keys() == {"ink-000002", "ink-000003"}
    assert all(f"{name}.safetensors is no LoRA file" in reason for name, reason in left_out.items())
    (tmp_path / "ink-000001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no file can be used:\n.*ink-000002"):
        usable(denoiser, list_adapters(tmp_path), "source")


def test_only_stable_diffusion_takes_them():
    with pytest.raises(CheckpointError, match="is unconditional: LoRA files of other trainers"):
        usable(tiny_denoiser(), [], "source")


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["ink15-000010", "ink15-000020", "ink15"], {"ink15-000010": 10, "ink15-000020": 20, "ink15": 30}),
        (["a-step00000500", "a-step00001000"], {"a-step00000500": 500, "a-step00001000": 1000}),
        (["x_000000998", "x_000000999"], {"x_000000998": 998, "x_000000999": 999}),
        (["save-500-25-0", "save-1000-50-0"], {"save-500-25-0": 500, "save-1000-50-0": 1000}),
        (
            ["checkpoint-90/pytorch_lora_weights", "checkpoint-500/pytorch_lora_weights"],
            {"checkpoint-90": 90, "checkpoint-500": 500},
        ),
        (["only"], {"only": 1}),
    ],
)
def test_names_tell_the_order(tmp_path, names, steps):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.safetensors").touch()
    assert {file.name: file.step for file in list_adapters(tmp_path)} == steps


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "has no .safetensors file"),
        (["first", "second"], "do not tell which is the later one"),
        (["a/x-10", "b/x-10"], "a/x-10.*b/x-10"),
    ],
)
def test_folders_without_an_order_are_refused(tmp_path, names, message):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.safetensors").touch()
    with pytest.raises(CheckpointError, match=message):
        list_adapters(tmp_path)
