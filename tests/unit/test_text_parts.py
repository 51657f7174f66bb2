"""What is wrong with a text-to-image pipeline's folder or parts is named, each with the place and remedy."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from domainstudio import models
from domainstudio.errors import CheckpointError, ConfigError
from domainstudio.models.text_to_image import TextToImageDenoiser
from tests.models import PROMPT_LENGTH, tiny_text_denoiser, tiny_text_pipeline

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("pipelines")
    for kind in ("sd1", "sdxl"):
        tiny_text_denoiser(kind).save(base / kind)
    return base


@pytest.fixture
def folder(folders, tmp_path):
    return shutil.copytree(folders / "sd1", tmp_path / "model")


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


PARTS = ["unet", "vae", "tokenizer", "text_encoder", "scheduler"]


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named(folder, part):
    shutil.rmtree(folder / part)
    with pytest.raises(CheckpointError, match=rf"{folder}/{part} is missing: copy the whole"):
        models.load(folder)


@pytest.mark.parametrize(
    ("kind", "part"), [("sd1", "vae"), ("sdxl", "text_encoder_2"), ("sdxl", "tokenizer")]
)
def test_a_part_that_the_index_leaves_out_is_named(folders, tmp_path, kind, part):
    folder = shutil.copytree(folders / kind, tmp_path / "model")
    change(folder / "model_index.json", **{part: [None, None]})
    with pytest.raises(CheckpointError, match=rf"model_index.json has no {part}, which a StableDiffusion"):
        models.load(folder)


def test_an_empty_tokenizer_folder_is_refused(folder):
    """Transformers would make a tokenizer of three tokens of it."""
    for path in (folder / "tokenizer").iterdir():
        path.unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer has neither tokenizer.json nor vocab.json"):
        models.load(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickled_weights_are_refused(folder, part):
    (weights,) = (folder / part).glob("*.safetensors")
    weights.unlink()
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save({}, folder / part / name)
    with pytest.raises(CheckpointError, match=rf"{part} has no weights as safetensors.*safe_serialization"):
        models.load(folder)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_damaged_weights_are_refused(folder, part):
    (weights,) = (folder / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(CheckpointError, match=r"not a usable StableDiffusionPipeline.*copy the folder again"):
        models.load(folder)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("vae", {"scaling_factor": 0}, r"vae/config.json: scaling_factor is 0; it must be the positive"),
        ("vae", {"scaling_factor": None}, r"vae/config.json: scaling_factor is None"),
        ("vae", {"shift_factor": 0.1}, r"vae/config.json: shift_factor is 0.1, which.*UNet's own VAE"),
        ("unet", {"sample_size": None}, r"unet/config.json: sample_size is None; set it"),
        ("scheduler", {"prediction_type": "sample"}, r"prediction_type 'sample' is not supported"),
    ],
)
def test_unusable_configurations_are_refused(folder, part, values, message):
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    change(folder / part / name, **values)
    with pytest.raises(CheckpointError, match=message):
        models.load(folder)


def foreign(part):
    """Return a part of a model of other sizes."""
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    if part == "wide text":
        config = CLIPTextConfig(
            vocab_size=400, hidden_size=24, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        )
        return {"text_encoder": CLIPTextModel(config)}
    if part == "few words":
        config = CLIPTextConfig(
            vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        return {"text_encoder": CLIPTextModel(config)}
    if part == "eight channels":
        return {"vae": AutoencoderKL(latent_channels=8, block_out_channels=(8,), norm_num_groups=4)}
    if part == "tiny":
        return {
            "vae": AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
        }
    if part == "inpainting":
        return {
            "unet": UNet2DConditionModel(
                **{**tiny_text_pipeline().unet.config, "in_channels": 9},
            )
        }
    return {"scheduler": FlowMatchEulerDiscreteScheduler()}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("wide text", r"here: the UNet reads text embeddings of 16 channels and the text encoder makes 24"),
        ("few words", r"here: tokenizer has \d+ tokens and text_encoder knows 300: the parts belong"),
        ("eight channels", r"here: the VAE makes latents of 8 channels, the UNet reads 4 and writes 4"),
        ("tiny", r"here/vae is a AutoencoderTiny, not a AutoencoderKL"),
        ("inpainting", r"the UNet reads 9 and writes 4; variants such as inpainting are not supported"),
        (
            "flow",
            r"here/scheduler is a FlowMatchEulerDiscreteScheduler.*flow matching or EDM are not supported",
        ),
    ],
)
def test_parts_of_different_models_are_refused(part, message):
    pipeline = tiny_text_pipeline()
    for name, value in foreign(part).items():
        setattr(pipeline, name, value)
    with pytest.raises(CheckpointError, match=message):
        TextToImageDenoiser(pipeline, "here")


def test_a_pooled_text_of_another_width_is_refused():
    pipeline = tiny_text_pipeline("sdxl")
    pipeline.text_encoder_2.config.projection_dim = 16
    with pytest.raises(CheckpointError, match=r"reads 60 channels of pooled text and sizes, and 64 are made"):
        TextToImageDenoiser(pipeline, "here")


def test_the_text_encoders_length_counts_where_the_tokenizer_names_none(folder):
    change(folder / "tokenizer/tokenizer_config.json", model_max_length=10**30)
    denoiser = models.load(folder)
    assert denoiser.condition(["a cup"])["encoder_hidden_states"].shape[1] == PROMPT_LENGTH
    with pytest.raises(ConfigError, match="has 17 tokens and the model takes 16"):
        denoiser.condition(["7 " * (PROMPT_LENGTH - 1)])


@pytest.mark.slow
def test_a_missing_extra_is_named(folder):
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['peft'] = None\n"
        "from domainstudio import models\n"
        "from domainstudio.errors import MissingExtraError\n"
        f"try: models.load({str(folder)!r})\n"
        "except MissingExtraError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert 'pip install "domainstudio[text]"' in result.stdout, result.stderr
