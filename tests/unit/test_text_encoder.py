"""Teaching a text encoder what its texts show: it learns, and resumes as if undisturbed."""

import shutil

import torch

from domainstudio.config import TextEncoderSettings
from domainstudio.demo.text_encoder import train_text_encoder
from tests.models import tiny_text_pipeline

TEXTS = [["a cat", "a kitten"], ["a house"], ["two birds", "birds, sky"], ["a red cup"]]
SETTINGS = TextEncoderSettings(steps=6, batch_size=4, learning_rate=1e-3, checkpoint_every=2)
LATENTS = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))


def trained(folder, settings=SETTINGS):
    pipeline = tiny_text_pipeline()
    train_text_encoder(pipeline, TEXTS, LATENTS, settings, folder)
    return pipeline


def weights(pipeline):
    return torch.cat([p.detach().flatten() for p in pipeline.text_encoder.parameters()])


def test_a_resumed_training_ends_the_same(tmp_path):
    whole = trained(tmp_path / "a")
    trained(tmp_path / "b")
    shutil.rmtree(max((tmp_path / "b").glob("step-*")))  # what a kill before the last checkpoint leaves
    assert torch.equal(weights(whole), weights(trained(tmp_path / "b")))
    assert not torch.equal(weights(whole), weights(tiny_text_pipeline()))


def test_variants_of_a_text_come_to_mean_their_image(tmp_path):
    pipeline = trained(tmp_path, SETTINGS.model_copy(update={"steps": 200, "learning_rate": 1e-2}))
    texts = [text for variants in TEXTS for text in variants]
    tokens = pipeline.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        embedded = pipeline.text_encoder(tokens).pooler_output
    distance = torch.cdist(embedded, embedded)
    same = torch.stack([distance[0, 1], distance[3, 4]])
    others = distance[[0, 0, 0, 3, 3, 3], [2, 3, 5, 0, 2, 5]]
    assert same.max() < 0.5 * others.min()
