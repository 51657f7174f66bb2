"""Encoded images: kept, found again, made again when anything they depend on changed, and still varied."""

from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from domainstudio.config import LossWeights
from domainstudio.storage.tensors import bytes_of
from domainstudio.training import latents
from domainstudio.training.examples import Examples, Feed
from domainstudio.training.latents import condition_all, encode_all
from domainstudio.training.objective import Objective
from domainstudio.training.resting import rest
from tests.models import (
    PROMPTS,
    tiny_denoiser,
    tiny_images,
    tiny_text_denoiser,
    tiny_text_images,
    training_settings,
)


class Counting:
    """A model that counts the images it encodes."""

    def __init__(self, denoiser):
        self.denoiser, self.encoded = denoiser, 0

    def __getattr__(self, name):
        return getattr(self.denoiser, name)

    def encode(self, images):
        self.encoded += len(images)
        return self.denoiser.encode(images)


def pictures(number=6, seed=0):
    return torch.from_numpy(tiny_text_images(number, seed))


def pixels(images):
    return ((images + 1) * 127.5).round().to(torch.uint8)


def encode(folder, *, images=None, mirrored=False, change=None):
    """Return encoded images, and how many the encoder of a changed model saw for them."""
    counting: Any = Counting(tiny_text_denoiser())
    if change:
        change(counting)
    return encode_all(counting, pictures() if images is None else images, mirrored, folder), counting.encoded


def feed(folder=None, denoiser=None, **settings):
    denoiser = denoiser or tiny_text_denoiser()
    examples = Examples.of(denoiser, tiny_text_images(), [[text] for text in PROMPTS])
    return Feed(examples, denoiser, training_settings(**settings), folder)


def draw(of, seed, noise=None, size=6):
    generators = [torch.Generator().manual_seed(s) for s in (seed, seed if noise is None else noise)]
    return of.draw(*generators, size, 1, 0)


def test_a_second_run_reads_the_file_and_encodes_nothing(tmp_path):
    first, seen = encode(tmp_path / "latents")
    assert seen == 6 and len(list((tmp_path / "latents").iterdir())) == 1
    second, seen = encode(tmp_path / "latents")
    assert seen == 0
    assert torch.equal(first, second) and first.shape == (1, 6, 8, 8, 8)


def test_batches_of_the_encoder_change_nothing(monkeypatch):
    monkeypatch.setattr(latents, "PIXELS", 8 * 16 * 16)
    images = pictures(number=19)
    encoded, _ = encode(None, images=images)
    alone = tiny_text_denoiser().encode(images[17:18].float() / 127.5 - 1)
    torch.testing.assert_close(encoded[0, 17:18], alone)


def test_mirrored_images_are_encoded_themselves(tmp_path):
    """A mirrored latent is not the latent of the mirrored image."""
    encoded, seen = encode(tmp_path, mirrored=True)
    assert seen == 12 and encoded.shape[0] == 2
    expected = tiny_text_denoiser().encode(pictures().flip(3).float() / 127.5 - 1)
    torch.testing.assert_close(encoded[1], expected)
    assert (encoded[1] - encoded[0].flip(3)).abs().max() > 1e-3


def configured(denoiser):
    denoiser.vae.register_to_config(norm_num_groups=2)


def moved(denoiser):
    with torch.no_grad():
        list(denoiser.vae.parameters())[3].view(-1)[0].add_(1e-3)


def one_pixel_changed():
    images = pictures()
    images[2, 1, 3, 4] ^= 1
    return images


@pytest.mark.parametrize(
    "change",
    [
        {"images": one_pixel_changed()},
        {"images": pictures(number=5)},
        {"images": pictures().flip(0)},
        {"mirrored": True},
        {"change": moved},
        {"change": configured},
    ],
)
def test_what_latents_depend_on_makes_them_again(tmp_path, change):
    before, _ = encode(tmp_path)
    _, seen = encode(tmp_path, **change)
    assert seen > 0
    again, seen = encode(tmp_path)
    assert seen == 0 and torch.equal(before, again)


def test_what_is_trained_does_not_make_them_again(tmp_path):
    def trained(denoiser):
        with torch.no_grad():
            for parameter in denoiser.network.parameters():
                parameter.add_(1)

    encode(tmp_path)
    assert encode(tmp_path, change=trained)[1] == 0


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "foreign"])
def test_a_damaged_file_is_made_again(tmp_path, damage):
    before, _ = encode(tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    if damage == "foreign":
        save_file({"other": before}, path)
    else:
        changed = content[:-9] + bytes([content[-9] ^ 64]) + content[-8:]
        path.write_bytes({"empty": b"", "cut": content[:-100], "changed": changed}[damage])
    again, seen = encode(tmp_path)
    assert seen == 6 and torch.equal(before, again)
    assert path.read_bytes() == content
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_pixel_space_models_keep_nothing(tmp_path):
    assert encode_all(tiny_denoiser(), torch.from_numpy(tiny_images()), True, tmp_path) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cached", [False, True])
def test_augmentation_still_varies(tmp_path, cached):
    """Each image occurs mirrored and upright, its latent being that of the view that is drawn."""
    denoiser = tiny_text_denoiser()
    varied = feed(tmp_path if cached else None, denoiser, horizontal_flip=True)
    views = {"upright": pictures(), "mirrored": pictures().flip(3)}
    known = {i.numpy().tobytes(): (view, n) for view, of in views.items() for n, i in enumerate(of)}
    seen = set()
    for seed in range(12):
        batch = draw(varied, seed)
        expected = denoiser.x0(denoiser.encode(batch.images), torch.Generator().manual_seed(seed))
        torch.testing.assert_close(batch.x0, expected)
        seen |= {known[image.numpy().tobytes()] for image in pixels(batch.images)}
    assert seen == set(known.values())


def test_nothing_is_mirrored_where_that_is_not_asked_for():
    plain = feed()
    upright = {image.numpy().tobytes() for image in pictures()}
    for seed in range(6):
        assert all(image.numpy().tobytes() in upright for image in pixels(draw(plain, seed).images))


def test_latents_are_drawn_anew_in_every_step(tmp_path):
    kept = feed(tmp_path)
    first, second = draw(kept, 0, noise=1), draw(kept, 0, noise=2)
    assert torch.equal(first.images, second.images)
    assert (first.x0 - second.x0).abs().min() > 0
    assert torch.equal(first.x0, draw(kept, 0, noise=1).x0)


def test_kept_and_fresh_latents_are_identical(tmp_path):
    feed(tmp_path, horizontal_flip=True)
    kept, fresh = feed(tmp_path, horizontal_flip=True), feed(None, horizontal_flip=True)
    for seed in range(4):
        assert torch.equal(draw(kept, seed).x0, draw(fresh, seed).x0)


def test_each_image_has_its_own_variants_however_many_there_are():
    """Texts are encoded in parts, each once."""
    denoiser = tiny_text_denoiser()
    texts = [[f"{i} {j}" for j in range(1 + i % 3)] for i in range(100)]
    examples = Examples.of(denoiser, tiny_text_images(100), texts)
    kept = examples.condition["encoder_hidden_states"]
    assert kept.shape[:2] == (100, 3)
    for i, j in (0, 0), (1, 1), (98, 2), (99, 0):
        expected = denoiser.condition([texts[i][j]])["encoder_hidden_states"][0]
        torch.testing.assert_close(kept[i, j], expected)
    assert torch.equal(kept[0, 0], kept[0, 2]) and torch.equal(kept[1, 0], kept[1, 2])


def test_conditions_belong_to_their_images_and_are_dropped_together():
    dropping = feed(condition_dropout=0.5)
    condition = dropping.examples.condition["encoder_hidden_states"][:, 0]
    nothing = tiny_text_denoiser().condition([""])["encoder_hidden_states"][0]
    dropped = 0
    for seed in range(8):
        batch = draw(dropping, seed)
        parts = (each["encoder_hidden_states"] for each in (batch.condition, batch.source_condition))
        for image, told, source in zip(pixels(batch.images), *parts, strict=True):
            (index,) = (pictures() == image).flatten(1).all(1).nonzero()[0].tolist()
            assert torch.equal(told, source)
            if torch.equal(told, nothing):
                dropped += 1
            else:
                assert torch.equal(told, condition[index])
    assert 12 <= dropped <= 36


def test_prompts_are_encoded_once_by_the_same_encoders(tmp_path, monkeypatch):
    denoiser = tiny_text_denoiser("sdxl")
    first = condition_all(denoiser, ["a house", ""], tmp_path)
    for name, values in denoiser.condition(["a house", ""]).items():
        torch.testing.assert_close(first[name], values)
    with monkeypatch.context() as patch:
        patch.setattr(denoiser, "condition", None)  # encoding again would fail
        again = condition_all(denoiser, ["a house", ""], tmp_path)
    assert all(torch.equal(first[name], again[name]) for name in first)
    with torch.no_grad():
        next(denoiser.text_encoders[1].parameters()).add_(1)
    other = condition_all(denoiser, ["a house", ""], tmp_path)
    assert not torch.equal(first["encoder_hidden_states"], other["encoder_hidden_states"])
    assert len(list(tmp_path.iterdir())) == 2


def test_tokens_of_trained_encoders_are_not_kept(tmp_path):
    denoiser = tiny_text_denoiser("sd1")
    denoiser.train(text_encoders=True)
    assert set(condition_all(denoiser, ["a house"], tmp_path)) == {"input_ids"}
    assert not list(tmp_path.iterdir())


def test_an_encoder_is_hashed_once(tmp_path, monkeypatch):
    denoiser = tiny_text_denoiser("sdxl")
    hashed: list[torch.Tensor] = []

    def counted(tensor):
        hashed.append(tensor)
        return bytes_of(tensor)

    monkeypatch.setattr(latents, "bytes_of", counted)
    condition_all(denoiser, ["a house"], tmp_path)
    once = len(hashed)
    assert once == sum(len(encoder.state_dict()) for encoder in denoiser.text_encoders)
    condition_all(denoiser, ["a house"], tmp_path, (16, 24))
    condition_all(denoiser, ["another"], tmp_path)
    assert len(hashed) == once


def test_resting_encoders_come_for_a_call(monkeypatch):
    denoiser, moves = tiny_text_denoiser("sdxl"), []
    expected = denoiser.condition(["a house"])
    for encoder in denoiser.text_encoders:
        monkeypatch.setattr(encoder, "to", lambda place: moves.append(str(place)), raising=False)
    rest(denoiser.text_encoders, "away")
    assert moves == ["away"] * 2
    moves.clear()
    found = denoiser.condition(["a house"])
    assert moves == ["cpu", "away"] * 2
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(IndexError):  # a token that the encoder does not know
        denoiser.text_encoders[0](torch.tensor([[10**6]]))
    assert moves[-1] == "away"


def test_pixels_are_built_where_a_term_looks_at_them():
    denoiser, images = tiny_text_denoiser(), []
    for weights in ({"simple": 1.0}, {"laplacian": 1.0}, {"laplacian": 1.0, "space": "latent"}):
        objective = Objective(denoiser, LossWeights(**weights))
        examples = Examples.of(denoiser, tiny_text_images(), [[text] for text in PROMPTS])
        fed = Feed(examples, denoiser, training_settings(), None, pixels=objective.looks_at_pixels)
        batch = draw(fed, 0)
        assert len(batch.images) == batch.number == len(batch.x0) == 6
        images.append(batch.images.numel())
    assert images == [0, 6 * 3 * 16 * 16, 0]
