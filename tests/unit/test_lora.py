"""Adapters: what is trained, the source that shares its network, and folders that other programs read."""

import json
import shutil
import sys
from functools import cache, partial

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from domainstudio import models
from domainstudio.config import LoraSettings
from domainstudio.errors import CheckpointError, ConfigError, MissingExtraError
from domainstudio.models import lora
from domainstudio.models.stable_diffusion import StableDiffusionDenoiser
from domainstudio.models.unconditional import UnconditionalDenoiser
from domainstudio.sampling import sample
from domainstudio.storage import checkpoint
from domainstudio.training.examples import Examples
from domainstudio.training.objective import Objective
from domainstudio.training.trainer import Trainer
from tests.models import (
    CLASSES,
    DOMAINSTUDIO,
    PROMPTS,
    close,
    tiny_class_denoiser,
    tiny_denoiser,
    tiny_images,
    tiny_latent_denoiser,
    tiny_text_denoiser,
    tiny_text_images,
    training_settings,
)

TEXT = ("sd1", "sd2", "sdxl")
KINDS = ("unconditional", "latent", "class", *TEXT)
SETTINGS = LoraSettings(rank=3, alpha=6)
"""Alpha differs from rank, so that a reader who takes one for the other is found out."""


def source_of(kind):
    if kind in TEXT:
        return tiny_text_denoiser(kind)
    made = {"latent": tiny_latent_denoiser, "class": tiny_class_denoiser, "pixel": tiny_denoiser}
    return made[kind if kind in made else "pixel"]()  # type: ignore[operator]


def settings_for(kind, **changes):
    return SETTINGS.model_copy(update={"text_encoder": kind in TEXT, **changes})


def adapted(kind, base=None, **changes):
    """Return a model with adapters of random weights, of the source in a folder if one is named."""
    denoiser = source_of(kind) if base is None else models.load(base)
    lora.attach(denoiser, settings_for(kind, **changes), seed=0)
    return change(denoiser)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Return a function from a kind to a folder with its source model."""

    @cache
    def base(kind):
        folder = tmp_path_factory.mktemp(kind)
        source_of(kind).save(folder)
        return folder

    return base


def change(denoiser):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trained(denoiser):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return denoiser


def trained(denoiser):
    return [p for p in denoiser.network.parameters() if p.requires_grad]


def base_weights(denoiser):
    named = denoiser.network.named_parameters()
    return {name.replace(".base_layer", ""): p.detach().clone() for name, p in named if ".lora_" not in name}


def told(denoiser):
    return PROMPTS[:3] if denoiser.text_encoders else CLASSES[:3]


def output(denoiser, told_by=None):
    xt = torch.randn(3, *denoiser.shape, generator=torch.Generator().manual_seed(3))
    condition = (told_by or denoiser).condition(told(denoiser))
    with torch.no_grad():
        return denoiser.predict(xt, torch.tensor([10, 400, 900]), condition).output


def pictures(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    options = {"prompt": PROMPTS[:2]} if hasattr(pipeline, "vae") else {"batch_size": 2}
    return pipeline(generator=generators, num_inference_steps=3, output_type="np", **options).images


def pipeline_of(folder, **options):
    return diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)


def trainer(folder, kind="unconditional", settings=SETTINGS, preview=None, **changes):
    denoiser = source_of(kind)
    lora.attach(denoiser, settings, seed=0)
    if kind in TEXT:
        examples = Examples.of(denoiser, tiny_text_images(), [[prompt] for prompt in PROMPTS])
    else:
        examples = Examples.unconditional(tiny_images())
    run = training_settings(learning_rate=1e-2, ema_decay=0.5, **changes)
    objective = Objective(denoiser, DOMAINSTUDIO, denoiser.frozen_source())
    return Trainer(objective, examples, run, folder, preview=preview)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_new_adapters_is_the_source_and_they_alone_are_trained(kind):
    """Also later the source is the same network with adapters switched off."""
    source, denoiser = source_of(kind), source_of(kind)
    before = base_weights(denoiser)
    lora.attach(denoiser, settings_for(kind), seed=0)
    names = [name for name, p in denoiser.network.named_parameters() if p.requires_grad]
    assert names and all(".lora_A." in name or ".lora_B." in name for name in names)
    assert any("text_encoders" in name for name in names) == (kind in TEXT)
    assert all(p.dtype == torch.float32 for p in trained(denoiser))
    assert base_weights(denoiser).keys() == before.keys()
    expected = output(source, told_by=denoiser)
    close(output(denoiser), expected)
    assert not torch.allclose(output(change(denoiser)), expected, atol=1e-3)
    denoiser.network.train()
    view = denoiser.frozen_source()
    assert {id(p) for p in view.network.parameters()} == {id(p) for p in denoiser.network.parameters()}
    close(output(view, told_by=denoiser), expected)
    assert not torch.allclose(output(denoiser), expected, atol=1e-3)


def test_text_encoders_stay_as_they_are_unless_asked_for():
    denoiser = source_of("sd1")
    lora.attach(denoiser, SETTINGS, seed=0)
    assert not any("text_encoders" in n for n, _ in denoiser.network.named_parameters() if ".lora_" in n)
    assert "encoder_hidden_states" in denoiser.condition(PROMPTS)
    with pytest.raises(ValueError, match="they alone are trained"):
        denoiser.train(unet=True)


def test_the_first_weights_are_decided_by_the_seed_alone():
    def weights(seed):
        denoiser = source_of("unconditional")
        torch.manual_seed(seed + 7)
        state = torch.get_rng_state()
        lora.attach(denoiser, SETTINGS, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat([parameter.detach().flatten() for parameter in trained(denoiser)])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_the_source_sees_no_dropout_and_leaves_the_network_as_it_was():
    denoiser = adapted("sd1", dropout=0.9)
    network = denoiser.network.train()
    network.unet.conv_in.eval()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    trained(denoiser)[0].requires_grad_(False)

    def state():
        modes = [module.training for module in network.modules()]
        off = [layer.disable_adapters for layer in lora._layers(network).values()]
        return modes, off, [p.requires_grad for p in network.parameters()]

    before, view = state(), denoiser.frozen_source()
    view.network.eval()
    assert state() == before
    assert torch.equal(output(view, told_by=denoiser), output(view, told_by=denoiser))
    assert state() == before
    with pytest.raises(RuntimeError):
        view.predict(torch.zeros(3, 5, 8, 8), torch.zeros(3).long(), denoiser.condition(PROMPTS[:3]))
    assert state() == before


@pytest.mark.parametrize("kind", ["unconditional", "sd1", "sdxl"])
def test_training_moves_the_adapted_model_away_from_the_source_and_keeps_the_base(tmp_path, kind):
    settings = settings_for(kind, rank=2, dropout=0.1)
    histories = {}
    for checkpointing in (False, True):
        folder = tmp_path / str(checkpointing)
        training = trainer(folder, kind, settings, steps=4, gradient_checkpointing=checkpointing)
        denoiser = training.denoiser
        before, parameters = base_weights(denoiser), [p.detach().clone() for p in trained(denoiser)]
        histories[checkpointing] = training.train()
        after = base_weights(denoiser)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert not any(map(torch.equal, parameters, trained(denoiser)))
    terms = [record["image"] for record in histories[False]]
    assert abs(terms[0]) < 5e-7
    assert max(terms) > 3e-6
    for plain, recomputed in zip(histories[False], histories[True], strict=True):
        assert recomputed["total"] == pytest.approx(plain["total"], rel=1e-4)
        assert recomputed["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)


def test_resumed_is_bit_identical_and_checkpoints_hold_adapters_only(tmp_path):
    settings = LoraSettings(rank=2, dropout=0.2)
    whole = trainer(tmp_path / "whole", settings=settings)
    whole.train()

    def interrupt(denoiser):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "cut", settings=settings, preview=interrupt, preview_every=3).train()
    step, state = checkpoint.latest(tmp_path / "cut") or (None, {})
    assert step == 2 and all(".lora_" in name for name in state["network"])
    second = trainer(tmp_path / "cut", settings=settings)
    assert len(second.train()) == 6
    assert all(map(torch.equal, trained(whole.denoiser), trained(second.denoiser)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_is_small_and_loads_as_the_same_model(tmp_path, bases, kind):
    denoiser = adapted(kind, bases(kind))
    denoiser.save(tmp_path / "adapted")
    record = json.loads((tmp_path / "adapted/adapter.json").read_text())
    assert record == {
        "format": 1,
        "base": bases(kind).as_posix(),
        "base_digest": models.digest(bases(kind)),
        "pipeline": json.loads((bases(kind) / "model_index.json").read_text())["_class_name"],
        "rank": 3,
        "alpha": 6.0,
        "modules": ["to_q", "to_k", "to_v", "to_out.0"],
        "text_encoder": kind in TEXT,
    }
    files = {path.name for path in (tmp_path / "adapted").rglob("*")}
    kohya = {"kohya.safetensors"} if kind in TEXT else set()
    assert files == {"adapter.json", "pytorch_lora_weights.safetensors", *kohya}
    loaded = models.load(tmp_path / "adapted")
    assert type(loaded) is type(denoiser)
    close(output(loaded), output(denoiser))
    loaded.save(tmp_path / "again")
    assert models.digest(tmp_path / "again") == models.digest(tmp_path / "adapted")


def test_half_precision_halves_the_adapters(tmp_path, bases):
    denoiser = adapted("sd1", bases("sd1"))
    denoiser.save(tmp_path / "adapted", half=True)
    for name in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
        tensors = load_file(tmp_path / "adapted" / name)
        assert {t.dtype for k, t in tensors.items() if not k.endswith("alpha")} == {torch.float16}
    loaded = models.load(tmp_path / "adapted")
    assert all(p.dtype == torch.float32 for p in trained(loaded))
    torch.testing.assert_close(output(loaded), output(denoiser), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *((kind, {}) for kind in TEXT),
        ("sd1", {"text_encoder": False}),
        ("sdxl", {"modules": ("to_k", "ff.net.2", "conv1")}),
    ],
)
def test_plain_diffusers_reads_both_files(tmp_path, bases, kind, changes):
    denoiser = adapted(kind, bases(kind), **changes)
    denoiser.save(tmp_path / "adapted")
    expected = pictures(denoiser.pipeline)
    assert abs(expected - pictures(pipeline_of(bases(kind)))).max() > 1e-3
    for options in ({}, {"weight_name": "kohya.safetensors"}):
        pipeline = pipeline_of(bases(kind))
        pipeline.load_lora_weights(tmp_path / "adapted", **options)
        close(pictures(pipeline), expected)
        close(output(StableDiffusionDenoiser(pipeline, "plain"), told_by=denoiser), output(denoiser))


@pytest.mark.parametrize(("kind", "first"), [("sd1", "lora_te_"), ("sdxl", "lora_te1_")])
def test_kohya_keys_are_those_of_other_programs(tmp_path, bases, kind, first):
    adapted(kind, bases(kind)).save(tmp_path / "adapted")
    tensors = load_file(tmp_path / "adapted/kohya.safetensors")
    layer = "text_model_encoder_layers_0_self_attn_q_proj"
    unet = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"
    layers = [unet, first + layer, *(["lora_te2_" + layer] if kind == "sdxl" else [])]
    for name in layers:
        assert tensors[f"{name}.alpha"] == 6
        assert tensors[f"{name}.lora_down.weight"].shape[0] == tensors[f"{name}.lora_up.weight"].shape[1] == 3
    assert {key.split("_")[1] for key in tensors} == {name.split("_")[1] for name in layers}
    other = load_file(tmp_path / "adapted/pytorch_lora_weights.safetensors")
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in other


@pytest.mark.parametrize("kind", KINDS)
def test_fused_adapters_make_a_full_pipeline_that_draws_the_same(tmp_path, kind):
    denoiser = adapted(kind)
    before, expected = base_weights(denoiser), output(denoiser)
    merged = lora.merged(denoiser)
    close(output(merged), expected)
    lora.attach(lora.merged(denoiser), SETTINGS, seed=0)
    assert torch.equal(output(denoiser), expected)
    assert all(torch.equal(before[name], value) for name, value in base_weights(denoiser).items())
    lora.save_merged(denoiser, tmp_path / "merged")
    full = models.load(tmp_path / "merged")
    close(output(full, told_by=denoiser), expected)
    assert full.adapters is None and base_weights(full).keys() == before.keys()
    drawn = [sample(each, [0, 1], told(each)[:2], steps=3).astype(int) for each in (denoiser, full)]
    assert abs(drawn[0] - drawn[1]).max() <= 1
    if kind in TEXT:
        close(pictures(pipeline_of(tmp_path / "merged")), pictures(denoiser.pipeline))


@pytest.mark.parametrize("kind", KINDS)
def test_fused_in_place_it_draws_as_the_merged_model(kind):
    denoiser = adapted(kind)
    merged, expected = lora.merged(denoiser), base_weights(denoiser).keys()
    lora.fuse(denoiser)
    assert torch.equal(output(denoiser), output(merged, told_by=denoiser))
    assert denoiser.adapters is None and base_weights(denoiser).keys() == expected


def test_adapters_of_lowered_weights_are_not_fused():
    denoiser = adapted("unconditional")
    denoiser.network.to(torch.bfloat16)
    lora.fuse(denoiser)
    assert denoiser.adapters is not None


def test_the_merged_model_shares_what_has_no_adapters():
    denoiser = adapted("sd1", text_encoder=False)
    merged = lora.merged(denoiser)
    assert merged.vae is denoiser.vae is merged.pipeline.vae
    assert merged.pipeline.text_encoder is denoiser.pipeline.text_encoder
    assert merged.pipeline.unet is merged.network.unet is not denoiser.pipeline.unet
    assert lora.merged(merged) is merged


def test_without_attention_convolutions_can_be_adapted(tmp_path):
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        add_attention=False,
        norm_num_groups=4,
    )
    UnconditionalDenoiser(unet, tiny_denoiser().scheduler).save(tmp_path / "base")
    denoiser = models.load(tmp_path / "base")
    remedy = r"methods\.\*\.lora\.modules: the UNet2DModel has .* ends in to_q, .*Choose among.* conv1.* null"
    with pytest.raises(ConfigError, match=remedy):
        lora.attach(denoiser, SETTINGS, seed=0)
    assert denoiser.adapters is None and all(p.requires_grad for p in denoiser.network.parameters())
    lora.attach(denoiser, SETTINGS.model_copy(update={"modules": ("conv1",)}), seed=0)
    change(denoiser).save(tmp_path / "adapted")
    close(output(models.load(tmp_path / "adapted")), output(denoiser))
    close(output(lora.merged(denoiser)), output(denoiser))


MISSING = r"ends in {};.*to_out\.0, to_q"


@pytest.mark.parametrize(
    ("make", "changes", "problem"),
    [
        (partial(source_of, "sd1"), {"modules": ("to_q", "to_qq")}, MISSING.format("to_qq")),
        (partial(source_of, "sd1"), {"modules": ("to_out",)}, MISSING.format("to_out")),
        (partial(source_of, "sd1"), {"modules": ("o_q",)}, MISSING.format("o_q")),
        (partial(source_of, "class"), {"text_encoder": True}, r"lora\.text_encoder is true.* set false"),
        (partial(adapted, "unconditional"), {}, r"has adapters already: .*save_merged"),
    ],
)
def test_adapters_that_the_model_cannot_take_are_refused(make, changes, problem):
    with pytest.raises(ConfigError, match=problem):
        lora.attach(make(), SETTINGS.model_copy(update=changes), seed=0)


def test_without_peft_the_extra_is_named(monkeypatch):
    denoiser = source_of("unconditional")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r'pip install "domainstudio\[text\]"'):
        lora.attach(denoiser, SETTINGS, seed=0)


def test_adapters_of_a_model_without_a_folder_cannot_be_saved_alone(tmp_path):
    with pytest.raises(CheckpointError, match=r"not loaded from one: save the source model.*save_merged"):
        adapted("unconditional").save(tmp_path)


@pytest.fixture
def folder(tmp_path):
    source_of("unconditional").save(tmp_path / "base")
    adapted("unconditional", tmp_path / "base").save(tmp_path / "adapted")
    return tmp_path / "adapted"


def test_the_source_model_must_be_there_and_the_same(folder):
    base = folder.parent / "base"
    base.rename(folder.parent / "moved")
    with pytest.raises(CheckpointError, match=r"source model is not there.*set base in .*adapter\.json"):
        models.load(folder)
    tiny_denoiser(seed=1).save(base)
    with pytest.raises(CheckpointError, match=r"SHA-256.* is another one now.*or adapt again"):
        models.load(folder)
    edit(folder, base=(folder.parent / "moved").as_posix())
    models.load(folder)


def edit(folder, **changes):
    path = folder / "adapter.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut_weights(folder):
    weights = folder / "pytorch_lora_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def add_pipeline(folder):
    shutil.copytree(folder.parent / "base", folder, dirs_exist_ok=True)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (partial(edit, format=2), "format 2 is unknown"),
        (partial(edit, rank=0), "rank"),
        (partial(edit, rank=2), r"has unet\..* with shape \[\d+, \d+.*\], expected \["),
        (partial(edit, modules=["to_q"]), r"pytorch_lora_weights\.safetensors has the unknown weight"),
        (partial(edit, modules=["attn"]), "does not fit .*base: methods"),
        (cut_weights, r"pytorch_lora_weights\.safetensors does not fit.*Adapt again"),
        (add_pipeline, r"model_index\.json.* and adapters .*delete"),
    ],
)
def test_a_damaged_folder_is_refused(folder, damage, problem):
    damage(folder)
    with pytest.raises(CheckpointError, match=problem):
        models.load(folder)


def test_the_digest_covers_the_adapters(folder):
    first = models.digest(folder)
    weights = folder / "pytorch_lora_weights.safetensors"
    save_file({key: value + 1 for key, value in load_file(weights).items()}, weights)
    second = models.digest(folder)
    edit(folder, alpha=7)
    assert len({first, second, models.digest(folder)}) == 3


def test_a_model_knows_where_it_was_loaded_from(folder):
    base = folder.parent / "base"
    assert models.load(base).name_or_path == models.load(folder).name_or_path == base.as_posix()
    assert source_of("unconditional").name_or_path == source_of("sd1").name_or_path == ""
