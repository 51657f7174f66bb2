"""CLIP's figures, on a tiny random model, against transformers' own preprocessing and model."""

import hashlib
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from domainstudio.config import EvaluateSettings
from domainstudio.demo.text_model import new_tokenizer
from domainstudio.errors import CheckpointError, MissingExtraError
from domainstudio.metrics import clip
from domainstudio.metrics.clip import ClipNetwork, clip_score, load_clip
from domainstudio.metrics.clip_preprocessing import Preprocessing
from domainstudio.metrics.diversity import intra_distance
from domainstudio.metrics.features import FeatureNetwork, Features, extract
from domainstudio.metrics.measure import Known, measure_images
from domainstudio.metrics.networks import register_network
from domainstudio.metrics.pairing import SampleTexts, Texts
from tests.models import PROMPTS, Averages, tiny_images

SIDE, LENGTH = 24, 16
Processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor


def processor(**changes):
    return Processor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained CLIP model as its authors publish it."""
    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = new_tokenizer(PROMPTS, 600, LENGTH)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    configuration = transformers.CLIPConfig(
        text_config={**small, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH},
        vision_config={**small, "image_size": SIDE, "patch_size": 8},
        projection_dim=12,
    )
    transformers.CLIPModel(configuration).save_pretrained(path)
    tokenizer.save_pretrained(path)
    processor().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def network(folder):
    return ClipNetwork(str(folder))


@pytest.fixture(scope="module")
def published(folder):
    """The same model and tokenizer, as transformers loads them."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def projected(output):
    """Return embeddings: a tensor in transformers 4, a model output in 5."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def pictures(height, width, number=2):
    return np.random.default_rng(0).integers(0, 256, (number, 3, height, width), dtype=np.uint8)


def preprocessed(images, own=None):
    """Return the pixels that transformers makes of images."""
    drawn = [Image.fromarray(image.transpose(1, 2, 0)) for image in images]
    return (own or processor())(drawn, return_tensors="pt").pixel_values


SIZES = [(32, 32), (24, 24), (8, 8), (60, 41), (41, 60), (25, 100), (240, 240)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("resample", [2, 3])
def test_pixels_are_those_of_transformers(tmp_path, height, width, resample):
    own = processor(resample=resample)
    own.save_pretrained(tmp_path)
    images = pictures(height, width)
    expected = preprocessed(images, own)
    found = Preprocessing.read(tmp_path / "preprocessor_config.json")(torch.from_numpy(images))
    level = 1 / 255 / min(own.image_std)
    assert found.shape == expected.shape == (2, 3, SIDE, SIDE)
    assert float((found - expected).abs().max()) < 1.01 * level, "more than one grey level off"
    # Pillow's sums are of integers, so pixels at a half may round the other way; bilinear ones often are.
    share = {2: 0.05, 3: 0.01}[resample]
    assert float(((found - expected).abs() > 1e-5).float().mean()) < share


def test_old_and_fixed_sizes_are_understood(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    values = {"resample": 3, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    path.write_text(json.dumps({**values, "size": SIDE, "crop_size": SIDE}))
    images = pictures(30, 50)
    expected = preprocessed(images, processor(**values))
    old = Preprocessing.read(path)
    torch.testing.assert_close(old(torch.from_numpy(images)), expected, atol=0.025, rtol=0)
    path.write_text(json.dumps({**values, "size": {"height": 30, "width": 28}, "crop_size": SIDE}))
    fixed = Preprocessing.read(path)
    assert fixed.size == (30, 28)
    assert fixed(torch.from_numpy(images)).shape == (2, 3, SIDE, SIDE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_center_crop": False}, "do_center_crop must not be false"),
        ({"resample": 1}, "KeyError"),
        ({"crop_size": {"height": 99, "width": 99}}, "must lie within size"),
        ({"image_mean": None}, "TypeError"),
    ],
)
def test_another_preprocessing_is_refused(folder, tmp_path, changes, message):
    other = shutil.copytree(folder, tmp_path / "clip")
    change_preprocessing(other, **changes)
    with pytest.raises(CheckpointError, match=message):
        Preprocessing.read(other / "preprocessor_config.json")


@pytest.mark.parametrize("side", [32, SIDE])
def test_image_embeddings_are_those_of_transformers(network, published, side):
    """Resizing rounds some pixels another way; without it they are the same numbers."""
    images = pictures(side, side, number=5)
    found = extract(images, network, batch_size=2)
    with torch.inference_mode():
        expected = projected(published[0].get_image_features(pixel_values=preprocessed(images))).numpy()
    atol = 1e-5 if side == SIDE else 2e-2 * np.abs(expected).max()
    np.testing.assert_allclose(found.pooled, expected, atol=atol)


LONG = " ".join(["a dog in the snow"] * 10)


def test_text_embeddings_are_those_of_transformers_cut_to_length_in_any_batch(
    network, published, monkeypatch
):
    model, tokenizer = published
    texts = [*PROMPTS, LONG, PROMPTS[0]]
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    with torch.inference_mode():
        expected = projected(model.get_text_features(**tokens))
    expected = torch.nn.functional.normalize(expected, dim=1).numpy()
    np.testing.assert_allclose(network.encode_texts(texts), expected, atol=1e-5)
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
    monkeypatch.setattr(clip, "TEXTS_PER_PASS", 1)
    np.testing.assert_allclose(network.encode_texts(texts), expected, atol=1e-5)


def test_the_score_of_a_pair_is_that_of_transformers(network, published):
    model, tokenizer = published
    images = pictures(SIDE, SIDE, number=6)
    inputs = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**inputs, pixel_values=preprocessed(images)).logits_per_image / model.logit_scale.exp()
    expected = 100 * logits.diagonal().clamp(min=0).mean()
    found = clip_score(extract(images, network), network.encode_texts(PROMPTS))
    assert found == pytest.approx(float(expected), abs=1e-3)


def test_the_score_counted_by_hand():
    unit = np.array([[1, 0], [0, 1], [-1, 0]], dtype=np.float32)
    images = Features("clip", "0", unit * np.float32(7), unit)
    right = unit[[0, 0, 0]]
    each = [clip_score(images.take([index]), right[:1]) for index in range(3)]
    assert each == pytest.approx([100, 0, 0]), "opposite directions count as 0, not as -100"
    assert each[2] == 0
    assert clip_score(images, right) == pytest.approx(100 / 3)
    slanted = np.array([[0.6, 0.8]], dtype=np.float32)
    assert clip_score(images.take([0]), slanted) == pytest.approx(60, rel=1e-6)


def test_the_distance_is_one_minus_the_cosine_and_intra_clip_that_of_a_slow_loop(network):
    samples, training = extract(pictures(32, 32, 14), network), extract(pictures(20, 20, 3), network)
    a, b = (x.pooled / np.linalg.norm(x.pooled, axis=1, keepdims=True) for x in (samples, training))
    squared = ((samples.perceptual[:, None] - samples.perceptual[None]) ** 2).sum(2)
    np.testing.assert_allclose(squared, 1 - a @ a.T, atol=1e-6)
    assigned = (1 - a @ b.T).argmin(1)
    means = []
    for cluster in range(3):
        rows = a[assigned == cluster]
        pairs = [1 - x @ y for i, x in enumerate(rows) for y in rows[i + 1 :]]
        means += [np.mean(pairs)] if pairs else []
    found = intra_distance(samples.perceptual, training.perceptual).mean
    assert found == pytest.approx(np.mean(means), rel=1e-4)


def test_it_is_a_feature_network_with_name_and_hash(network, folder):
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert isinstance(network, FeatureNetwork)
    assert (network.name, network.digest) == (str(folder), digest)
    assert load_clip(str(folder)) is load_clip(str(folder))


SETTINGS = EvaluateSettings(features="averages", memorized_below=0.15, resamples=2)


SUBJECTS = (*PROMPTS, *PROMPTS[:2])


def measured(folder, cache, samples=None, prompts="{} in [V] style"):
    register_network("averages", Averages)
    domain = tiny_images(20)
    told = SampleTexts(SUBJECTS, tuple(prompts.format(name) for name in SUBJECTS))
    names = tuple(PROMPTS * 4)[:20]
    texts = Texts(told, SampleTexts(SUBJECTS, SUBJECTS), names[:4], names)
    settings = SETTINGS.model_copy(update={"clip": None if folder is None else str(folder)})
    samples = tiny_images(8, seed=1) if samples is None else samples
    source = tiny_images(8, seed=2)
    return measure_images(
        samples, source, domain[:4], domain, settings, cache, known=Known(texts=texts)
    ).metrics()


def test_the_metrics_have_a_clip_section_where_a_model_is_named(folder, network, tmp_path):
    section = measured(folder, tmp_path)["clip"]
    assert (section["model"], section["digest"]) == (network.name, network.digest)
    keys = {"clip_score", "subject_clip_score", "intra_clip", "intra_clip_clusters"}
    assert {"samples"} | section["references"].keys() == {"samples", "source", "domain"}
    assert all(set(scores) == keys for scores in (section["samples"], *section["references"].values()))
    images = extract(tiny_images(8, seed=1), network)
    prompts = [f"{name} in [V] style" for name in SUBJECTS]
    assert section["samples"]["clip_score"] == clip_score(images, network.encode_texts(prompts))
    assert section["samples"]["subject_clip_score"] == clip_score(images, network.encode_texts(SUBJECTS))
    source = section["references"]["source"]
    assert source["clip_score"] == source["subject_clip_score"], "the source's prompt is the bare subject"
    assert "clip" not in measured(None, tmp_path)
    unprompted = measured(folder, tmp_path, prompts="")["clip"]["samples"]
    assert "clip_score" not in unprompted
    assert {"subject_clip_score", "intra_clip"} <= set(unprompted)


def test_replicas_have_no_intra_clip_distance(folder, tmp_path):
    replicas = tiny_images(20)[[0, 0, 0, 1, 1, 2, 2, 2]]
    found = measured(folder, tmp_path, replicas)["clip"]["samples"]
    assert found["intra_clip"] == pytest.approx(0, abs=1e-9)
    assert found["intra_clip_clusters"] == 3
    assert measured(folder, tmp_path)["clip"]["samples"]["intra_clip"] > 1e-4


def test_embeddings_are_cached_by_weights_and_preprocessing(network, folder, tmp_path, monkeypatch):
    images = tiny_images(5)
    first = extract(images, network, cache_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(ClipNetwork, "__call__", lambda *_: pytest.fail("these images were encoded before"))
        np.testing.assert_array_equal(extract(images, network, cache_dir=tmp_path).pooled, first.pooled)
    other = shutil.copytree(folder, tmp_path / "other")
    change_preprocessing(other, resample=2)
    assert ClipNetwork(str(other)).recipe != network.recipe


def change_preprocessing(folder, **changes):
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    without_weights(folder)


def lacking(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without_tokenizer(folder):
    for path in (*folder.glob("tokenizer*"), *folder.glob("vocab*"), *folder.glob("merges*")):
        path.unlink()


LARGER = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_weights, "safetensors"),
        (pickled, "safetensors"),
        (lacking, r"lacks weight visual_projection\.weight"),
        (lambda folder: os.truncate(folder / "model.safetensors", 2000), "not a usable CLIP model"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'),
            "of a bert, not of a clip",
        ),
        (without_tokenizer, r"it has no tokenizer\.json"),
        (lambda folder: change_preprocessing(folder, **LARGER), "the model reads 24"),
        (shutil.rmtree, r"clip has no config\.json"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(folder, tmp_path, damage, message):
    other = shutil.copytree(folder, tmp_path / "clip")
    damage(other)
    with pytest.raises(CheckpointError, match=message):
        ClipNetwork(str(other))


def test_sharded_weights_have_a_hash_too(folder, tmp_path, network):
    other = shutil.copytree(folder, tmp_path / "clip")
    without_weights(other)
    transformers.CLIPModel.from_pretrained(folder).save_pretrained(other, max_shard_size="20KB")
    assert len(list(other.glob("model-*.safetensors"))) > 1
    sharded = ClipNetwork(str(other))
    assert len(sharded.digest) == 64
    assert sharded.digest != network.digest
    found, expected = (extract(tiny_images(3), each).pooled for each in (sharded, network))
    np.testing.assert_array_equal(found, expected)


def test_without_transformers_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r'pip install "domainstudio\[text\]"'):
        ClipNetwork(str(folder))
