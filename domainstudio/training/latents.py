"""Images and prompts encoded once: kept on disk, and made again when they or their encoder change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from domainstudio.storage.tensors import bytes_of, load_tensors, save_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from domainstudio.models.denoiser import Denoiser

PIXELS = 2 * 512 * 512
"""Pixels per pass of the encoder, which holds about 128 channels of each."""

TEXTS = 64
"""Texts per pass of a text encoder."""

FORMAT = 4
"""Changes with what is kept, so that older files are not read."""

_DIGESTS: WeakKeyDictionary[torch.nn.Module, tuple[list[tuple[str, int, int]], bytes]] = WeakKeyDictionary()
"""Digests of encoders, with the places and versions of the weights that they are of."""


def encode_all(denoiser: Denoiser, images: Tensor, mirrored: bool, folder: Path | None) -> Tensor | None:
    """Return every image encoded, upright and mirrored, or `None` where x0 is the image itself.

    Args:
        denoiser: the model, on its device; `encode` must not depend on what is trained.
        images: uint8, with shape (N, 3, H, W).
        mirrored: whether mirrored images are needed.
        folder: where to keep the result, and to look for it.

    Returns:
        Encoded images on the CPU, with shape (1 or 2, N, ...): upright, then mirrored.
    """
    if (encoder := denoiser.vae) is None:
        return None
    device = next(denoiser.network.parameters()).device
    views = [images, images.flip(3)] if mirrored else [images]

    def encode() -> dict[str, Tensor]:
        return {"encoded": torch.stack([_encode(denoiser, view, device) for view in views])}

    if folder is None:
        return encode()["encoded"].contiguous()
    config = {name: value for name, value in encoder.config.items() if not name.startswith("_")}
    what = [list(images.shape), mirrored, config, hashlib.sha256(bytes_of(images)).hexdigest()]
    return _kept(folder, "images", what, [encoder], encode)["encoded"]


def condition_all(
    denoiser: Denoiser, texts: Sequence[str], folder: Path | None, size: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Return the condition of many texts on the CPU, with a row each.

    Args:
        denoiser: the model. Where its text encoders are trained, the result is tokens and is not kept.
        texts: prompts or classes.
        folder: where to keep the result, and to look for it.
        size: height and width of the images; by default the model's own.
    """

    def encode() -> dict[str, Tensor]:
        parts = [denoiser.condition(texts[i : i + TEXTS], size) for i in range(0, len(texts), TEXTS)]
        return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}

    what = denoiser.condition_key(texts, size)
    return encode() if what is None else _kept(folder, "texts", what, denoiser.text_encoders, encode)


def _kept(
    folder: Path | None,
    kind: str,
    what: Any,
    encoders: Sequence[torch.nn.Module],
    encode: Callable[[], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Return what `encode` makes of `what`, or what it made before by the same encoders."""
    if folder is None:
        return {name: tensor.contiguous() for name, tensor in encode().items()}  # as files are
    path = folder / f"{_key(kind, what, encoders)}.safetensors"
    if (found := _read(path)) is not None:
        return found
    made = {name: tensor.contiguous() for name, tensor in encode().items()}
    save_tensors(path, made)
    return made


def _encode(denoiser: Denoiser, images: Tensor, device: torch.device) -> Tensor:
    parts = torch.split(images, max(1, PIXELS // (images.shape[2] * images.shape[3])))
    return torch.cat([denoiser.encode(part.to(device).float() / 127.5 - 1).cpu() for part in parts])


def _key(kind: str, what: Any, encoders: Sequence[torch.nn.Module]) -> str:
    """Return what an encoding depends on, as a name."""
    text = json.dumps([FORMAT, kind, what], sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode())
    for encoder in encoders:
        digest.update(_digest(encoder))
    return digest.hexdigest()


def _digest(encoder: torch.nn.Module) -> bytes:
    """Return the SHA-256 of an encoder's weights, which is computed again only once they have changed."""
    state = sorted(encoder.state_dict().items())
    now = [(name, value.data_ptr(), value._version) for name, value in state]
    if (known := _DIGESTS.get(encoder)) is not None and known[0] == now:
        return known[1]
    digest = hashlib.sha256()
    for name, value in state:
        digest.update(f"{name} {value.dtype}".encode())
        digest.update(bytes_of(value))
    _DIGESTS[encoder] = now, digest.digest()
    return digest.digest()


def _read(path: Path) -> dict[str, Tensor] | None:
    """Return what was kept, or `None` where that is nothing, or is damaged."""
    try:
        return load_tensors(path)
    except (OSError, ValueError):
        return None
