"""The parts of a text-to-image pipeline: checked when read, readable by older versions when written."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from domainstudio.errors import CheckpointError, ConfigError
from domainstudio.models.folders import sample_size
from domainstudio.storage.weights import load_part

if TYPE_CHECKING:
    from torch import Tensor

    Parts: TypeAlias = Mapping[str, str | None]
    """Names of a pipeline's parts, with the class of those that are networks."""

VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
"""Files that hold a tokenizer's words; one is enough."""

_STRANGERS = "the parts belong to different models"


def check_folder(
    folder: Path, index: Mapping[str, Any], parts: Parts, optional: Collection[str] = ()
) -> None:
    """Refuse a pipeline folder that lacks a part.

    Diffusers' own errors name another folder, and transformers make an empty tokenizer of an empty folder.

    Args:
        folder: the pipeline folder.
        index: its `model_index.json`.
        parts: what must be there.
        optional: which of them may be left out of the index.

    Raises:
        CheckpointError: a part is missing, has no weights, or has them pickled.
    """
    kind = index["_class_name"]
    for part in parts:
        path = folder / part
        if not index.get(part) or None in index[part]:
            if part in optional:
                continue
            raise CheckpointError(f"{folder}/model_index.json has no {part}, which a {kind} needs")
        if not path.is_dir():
            raise CheckpointError(f"{path} is missing: copy the whole pipeline folder, {part}/ included")
        if part.startswith("tokenizer"):
            if not any((path / name).is_file() for name in VOCABULARIES):
                raise CheckpointError(f"{path} has neither tokenizer.json nor vocab.json: copy it again")
        elif part != "scheduler" and not any(path.glob("*.safetensors")):
            raise CheckpointError(
                f"{path} has no weights as safetensors; pickled ones (.bin, .ckpt) can run code and are "
                "never read. Save the pipeline with save_pretrained(..., safe_serialization=True)"
            )


def load_networks(
    folder: Path, index: Mapping[str, Any], parts: Parts, half: torch.dtype | None = None
) -> dict[str, Any]:
    """Read the networks of a pipeline folder, by their parts' names, and check that their weights are whole.

    A network of a class that no part has is left to the pipeline's own loader, and then refused. A part that
    the index leaves out is `None`.

    Args:
        folder: the pipeline folder.
        index: its `model_index.json`.
        parts: names and classes of the parts.
        half: a type of 16 bits, see `models.load`; else float32.

    Raises:
        CheckpointError: a weight is missing, unknown, misshapen, or not finite.
        Exception: what diffusers' and transformers' loaders raise.
    """
    known = {*parts.values(), *_SAME_FOLDERS}
    found: dict[str, Any] = {}
    for part in parts:
        library, name = index.get(part) or (None, None)
        if library is None:
            found[part] = None
        elif name is not None and name in known:
            lowered = half is not None and _can_be(half, part)
            options = {"dtype" if library == "transformers" else "torch_dtype": half} if lowered else {}
            network = load_part(_class(name), folder / part, local_files_only=True, **options)
            found[part] = network if lowered else network.float()
    return found


def _can_be(half: torch.dtype, part: str) -> bool:
    """Return whether a part works in a type of 16 bits: VAEs and language models overflow float16."""
    return part != "vae" and (half == torch.bfloat16 or not part.startswith("text_encoder"))


def check_present(pipeline: Any, parts: Parts, where: str, optional: Collection[str] = ()) -> None:
    """Refuse a pipeline that lacks a part.

    Args:
        pipeline: the loaded pipeline.
        parts: what it must have.
        where: what to call it in errors.
        optional: which of them may be missing.

    Raises:
        CheckpointError: with the part's name.
    """
    for part in parts:
        if part not in optional and getattr(pipeline, part, None) is None:
            raise CheckpointError(f"{where} has no {part}, which a {type(pipeline).__name__} needs")


def check_part(pipeline: Any, part: str, name: str, where: str) -> None:
    """Refuse a part of another class than `name`.

    Raises:
        CheckpointError: it is.
    """
    if not isinstance(found := getattr(pipeline, part), _class(name)):
        raise CheckpointError(f"{where}/{part} is a {type(found).__name__}, not a {name}")


def check_latents(made: int, read: int, where: str) -> None:
    """Refuse a transformer that reads latents, packed or not, of other channels than the VAE's.

    Raises:
        CheckpointError: with both numbers.
    """
    if made != read:
        raise CheckpointError(
            f"{where}: the VAE makes latents of {made} channels, the transformer reads {read}: {_STRANGERS}"
        )


def check_text(made: int, read: int, where: str, encoder: str = "the text encoder") -> None:
    """Refuse a transformer that reads text of other channels than an encoder's.

    Raises:
        CheckpointError: with both numbers.
    """
    if made != read:
        raise CheckpointError(
            f"{where}: the transformer reads text of {read} channels and {encoder} makes {made}: {_STRANGERS}"
        )


def token_ids(tokenizer: Any, values: Sequence[str], longest: int, *, cut: bool = False) -> Tensor:
    """Return the texts' token ids, padded to the longest, with shape (N, longest).

    Args:
        tokenizer: the tokenizer.
        values: the texts.
        longest: how many tokens the model takes.
        cut: leave out what is longer, where another text encoder reads all.

    Raises:
        ConfigError: a text has more tokens.
    """
    for value in values if not cut else ():
        if (number := len(tokenizer(value, truncation=False).input_ids)) > longest:
            raise ConfigError(
                f"the prompt {value!r} has {number} tokens and the model takes {longest}, begin and end "
                "included: shorten it"
            )
    ids: Tensor = tokenizer(
        list(values), padding="max_length", truncation=cut, max_length=longest, return_tensors="pt"
    ).input_ids
    return ids


_SAME_FOLDERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "Qwen3Model", "Qwen3ForCausalLM")
"""Text encoders that may be named as a part of any pipeline, as classes of a family read the same folders."""


def make_portable(folder: Path, pipeline: Any) -> None:
    """Let older versions of transformers, and other programs, read a written pipeline folder.

    Transformers 5 writes a tokenizer as one file, and a text encoder that it did not read itself without the
    prefix of its weights' names; older versions then stop, or start from random weights.

    Args:
        folder: the written folder; `vocab.json`, `merges.txt` and names are added or changed in place.
        pipeline: what was written there.
    """
    from safetensors.torch import load_file, save_file

    for part, value in pipeline.components.items():
        weights = folder / part / "model.safetensors"
        if not type(value).__name__.startswith("CLIP"):
            continue
        if part.startswith("tokenizer") and (fast := getattr(value, "backend_tokenizer", None)) is not None:
            fast.model.save(str(folder / part))
        elif part.startswith("text_encoder") and weights.is_file():
            tensors = load_file(weights)
            if not any(name.startswith("text_model.") for name in tensors):
                renamed = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
                save_file(renamed, weights, metadata={"format": "pt"})


def check_stable_diffusion(pipeline: Any, where: str) -> None:
    """Refuse a Stable Diffusion pipeline whose parts belong to different models.

    Raises:
        CheckpointError: with the parts' names.
    """
    _check_latents(pipeline.unet.config, pipeline.vae.config, where)
    _check_text(pipeline, where)


def _class(name: str) -> Any:
    """Return a class of diffusers or transformers."""
    import diffusers

    if hasattr(diffusers, name):
        return getattr(diffusers, name)
    import transformers

    return getattr(transformers, name)


def _check_latents(unet: Any, vae: Any, where: str) -> None:
    if not unet.in_channels == unet.out_channels == vae.latent_channels:
        raise CheckpointError(
            f"{where}: the VAE makes latents of {vae.latent_channels} channels, the UNet reads "
            f"{unet.in_channels} and writes {unet.out_channels}; variants such as inpainting are not "
            "supported"
        )
    sample_size(unet, f"{where}/unet")
    if not vae.scaling_factor or vae.scaling_factor <= 0:
        raise CheckpointError(
            f"{where}/vae/config.json: scaling_factor is {vae.scaling_factor}; it must be the positive "
            "factor that the UNet was trained with"
        )
    for name in ("shift_factor", "latents_mean", "latents_std"):
        if getattr(vae, name, None):
            raise CheckpointError(
                f"{where}/vae/config.json: {name} is {getattr(vae, name)}, which pipelines of this kind do "
                "not apply: the VAE belongs to a model of another kind. Use the UNet's own VAE"
            )


def _check_text(pipeline: Any, where: str) -> None:
    unet = pipeline.unet.config
    names = [name for name in ("text_encoder", "text_encoder_2") if hasattr(pipeline, name)]
    configs = [getattr(pipeline, name).config for name in names]
    width = sum(config.hidden_size for config in configs)
    if unet.cross_attention_dim != width:
        raise CheckpointError(
            f"{where}: the UNet reads text embeddings of {unet.cross_attention_dim} channels and the text "
            f"encoder makes {width}: the parts belong to different models"
        )
    if len(names) == 2:
        pooled = configs[-1].projection_dim + 6 * (unet.addition_time_embed_dim or 0)
        if unet.projection_class_embeddings_input_dim != pooled:
            raise CheckpointError(
                f"{where}: the UNet reads {unet.projection_class_embeddings_input_dim} channels of pooled "
                f"text and sizes, and {pooled} are made: the parts belong to different models"
            )
    for name, config in zip(names, configs, strict=True):
        tokenizer = name.replace("text_encoder", "tokenizer")
        if (tokens := len(getattr(pipeline, tokenizer))) > config.vocab_size:
            raise CheckpointError(
                f"{where}: {tokenizer} has {tokens} tokens and {name} knows {config.vocab_size}: the parts "
                "belong to different models"
            )
