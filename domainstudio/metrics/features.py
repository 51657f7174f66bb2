"""Image features: one network pass per image, cached on disk. Every metric is a function of features."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from domainstudio.errors import DataError, DiskError
from domainstudio.storage.tensors import load_tensors, save_tensors

if TYPE_CHECKING:
    from torch import Tensor

Rows = NDArray[np.float32]
logger = logging.getLogger(__name__)

FEATURES = Path(".cache/features")
"""Where a project keeps features, so that the domain and the source are encoded once for all adaptations."""


@dataclass(frozen=True, eq=False)
class Features:
    """Features of N images.

    Attributes:
        network: Name of the network that made them.
        digest: SHA-256 of its weights.
        pooled: Globally averaged last feature map, float32 with shape (N, D).
        perceptual: Embedding whose squared Euclidean distance is the perceptual distance, float32 with
            shape (N, P).
    """

    network: str
    digest: str
    pooled: Rows
    perceptual: Rows

    def __post_init__(self) -> None:
        for name, rows in (("pooled", self.pooled), ("perceptual", self.perceptual)):
            if rows.ndim != 2 or rows.dtype != np.float32 or len(rows) != len(self.pooled):
                raise DataError(
                    f"{self.network}: {name} features must be float32 (N, ·), got {rows.shape} {rows.dtype}"
                )
            if not np.isfinite(rows).all():
                raise DataError(
                    f"{self.network}: {name} features are not finite: check the network and the images"
                )

    def __len__(self) -> int:
        return len(self.pooled)

    def take(self, indices: Sequence[int] | NDArray[np.intp]) -> Features:
        """Return the features of the images at `indices`, in that order."""
        chosen = np.asarray(indices, dtype=np.intp)
        return Features(self.network, self.digest, self.pooled[chosen], self.perceptual[chosen])


@runtime_checkable
class FeatureNetwork(Protocol):
    """What turns images into features.

    Attributes:
        name: Name it is registered under.
        digest: SHA-256 of its weights.
        recipe: What is done to images and activations; part of the cache's key, so it must change whenever
            the features do.
    """

    name: str
    digest: str
    recipe: str

    def __call__(self, images: Tensor) -> Features:
        """Return the features of uint8 RGB images with shape (B, 3, H, W); no gradient."""


def extract(
    images: NDArray[np.uint8],
    network: FeatureNetwork,
    batch_size: int = 50,
    cache_dir: str | Path | None = None,
    progress: str | None = None,
) -> Features:
    """Return the features of `images`, from the cache where they were computed before.

    Args:
        images: uint8 RGB images with shape (N, 3, H, W), N ≥ 1.
        network: What computes the features.
        batch_size: Images per pass; changes memory and speed, not the features (beyond rounding).
        cache_dir: Folder of cached features, or None for no cache. A cache that cannot be read or written
            is reported by a log message and done without.
        progress: Title of a progress bar, or None for none.

    Raises:
        DataError: `images` are not a non-empty uint8 (N, 3, H, W), or features are not finite.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise DataError(
            f"features need uint8 images of shape (N, 3, H, W), N ≥ 1; got {images.dtype} {images.shape}"
        )
    path = None if cache_dir is None else Path(cache_dir) / f"{_key(images, network)}.safetensors"
    if path is not None and (cached := _read(path, network)) is not None:
        return cached
    parts = _share(images, network, batch_size, progress)
    features = Features(
        network.name,
        network.digest,
        np.concatenate([part.pooled for part in parts]),
        np.concatenate([part.perceptual for part in parts]),
    )
    if path is not None:
        _write(path, features)
    return features


def _share(
    images: NDArray[np.uint8], network: FeatureNetwork, batch_size: int, progress: str | None
) -> list[Features]:
    """Return the features of each batch; several processes of accelerate compute a share of them each."""
    from accelerate.utils import gather_object

    from domainstudio.distributed import this_process

    process = this_process()
    rank, processes = process.process_index, process.num_processes
    own = np.array_split(images, processes)[rank]
    parts = [network(batch) for batch in _batches(own, batch_size, progress if rank == 0 else None)]
    return list(gather_object(parts)) if processes > 1 else parts


def _batches(images: NDArray[np.uint8], batch_size: int, progress: str | None) -> Iterable[Tensor]:
    import torch
    from tqdm import tqdm

    with tqdm(total=len(images), unit="image", desc=progress, disable=progress is None) as bar:
        for start in range(0, len(images), batch_size):
            batch = torch.from_numpy(images[start : start + batch_size].copy())
            yield batch
            bar.update(len(batch))


def _key(images: NDArray[np.uint8], network: FeatureNetwork) -> str:
    key = hashlib.sha256(f"{network.name}\n{network.digest}\n{network.recipe}\n{images.shape}\n".encode())
    key.update(np.ascontiguousarray(images).data)
    return key.hexdigest()


def _read(path: Path, network: FeatureNetwork) -> Features | None:
    if not path.is_file():
        return None
    try:
        rows = {name: tensor.numpy() for name, tensor in load_tensors(path, unmarked=True).items()}
        return Features(network.name, network.digest, rows["pooled"], rows["perceptual"])
    except (OSError, ValueError, KeyError, TypeError, DataError) as error:
        logger.warning("cached features %s are not usable (%s): computing them again", path, error)
        return None


def _write(path: Path, features: Features) -> None:
    import torch
    from safetensors import SafetensorError

    rows = {"pooled": features.pooled, "perceptual": features.perceptual}
    try:
        save_tensors(path, {name: torch.from_numpy(each) for name, each in rows.items()})
    except (DiskError, SafetensorError) as error:
        logger.warning(
            "features cannot be cached in %s (%s): the next call computes them again", path.parent, error
        )
