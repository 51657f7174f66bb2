"""The parts of a text-to-image pipeline: checked when read, readable by older versions when written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

from domainstudio.errors import CheckpointError
from domainstudio.models.schedule import check_prediction_type
from domainstudio.storage.weights import load_part

_PARTS = {
    "StableDiffusionPipeline": ("unet", "vae", "scheduler", "tokenizer", "text_encoder"),
    "StableDiffusionXLPipeline": (
        *("unet", "vae", "scheduler", "tokenizer", "text_encoder"),
        *("tokenizer_2", "text_encoder_2"),
    ),
}
PIPELINES = frozenset(_PARTS)


def check_folder(folder: Path, index: Mapping[str, Any]) -> None:
    """Refuse a pipeline folder that lacks a part.

    Diffusers' own errors name another folder, and transformers make an empty tokenizer of an empty folder.

    Args:
        folder: the pipeline folder.
        index: its `model_index.json`.

    Raises:
        CheckpointError: a part is missing, has no weights, or has them pickled.
    """
    kind = index["_class_name"]
    for part in _PARTS[kind]:
        path = folder / part
        if not index.get(part) or None in index[part]:
            raise CheckpointError(f"{folder}/model_index.json has no {part}, which a {kind} needs")
        if not path.is_dir():
            raise CheckpointError(f"{path} is missing: copy the whole pipeline folder, {part}/ included")
        if part.startswith("tokenizer"):
            if not (path / "tokenizer.json").is_file() and not (path / "vocab.json").is_file():
                raise CheckpointError(f"{path} has neither tokenizer.json nor vocab.json: copy it again")
        elif part != "scheduler" and not any(path.glob("*.safetensors")):
            raise CheckpointError(
                f"{path} has no weights as safetensors; pickled ones (.bin, .ckpt) can run code and are "
                "never read. Save the pipeline with save_pretrained(..., safe_serialization=True)"
            )


def load_networks(folder: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """Read the networks of a pipeline folder, by their parts' names, and check that their weights are whole.

    A network of a kind that does not belong there is left to `check_parts`.

    Args:
        folder: the pipeline folder.
        index: its `model_index.json`.

    Raises:
        CheckpointError: a weight is missing, unknown, misshapen, or not finite.
        Exception: what diffusers' and transformers' loaders raise.
    """
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    kinds = (UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection)
    known = {kind.__name__: kind for kind in kinds}
    parts = {part: known.get(index[part][1]) for part in _PARTS[index["_class_name"]]}
    return {
        part: load_part(kind, folder / part, local_files_only=True)
        for part, kind in parts.items()
        if kind is not None
    }


def check_parts(pipeline: Any, where: str) -> None:
    """Refuse a pipeline whose parts are missing, belong to different models, or are of another kind.

    Args:
        pipeline: the loaded pipeline.
        where: what to call it in errors.

    Raises:
        CheckpointError: one of these, with the part's name.
    """
    for part in _PARTS[type(pipeline).__name__]:
        if getattr(pipeline, part, None) is None:
            raise CheckpointError(f"{where} has no {part}, which a {type(pipeline).__name__} needs")
    for part, kind in ("unet", UNet2DConditionModel), ("vae", AutoencoderKL):
        if not isinstance(found := getattr(pipeline, part), kind):
            raise CheckpointError(f"{where}/{part} is a {type(found).__name__}, not a {kind.__name__}")
    _check_latents(pipeline.unet.config, pipeline.vae.config, where)
    _check_text(pipeline, where)


def training_schedule(scheduler: Any, where: str) -> DDPMScheduler:
    """Return the forward diffusion of a pipeline's scheduler, whatever sampler it is.

    Raises:
        CheckpointError: its noise levels are not those of a DDPM, or what it predicts has no conversion.
    """
    levels = getattr(scheduler, "alphas_cumprod", None)
    if levels is None:
        raise CheckpointError(
            f"{where}/scheduler is a {type(scheduler).__name__} whose noise levels are not those of a DDPM; "
            "models of flow matching or EDM are not supported"
        )
    schedule: DDPMScheduler = DDPMScheduler.from_config(
        scheduler.config, clip_sample=False, thresholding=False, variance_type="fixed_small"
    )
    check_prediction_type(schedule, f"{where}/scheduler/scheduler_config.json")
    return schedule


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
        if part.startswith("tokenizer") and (fast := getattr(value, "backend_tokenizer", None)) is not None:
            fast.model.save(str(folder / part))
        elif part.startswith("text_encoder") and weights.is_file():
            tensors = load_file(weights)
            if not any(name.startswith("text_model.") for name in tensors):
                renamed = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
                save_file(renamed, weights, metadata={"format": "pt"})


def _check_latents(unet: Any, vae: Any, where: str) -> None:
    if not unet.in_channels == unet.out_channels == vae.latent_channels:
        raise CheckpointError(
            f"{where}: the VAE makes latents of {vae.latent_channels} channels, the UNet reads "
            f"{unet.in_channels} and writes {unet.out_channels}; variants such as inpainting are not "
            "supported"
        )
    if not unet.sample_size:
        raise CheckpointError(
            f"{where}/unet/config.json: sample_size is {unet.sample_size}; set it to the latents' height"
        )
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
    names = [part for part in _PARTS[type(pipeline).__name__] if part.startswith("text_encoder")]
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
