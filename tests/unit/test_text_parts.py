"""What is wrong with a text-to-image pipeline's folder or parts is named, each with the place and remedy."""

import json
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from domainstudio import models
from domainstudio.errors import CheckpointError, ConfigError
from domainstudio.models.stable_diffusion import StableDiffusionDenoiser
from tests.models import PROMPT_LENGTH, tiny_text_denoiser, tiny_text_pipeline
from tests.project import ROOT


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("pipelines")
    for kind in ("sd1", "sdxl"):
        tiny_text_denoiser(kind).save(base / kind)
    return base


@pytest.fixture
def folder(folders, tmp_path):
    return shutil.copytree(folders / "sd1", tmp_path / "model")


@pytest.mark.parametrize(
    ("kind", "part"), [("sd1", "vae"), ("sdxl", "text_encoder_2"), ("sdxl", "tokenizer")]
)
def test_a_part_that_the_index_leaves_out_is_named(folders, tmp_path, kind, part):
    folder = shutil.copytree(folders / kind, tmp_path / "model")
    change(folder / "model_index.json", **{part: [None, None]})
    with pytest.raises(CheckpointError, match=rf"model_index.json has no {part}, which a StableDiffusion"):
        models.load(folder)


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def empty(part):
    for path in part.iterdir():
        path.unlink()


def pickle(part):
    (weights,) = part.glob("*.safetensors")
    weights.unlink()
    torch.save({}, part / ("pytorch_model.bin" if "text" in part.name else "diffusion_pytorch_model.bin"))


def cut(part):
    (weights,) = part.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-64])


def put(**values):
    def configure(part):
        change(part / ("scheduler_config.json" if part.name == "scheduler" else "config.json"), **values)

    return configure


def version(folder):
    """Give a tokenizer a version that its library refuses, as an `Exception` of no other class."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | {"version": "9.0"}))


PARTS = ("unet", "vae", "tokenizer", "text_encoder", "scheduler")
MISSING = r"{folder}/{part} is missing: copy the whole"
PICKLED = r"{part} has no weights as safetensors.*safe_serialization"
CUT = r"not a usable StableDiffusionPipeline.*copy the folder again"


@pytest.mark.parametrize(
    ("damage", "part", "message"),
    [
        *((shutil.rmtree, part, MISSING) for part in PARTS),
        # Transformers would make a tokenizer of three tokens of an empty folder.
        (empty, "tokenizer", r"tokenizer has neither tokenizer.json nor vocab.json"),
        *((pickle, part, PICKLED) for part in ("unet", "vae", "text_encoder")),
        *((cut, part, CUT) for part in ("unet", "text_encoder")),
        (version, "tokenizer", r"not a usable .*Unknown tokenizer version '9.0'"),
        (put(scaling_factor=0), "vae", r"{part}/config.json: scaling_factor is 0; it must be the positive"),
        (put(scaling_factor=None), "vae", r"{part}/config.json: scaling_factor is None"),
        (put(shift_factor=0.1), "vae", r"{part}/config.json: shift_factor is 0.1, which.*UNet's own VAE"),
        (put(sample_size=None), "unet", r"{part}/config.json: sample_size is None; set it"),
        (
            put(timestep_spacing="*leading"),
            "scheduler",
            r"config.json: timestep_spacing '\*leading' is none of",
        ),
        (put(prediction_type="sample"), "scheduler", r"prediction_type 'sample' is not supported"),
    ],
)
def test_a_damaged_part_is_named(folder, damage, part, message):
    damage(folder / part)
    with pytest.raises(CheckpointError, match=message.format(folder=folder, part=part)):
        models.load(folder)


def text_encoder(words, width):
    sizes = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(vocab_size=words, hidden_size=width, **sizes))


def inpainting_unet():
    return UNet2DConditionModel(**{**tiny_text_pipeline().unet.config, "in_channels": 9})


BLOCKS = (8,) * 4


@pytest.mark.parametrize(
    ("name", "foreign", "message"),
    [
        (
            "text_encoder",
            partial(text_encoder, 400, 24),
            r"here: the UNet reads text embeddings of 16 channels and the text encoder makes 24",
        ),
        (
            "text_encoder",
            partial(text_encoder, 300, 16),
            r"here: tokenizer has \d+ tokens and text_encoder knows 300: the parts belong",
        ),
        (
            "vae",
            partial(AutoencoderKL, latent_channels=8, block_out_channels=(8,), norm_num_groups=4),
            r"here: the VAE makes latents of 8 channels, the UNet reads 4 and writes 4",
        ),
        (
            "vae",
            partial(AutoencoderTiny, encoder_block_out_channels=BLOCKS, decoder_block_out_channels=BLOCKS),
            r"here/vae is a AutoencoderTiny, not a AutoencoderKL",
        ),
        (
            "unet",
            inpainting_unet,
            r"the UNet reads 9 and writes 4; variants such as inpainting are not supported",
        ),
        (
            "scheduler",
            FlowMatchEulerDiscreteScheduler,
            r"here/scheduler is a FlowMatchEulerDiscreteScheduler.*noise levels are not those of a DDPM",
        ),
    ],
)
def test_parts_of_different_models_are_refused(name, foreign, message):
    pipeline = tiny_text_pipeline()
    setattr(pipeline, name, foreign())
    with pytest.raises(CheckpointError, match=message):
        StableDiffusionDenoiser(pipeline, "here")


def test_a_pooled_text_of_another_width_is_refused():
    pipeline = tiny_text_pipeline("sdxl")
    pipeline.text_encoder_2.config.projection_dim = 16
    with pytest.raises(CheckpointError, match=r"reads 60 channels of pooled text and sizes, and 64 are made"):
        StableDiffusionDenoiser(pipeline, "here")


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
