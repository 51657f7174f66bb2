"""Models told by a language model: what is refused, what is encoded how often, and the images' size."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM, Qwen3Model

from domainstudio import models
from domainstudio.errors import CheckpointError, ConfigError
from domainstudio.models.condition import to_device
from domainstudio.models.folders import set_resolution
from domainstudio.storage.weights import load_part
from domainstudio.training.latents import condition_all
from domainstudio.training.resting import rest
from tests.any_size import CHAT_LENGTH, FAMILIES
from tests.models import tiny_text_denoiser

SIZES = {
    "z-image": (4, (4, 8, 8)),
    "flux-1": (4, (4, 8, 8)),
    "flux-2": (8, (16, 4, 4)),
    "qwen-image": (4, (4, 8, 8)),
}
"""What sides must be multiples of, and the shape of x0."""


@pytest.mark.parametrize("family", SIZES)
def test_parts_of_different_models_and_distilled_ones_are_refused(family):
    kind, make = FAMILIES[family]
    pipeline = make()
    pipeline.text_encoder.config.get_text_config().hidden_size = 12
    with pytest.raises(CheckpointError, match=r"text.encoder makes (12|36): the parts belong"):
        kind(pipeline, "here")
    pipeline = make()
    pipeline.vae.register_to_config(**{"z_dim" if "z_dim" in pipeline.vae.config else "latent_channels": 8})
    with pytest.raises(
        CheckpointError, match=r"here: the VAE makes .* the transformer reads (4|16): the parts"
    ):
        kind(pipeline, "here")
    if family == "flux-2":
        pipeline = make()
        pipeline.register_to_config(is_distilled=True)
        with pytest.raises(CheckpointError, match=r"here is distilled.*adapt the base model"):
            kind(pipeline, "here")
    if family == "qwen-image":
        pipeline = make()
        pipeline.transformer.register_to_config(guidance_embeds=True)
        with pytest.raises(CheckpointError, match=r"here is distilled for guidance.*adapt the base model"):
            kind(pipeline, "here")


@pytest.mark.parametrize("family", SIZES)
def test_the_vaes_folder_names_the_images_size(family, tmp_path):
    multiple, shape = SIZES[family]
    FAMILIES[family][1]().save_pretrained(tmp_path)
    denoiser = models.load(tmp_path)
    assert (denoiser.shape, denoiser.resolution, denoiser.multiple) == (shape, (16, 16), multiple)
    (tmp_path / "kept.json").hardlink_to(tmp_path / "vae/config.json")
    set_resolution(tmp_path, 32)
    assert json.loads((tmp_path / "kept.json").read_text())["sample_size"] == 16
    larger = models.load(tmp_path)
    assert larger.shape == (shape[0], 2 * shape[1], 2 * shape[2]) and larger.resolution == (32, 32)
    larger.save(tmp_path / "saved")
    assert models.load(tmp_path / "saved").resolution == (32, 32)
    set_resolution(tmp_path, 18)
    with pytest.raises(
        CheckpointError, match=rf"sample_size is 18,.* a multiple of {multiple}: import .*--res"
    ):
        models.load(tmp_path)
    path = tmp_path / "vae/config.json"
    config = json.loads(path.read_text())
    del config["sample_size"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"vae/config.json: sample_size is None"):
        models.load(tmp_path)


def test_prompts_of_flux_1_are_kept_apart_for_a_network_that_is_told_its_guidance():
    distilled, plain = tiny_text_denoiser("flux-1"), tiny_text_denoiser("flux-1-guided")
    assert distilled.condition(["the moon"])["guidance"].tolist() == [3.5]
    assert "guidance" not in plain.condition(["the moon"])
    assert distilled.condition_key(["the moon"]) != plain.condition_key(["the moon"])


def test_a_model_with_a_size_of_its_own_keeps_it(tmp_path):
    tiny_text_denoiser("sd3").save(tmp_path)
    with pytest.raises(CheckpointError, match="draws images of its own size: leave --resolution out"):
        set_resolution(tmp_path, 32)


@pytest.mark.parametrize("family", SIZES)
def test_prompts_are_encoded_once_each_and_kept_while_the_encoder_rests(family, tmp_path):
    denoiser, seen = tiny_text_denoiser(family), []
    encoder = denoiser.text_encoders[0]
    encoder.register_forward_hook(lambda *_: seen.append(encoder.device))
    told = ["a red house", "the moon", "a red house"]
    wanted = denoiser.condition(told)
    assert len(seen) == 2
    assert all(
        torch.equal(each[0], each[2]) and not torch.equal(each[0], each[1])
        for each in (wanted["prompt_embeds"],)
    )
    rest(denoiser.text_encoders)
    for _ in range(2):
        found = condition_all(denoiser, told, tmp_path)
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert len(seen) == 4, "the second time is read from the folder"
    condition_all(denoiser, told[:2], tmp_path)
    assert len(seen) == 6
    with pytest.raises(
        ConfigError, match=rf"has \d+ tokens and the model takes {denoiser.tokenizers[-1].model_max_length}"
    ):
        denoiser.condition(["a long story " * 5])
    with pytest.raises(ConfigError, match="is a language model, which is not trained"):
        denoiser.train(text_encoders=True)


def test_a_language_models_head_may_lie_beside_a_class_that_has_none(tmp_path):
    pipeline = tiny_text_denoiser("flux-2").pipeline
    pipeline.text_encoder.config.tie_word_embeddings = False
    Qwen3ForCausalLM(pipeline.text_encoder.config).save_pretrained(tmp_path)
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    assert load_part(Qwen3Model, tmp_path).config.hidden_size == 8


def test_lengths_of_prompts_are_known_without_asking_a_gpu():
    condition = tiny_text_denoiser("z-image").condition(["the moon"])
    sent = to_device({**condition, "source.lengths": condition["lengths"]}, torch.device("meta"))
    assert {name: value.device.type for name, value in sent.items()} == {
        "prompt_embeds": "meta",
        "lengths": "cpu",
        "source.lengths": "cpu",
    }


@pytest.mark.parametrize(("family", "lengths"), [("z-image", [11, 14]), ("qwen-image", [21, 24])])
def test_what_is_not_text_changes_nothing(family, lengths):
    """Prompts are padded to one length, and the padding is cut off again, or attention leaves it out."""
    denoiser = tiny_text_denoiser(family)
    condition = denoiser.condition(["the moon", "a red house"])
    assert condition["lengths"].tolist() == lengths and condition["prompt_embeds"].shape[1] == CHAT_LENGTH
    xt, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([900.0, 100.0])
    output = denoiser.predict(xt, timesteps, condition).output
    condition["prompt_embeds"][0, lengths[0] :] = 9.0
    torch.testing.assert_close(denoiser.predict(xt, timesteps, condition).output, output)
