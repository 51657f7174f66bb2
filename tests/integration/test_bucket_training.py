"""Training on images of several shapes: batches, resume, several processes, and what is refused."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from domainstudio.config import (
    Adaptation,
    LoraSettings,
    Method,
    NoiseSettings,
    PriorSettings,
    PromptSettings,
    UNetSettings,
)
from domainstudio.data import ImageRecord, ImageSet
from domainstudio.errors import TrainingError
from domainstudio.models.unconditional import UnconditionalDenoiser
from domainstudio.training.examples import Examples
from domainstudio.training.objective import Objective
from domainstudio.training.prior import PriorImages
from domainstudio.training.recipe import Recipe
from domainstudio.training.trainer import Trainer
from tests.integration.training_parts import launch, resume
from tests.models import DOMAINSTUDIO, PLAIN, tiny_text_denoiser, training_settings

SHAPES = [(32, 32)] * 3 + [(24, 40)] * 2 + [(40, 24)]
WHOLE = Method(**DOMAINSTUDIO.model_dump() | {"decoder": "full"})  # it looks at pixels, so batches have them
PRIOR = WHOLE.model_copy(update={"prior": 1.0})
LATENT = PRIOR.model_copy(update={"space": "latent"})


def shots(shapes=SHAPES):
    """Return a set of images of these shapes; the value of image i's first pixel is i."""
    rng = np.random.default_rng(0)
    bucketed = [rng.integers(0, 256, (3, *shape), dtype=np.uint8) for shape in shapes]
    for index, image in enumerate(bucketed):
        image[:, 0, 0] = image[:, 0, -1] = index
    squares = rng.integers(0, 256, (len(shapes), 3, 32, 32), dtype=np.uint8)
    records = tuple(
        ImageRecord(str(i), "0", width, height, f"{i}.png", caption=f"house {i}")
        for i, (height, width) in enumerate(shapes)
    )
    return ImageSet(squares, records, "images", bucketed=tuple(bucketed))


def text_denoiser(kind="sd1"):
    """Return the tiny model with 32x32 pixels, which have more than one bucket."""
    denoiser = tiny_text_denoiser(kind)
    denoiser.pipeline.unet.register_to_config(sample_size=16)
    return denoiser


def trainer(folder, kind="sd1", method=PRIOR, denoiser=None, latents=None, images=None, **values):
    settings = training_settings(**{"batch_size": 3, "horizontal_flip": True, **values})
    names: dict[str, Any] = {"name": "mine", "source": "tiny", "target": "ink", "method": "any"}
    prompts = PromptSettings(source="{caption}", target="{caption} [V]")
    adaptation = Adaptation(
        **names, training=settings, weights=method, prompts=prompts, prior=PriorSettings(number=5)
    )
    prior = None
    if method.prior:
        pixels = np.random.default_rng(1).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
        prior = PriorImages(pixels, tuple(f"boat {i}" for i in range(5)))
    denoiser = text_denoiser(kind) if denoiser is None else denoiser
    images = shots() if images is None else images
    return Recipe(adaptation, denoiser, images, prior, latents=latents).trainer(folder)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo itself asks for it
def test_a_step_with_adapters_is_compiled_once_for_all_sizes(tmp_path, monkeypatch):
    counter, compiled = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled(module, backend=counter))
    torch._dynamo.reset()
    method = WHOLE.model_copy(update={"lora": LoraSettings(rank=2, modules=("conv1",))})
    training = trainer(tmp_path, denoiser=pixel_denoiser(2), method=method, compile=True)
    graphs = []
    for training.step in range(8):
        training.take_step()
        graphs.append(counter.frame_count)
    assert graphs[0] == 2, "with and without adapters"
    assert graphs[-1] == 4, "each again for all sizes"


def test_the_decoder_of_the_terms_is_compiled(tmp_path, monkeypatch):
    met = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: met.append(module))
    full = trainer(tmp_path, compile=True)
    assert full.objective.source is not None
    networks = [full.denoiser.network, full.objective.source.network]
    assert met == [*networks, full.denoiser.vae.decoder]


def batches(training, steps):
    """Return the batches of the first steps, without training."""
    for training.step in range(steps):
        yield training._batch(0, torch.Generator().manual_seed(training.step))
    training.step = 0


def first_pixels(batch):
    return ((batch.images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def test_each_batch_has_one_shape_and_every_image_comes(tmp_path):
    training = trainer(tmp_path)
    met = set()
    for batch in batches(training, 40):
        shape = tuple(batch.images.shape[2:])
        indices = first_pixels(batch)
        assert {SHAPES[index] for index in indices} == {shape}
        assert len(set(indices)) == min(3, SHAPES.count(shape)), "repeated only where there are too few"
        assert batch.x0.shape == (6, 4, shape[0] // 2, shape[1] // 2), "images of the prior in the same shape"
        met |= set(indices)
    assert met == set(range(6))


def test_which_shape_comes_depends_on_seed_step_and_micro_step_alone(tmp_path):
    def shapes(training, micro=0, steps=12):
        """Return the number of images of the shape of each step: here it is another for each."""
        found = []
        for training.step in range(steps):
            found.append(len(training._bucket(micro)[0].examples))
        return found

    first = trainer(tmp_path / "a")
    many = shapes(first, steps=600)
    for number in (3, 2, 1):
        assert many.count(number) == pytest.approx(100 * number, abs=36), "in proportion to its images"
    assert shapes(first) == shapes(trainer(tmp_path / "b")) == shapes(first)
    assert shapes(first) != shapes(first, micro=1)
    assert shapes(first) != shapes(trainer(tmp_path / "c", seed=1))


def test_latents_are_kept_for_each_shape(tmp_path, monkeypatch):
    def seen(images=None):
        denoiser = text_denoiser()
        encoded: list[int] = []
        encode = denoiser.encode

        def counting(part):
            encoded.append(len(part))
            return encode(part)

        monkeypatch.setattr(denoiser, "encode", counting)
        training = trainer(tmp_path / "run", denoiser=denoiser, latents=tmp_path / "latents", images=images)
        return sum(encoded), [batch.x0 for batch in batches(training, 6)]

    count, fresh = seen()
    assert count == 2 * (6 + 3 * 5), "shots, and the prior in each shape, upright and mirrored"
    count, kept = seen()
    assert count == 0 and all(torch.equal(a, b) for a, b in zip(fresh, kept, strict=True))
    changed = shots()
    changed.bucketed[5][1, 2, 3] ^= 1
    assert seen(changed)[0] == 2, "only the shape whose image changed"
    mirrored = next(batch for batch in batches(trainer(tmp_path), 20) if batch.images.shape[3] == 40)
    denoiser = text_denoiser()
    expected = denoiser.encode(mirrored.images)
    mean, deviation = expected.chunk(2, dim=1)
    drawn = mirrored.x0[:3] / denoiser.vae.config.scaling_factor
    assert ((drawn - mean).abs() <= 6 * deviation + 1e-4).all()


def test_sdxl_is_told_the_size_of_the_bucket(tmp_path):
    for batch in batches(trainer(tmp_path, "sdxl", condition_dropout=0.5), 12):
        height, width = batch.images.shape[2:]
        told = torch.tensor([height, width, 0, 0, height, width]).float()
        assert (batch.condition["time_ids"] == told).all() and len(batch.condition["time_ids"]) == 6
        assert (batch.source_condition["time_ids"] == told).all()
    default = text_denoiser("sdxl").condition(["a house"])["time_ids"]
    assert default.tolist() == [[32, 32, 0, 0, 32, 32]], "where nothing else is said, the model's own"


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "sd1", "condition_dropout": 0.3},
        {"kind": "sdxl", "method": LATENT, "gradient_accumulation_steps": 2},
    ],
)
def test_resumed_is_bit_identical_to_undisturbed(tmp_path, options):
    undisturbed = resume(trainer, tmp_path, **options)
    terms = {"total", "simple", "prior", "image", "high_frequency", "high_frequency_mse"}
    assert all(math.isfinite(record[term]) for record in undisturbed for term in terms)


def pixel_denoiser(levels):
    torch.manual_seed(0)
    unet = UNetSettings(
        block_out_channels=(8,) * levels, attention=(False,) * levels, attention_head_dim=8, norm_num_groups=4
    )
    return UnconditionalDenoiser.new(unet, NoiseSettings(), 32)


def test_pixel_space_models_whose_unet_can_halve_the_sides(tmp_path):
    training = trainer(tmp_path, method=WHOLE, denoiser=pixel_denoiser(4), steps=3)
    assert len(training.buckets) == 3
    assert all(math.isfinite(record["high_frequency"]) for record in training.train())


def test_models_that_cannot_take_a_shape_say_which_setting_made_it(tmp_path):
    with pytest.raises(
        TrainingError, match=r"prepare\.aspect_buckets made images of 24x40 .*32x32.* 16 only"
    ):
        trainer(tmp_path, method=Method(), denoiser=pixel_denoiser(5))


@pytest.mark.parametrize("shape", [(24, 48), (64, 64), (40, 40)])
def test_shapes_that_are_no_bucket_of_the_model_are_refused(tmp_path, shape):
    denoiser = text_denoiser()
    examples = Examples.of(denoiser, np.zeros((2, 3, *shape), np.uint8), [["a house"]] * 2)
    message = rf"{shape[0]}x{shape[1]} pixels and the model 32x32: set prepare.resolution to 32"
    with pytest.raises(TrainingError, match=message):
        Trainer(Objective(denoiser, PLAIN), [examples], training_settings(), tmp_path)


TWO_PROCESSES = """
import json, sys
from pathlib import Path
from tests.integration.test_bucket_training import WHOLE, first_pixels, trainer

folder = Path(sys.argv[1])
training = trainer(folder, method=WHOLE, steps=5, checkpoint_every=5)
drawn, batch = [], training._batch

def recording(*arguments):
    made = batch(*arguments)
    drawn.append([list(made.images.shape[2:]), first_pixels(made)])
    return made

training._batch = recording
training.train()
folder.mkdir(exist_ok=True)  # the first process may not have written its state yet
(folder / f"{training.accelerator.process_index}.json").write_text(json.dumps(drawn))
"""


def test_two_processes_take_their_shares_of_the_same_bucket(tmp_path):
    launch(TWO_PROCESSES, tmp_path / "run")
    first, second = (json.loads((tmp_path / f"run/{rank}.json").read_text()) for rank in (0, 1))
    assert [shape for shape, _ in first] == [shape for shape, _ in second]
    assert len({tuple(shape) for shape, _ in first}) > 1
    for (shape, mine), (_, other) in zip(first, second, strict=True):
        members = [index for index, each in enumerate(SHAPES) if [*each] == shape]
        assert sorted(mine + other) == sorted(members * (6 // len(members))), "one global batch"
