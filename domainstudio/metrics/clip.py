"""CLIP: whether images show what a prompt says, and how far apart they are to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from domainstudio.errors import CheckpointError, needs_extra
from domainstudio.metrics.clip_preprocessing import Preprocessing
from domainstudio.metrics.diversity import intra_distance
from domainstudio.metrics.features import Features, Rows
from domainstudio.metrics.metric import Figure

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FILES = (
    *("config.json", "preprocessor_config.json", "tokenizer*.json", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
)
"""What of a hub model is downloaded."""

TEXTS_PER_PASS = 100

FIGURES = (
    Figure(
        "clip_score",
        "CLIP score",
        "higher",
        "How well samples show what their prompt says, by CLIP: 100 times the cosine of image and prompt.",
        part="clip",
    ),
    Figure(
        "subject_clip_score",
        "CLIP score of the subject",
        "higher",
        "The same against the bare subject, so that models with different prompts compare.",
        part="clip",
    ),
    Figure(
        "intra_clip",
        "Intra-CLIP",
        "higher",
        "Like the intra distance, with 1 minus the cosine of CLIP's image embeddings as the distance.",
        capped=True,
        part="clip",
    ),
)


@dataclass(frozen=True)
class ClipScores:
    """CLIP's figures of one set of images; None where one is not defined.

    Attributes:
        clip_score: Mean CLIP score of image and prompt.
        subject_clip_score: The same with the bare subject as the text. Words for a style that CLIP has never
            met drop out, and models with different prompts compare.
        intra_clip: Mean CLIP distance among images of the same nearest training image.
        intra_clip_clusters: Training images with at least two such images.
    """

    clip_score: float | None = None
    subject_clip_score: float | None = None
    intra_clip: float | None = None
    intra_clip_clusters: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what is defined, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def clip_score(images: Features, texts: Rows) -> float:
    """Return the mean CLIP score of image and text, 0 … 100.

    Defined as w · max(cos(image, text), 0) with w = 2.5 (Hessel et al., arXiv 2104.08718, eq. 1). Here
    w = 100, as the implementations do that later work reports; divide by 40 for the paper's scale. Departure
    from the paper: texts are not prefixed with "A photo depicts".

    Args:
        images: Features that a `ClipNetwork` made of N images.
        texts: Its unit rows of their texts (`ClipNetwork.encode_texts`), with shape (N, D).
    """
    unit = images.pooled / np.linalg.norm(images.pooled, axis=1, keepdims=True)
    cosines = np.einsum("ij,ij->i", unit.astype(np.float64), texts.astype(np.float64))
    return float(100 * np.maximum(cosines, 0).mean())


def scores(
    network: ClipNetwork, images: Features, shots: Features, prompts: Sequence[str], subjects: Sequence[str]
) -> ClipScores:
    """Return CLIP's figures of images.

    Args:
        network: The model.
        images: Its features of N images.
        shots: Its features of the training images.
        prompts: The images' prompts, N or none; "" leaves an image out of the score.
        subjects: Their bare subjects, likewise.
    """
    intra = intra_distance(images.perceptual, shots.perceptual)
    return ClipScores(
        clip_score=_score(network, images, prompts),
        subject_clip_score=_score(network, images, subjects),
        intra_clip=intra.mean,
        intra_clip_clusters=intra.clusters,
    )


def _score(network: ClipNetwork, images: Features, texts: Sequence[str]) -> float | None:
    """Return the CLIP score of the images that have a text, or None where none has."""
    chosen = [index for index, text in enumerate(texts) if text]
    if not chosen:
        return None
    return clip_score(images.take(chosen), network.encode_texts([texts[index] for index in chosen]))


class ClipNetwork:
    """A CLIP model as a `FeatureNetwork` that reads texts too.

    `pooled` features are the projected image embeddings e. `perceptual` ones are e / (‖e‖ √2), whose squared
    Euclidean distance is 1 − cos: the intra-cluster distance of them is Intra-CLIP.
    """

    def __init__(self, location: str, device: str | torch.device | None = None) -> None:
        """Load a model.

        Args:
            location: A folder in transformers' layout, or a hub id; weights as safetensors.
            device: Where to compute; None takes a GPU where there is one.

        Raises:
            MissingExtraError: transformers is not installed.
            CheckpointError: nothing is there, or it is no CLIP model, or it is not whole.
        """
        import torch

        folder = _local(location)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model, self._tokenizer = _load(folder)
        self._model.to(self.device)
        self._preprocess = Preprocessing.read(folder / "preprocessor_config.json")
        side = self._model.config.vision_config.image_size
        if self._preprocess.crop != (side, side):
            raise CheckpointError(
                f"{folder}/preprocessor_config.json makes images of {self._preprocess.crop} pixels and the "
                f"model reads {side}: the files belong to different models"
            )
        self.name = location
        self.digest = _weights_digest(folder)
        settings = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
        self.recipe = f"clip, config {settings}, {self._preprocess}"

    def __call__(self, images: Tensor) -> Features:
        """Return the features of uint8 RGB images with shape (N, 3, H, W)."""
        import torch

        # TensorFloat-32 would make distances depend on the kind of GPU.
        with torch.inference_mode(), torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
            pixels = self._preprocess(images.to(self.device))
            embeddings = self._model.visual_projection(self._model.vision_model(pixels).pooler_output)
            halves = torch.nn.functional.normalize(embeddings, dim=1) / 2**0.5
        return Features(self.name, self.digest, embeddings.cpu().numpy(), halves.cpu().numpy())

    def encode_texts(self, texts: Sequence[str]) -> Rows:
        """Return the unit embeddings of texts, cut to the model's length, float32 with shape (N, D)."""
        import torch

        different = list(dict.fromkeys(texts))
        longest = self._model.config.text_config.max_position_embeddings
        longest = min(longest, self._tokenizer.model_max_length)
        parts = []
        for start in range(0, len(different), TEXTS_PER_PASS):
            tokens = self._tokenizer(
                different[start : start + TEXTS_PER_PASS],
                padding=True,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            ).to(self.device)
            with torch.inference_mode():
                states = self._model.text_model(tokens.input_ids, attention_mask=tokens.attention_mask)
                embeddings = self._model.text_projection(states.pooler_output)
                parts.append(torch.nn.functional.normalize(embeddings, dim=1).cpu())
        places = {text: index for index, text in enumerate(different)}
        rows: Rows = torch.cat(parts)[[places[text] for text in texts]].numpy()
        return rows


@cache
def load_clip(location: str) -> ClipNetwork:
    """Return the model at `location`, loaded once per process; see `ClipNetwork`."""
    return ClipNetwork(location)


def _local(location: str) -> Path:
    folder = Path(location)
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or location.count("/") != 1 or location.startswith((".", "/")):
        raise CheckpointError(
            f"evaluate.clip: {folder} has no config.json: name a CLIP model's folder, or a hub id such as "
            "openai/clip-vit-large-patch14"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(location, allow_patterns=list(FILES)))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"evaluate.clip: {location!r} cannot be downloaded: {error}") from error


def _load(folder: Path) -> tuple[Any, Any]:
    from safetensors import SafetensorError

    from domainstudio.storage.weights import load_part

    with needs_extra("evaluate.clip", "text"):
        from transformers import AutoTokenizer, CLIPModel
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind != "clip":
            raise ValueError(f"its config.json is of a {kind}, not of a clip")
        model = load_part(CLIPModel, folder, local_files_only=True)
        # transformers makes an empty tokenizer where the files are missing.
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise ValueError("it has no tokenizer.json")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"evaluate.clip: {folder} is not a usable CLIP model: {error}. It needs config.json, "
            "preprocessor_config.json, a tokenizer, and weights as safetensors"
        ) from error
    return model.float().eval().requires_grad_(False), tokenizer


def _weights_digest(folder: Path) -> str:
    """Return the SHA-256 of the file of weights; of several, that of their digests in the names' order."""
    whole = folder / "model.safetensors"
    digests = []
    for path in [whole] if whole.is_file() else sorted(folder.glob("model-*.safetensors")):
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256"))
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()
