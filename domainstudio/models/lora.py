"""Low-rank adapters (LoRA, arXiv 2106.09685) in place of full fine-tuning, in models of every kind.

A layer W becomes W + (alpha / rank)·B·A, of which only A and B are trained. So the source model is the same
network with its adapters switched off, and a saved adaptation is small (see `adapter_folder`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from domainstudio.errors import ConfigError, MissingExtraError
from domainstudio.models.adapters import TEXT_ENCODERS, Adapters
from domainstudio.models.folders import digest, local_folder
from domainstudio.seeding import generator

if TYPE_CHECKING:
    from torch import Tensor

    from domainstudio.config import LoraSettings
    from domainstudio.models.denoiser import Denoiser

    D = TypeVar("D", bound=Denoiser)

_NAME = "default"  # peft's name of the one adapter
_INITIALISATION = 20  # sets this draw apart from others of the same seed


class SourceView(nn.Module):
    """A network with adapters that predicts as if it had none, without gradients; it holds no copy.

    It always predicts in eval mode; the shared network's own mode belongs to the training.

    Args:
        network: the network to share.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.training = False

    @torch.no_grad()
    def forward(self, *args: Any, **options: Any) -> Any:
        """Return what the network without adapters returns."""
        with switched_off(self.network):
            return self.network(*args, **options)

    def train(self, mode: bool = True) -> SourceView:
        """Change nothing."""
        return self


@contextmanager
def switched_off(network: nn.Module) -> Iterator[None]:
    """Switch adapters and dropout off; then leave every module and parameter as it was."""
    layers = _layers(network).values()
    disabled = [layer.disable_adapters for layer in layers]
    modes = [(module, module.training) for module in network.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    try:
        network.eval()
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, off in zip(layers, disabled, strict=True):
            layer.enable_adapters(not off)
        for module, mode in modes:
            module.training = mode
        for parameter, requires_grad in trained:  # peft's switch freezes, and unfreezes, what it switches
            parameter.requires_grad_(requires_grad)


def attach(denoiser: Denoiser, settings: LoraSettings, seed: int) -> None:
    """Give a model adapters, in place: from here on they alone are trained, in float32.

    A is drawn from peft's own distribution and B is 0, so the model starts as it was. Attach before
    conditions are made: with adapters in text encoders they are tokens. Attach before `frozen_source` too,
    which then needs no copy.

    Args:
        denoiser: the source model.
        settings: rank, alpha and layers.
        seed: decides A.

    Raises:
        ConfigError: the model lacks what the settings name, or has adapters already.
        MissingExtraError: peft is not installed.
    """
    source = denoiser.name_or_path
    inject(denoiser, Adapters(settings, digest(local_folder(source)) if source else ""), seed)


def inject(denoiser: Denoiser, adapters: Adapters, seed: int) -> None:
    """Do what `attach` does, for a source model whose digest is known."""
    _peft()
    if denoiser.adapters is not None:
        raise ConfigError(
            "the model has adapters already: write it whole with lora.save_merged, and adapt that model"
        )
    parts = parts_of(denoiser.network)
    if adapters.settings.text_encoder and len(parts) == 1:
        raise ConfigError("methods.*.lora.text_encoder is true, and the model has no text encoder: set false")
    for name, part in parts.items():
        _check_modules(part, adapters.modules(name))
    denoiser.train(unet=True, text_encoders=adapters.settings.text_encoder)
    draw = generator(_INITIALISATION, seed)
    for name, part in parts.items():
        if modules := adapters.modules(name):
            _inject(part, modules, adapters, draw)
    denoiser.adapters = adapters


def merged(denoiser: D) -> D:
    """Return a model of its own in which the adapters are fused into the weights, all frozen.

    It shares the parts without adapters. Weights keep their precision: if a training has lowered it, load the
    model again first. The model with adapters stays as it is. A model without adapters is returned itself.
    """
    return denoiser if denoiser.adapters is None else _plain(denoiser, fused=True)


def without(denoiser: D) -> D:
    """Return the source model of a model with adapters, as a model of its own like that of `merged`.

    A model without adapters is returned itself.
    """
    return denoiser if denoiser.adapters is None else _plain(denoiser, fused=False)


def fuse(denoiser: Denoiser) -> None:
    """Fuse the adapters of a model of float32 into its weights, in place, so that it computes less.

    A model of lower precision stays as it is: fused, most of a small update would be rounded away.
    """
    if denoiser.adapters is not None and all(each.dtype == torch.float32 for each in _bases(denoiser)):
        _take_off(denoiser, fused=True)


def save_merged(denoiser: Denoiser, folder: Path, *, half: bool = False) -> None:
    """Write a model with its adapters fused, as the full pipeline folder that plain diffusers reads."""
    merged(denoiser).save(folder, half=half)


def parts_of(network: nn.Module) -> dict[str, nn.Module]:
    """Return a network's modules by diffusers' names of a pipeline's parts, text encoders last."""
    network = network.network if isinstance(network, SourceView) else network
    encoders = zip(TEXT_ENCODERS, getattr(network, "text_encoders", ()), strict=False)
    name = getattr(network, "part", "unet")
    return {name: getattr(network, name, network), **dict(encoders)}


def weights_of(name: str, part: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapter weights of a part by the keys of files, in a fixed order."""
    weights = {
        key.replace(f".{_NAME}.", "."): parameter
        for key, parameter in sorted(part.named_parameters())
        if ".lora_A." in key or ".lora_B." in key
    }
    if name not in TEXT_ENCODERS:
        return weights
    # transformers 5 dropped this prefix from CLIP's text model; other programs still look for it
    return {f"text_model.{key.removeprefix('text_model.')}": value for key, value in weights.items()}


def _plain(denoiser: D, *, fused: bool) -> D:
    """Return a copy of a model with its adapters fused into the weights, or left out."""
    shared = [denoiser.vae, *(part for part in parts_of(denoiser.network).values() if not _layers(part))]
    plain = copy.deepcopy(denoiser, {id(part): part for part in shared if part is not None})
    _take_off(plain, fused=fused)
    return plain


def _take_off(denoiser: Denoiser, *, fused: bool) -> None:
    """Take a model's adapters off, in place, fused into the weights or left out."""
    for part in parts_of(denoiser.network).values():
        for name, layer in _layers(part).items():
            if fused:
                layer.merge()
            part.set_submodule(name, layer.get_base_layer())
        if hasattr(part, "peft_config"):
            del part.peft_config
    denoiser.adapters, denoiser.name_or_path = None, ""


def _bases(denoiser: Denoiser) -> Iterator[Tensor]:
    """Yield the weights that adapters are added to."""
    for part in parts_of(denoiser.network).values():
        for layer in _layers(part).values():
            yield layer.get_base_layer().weight


def _inject(part: nn.Module, modules: Sequence[str], adapters: Adapters, draw: torch.Generator) -> None:
    peft, settings = _peft(), adapters.settings
    trained = {key.rpartition(".")[0] for key, value in part.named_parameters() if value.requires_grad}
    options = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=adapters.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(modules),
    )
    with torch.random.fork_rng(devices=[]):  # peft's own draw must not move the global generator
        peft.inject_adapter_in_model(options, part, _NAME)
    part.requires_grad_(False)
    for name, layer in sorted(_layers(part).items()):
        first, second = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
        values = nn.init.kaiming_uniform_(torch.empty(first.shape), a=math.sqrt(5), generator=draw)
        first.data, second.data = values.to(first.device), torch.zeros(second.shape, device=second.device)
        for parameter in (first, second):  # a layer whose output is not used stays frozen
            parameter.requires_grad_(name in trained)


def _layers(network: nn.Module) -> dict[str, Any]:
    """Return the layers with adapters, by name."""
    kind = _peft().tuners.tuners_utils.BaseTunerLayer
    return {name: module for name, module in network.named_modules() if isinstance(module, kind)}


def _check_modules(part: nn.Module, modules: Sequence[str]) -> None:
    names = [name for name, layer in part.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    missing = [each for each in modules if not any(f".{name}".endswith(f".{each}") for name in names)]
    if missing:
        steps = [name.split(".") for name in names]
        there = sorted({".".join(each[-2:] if each[-1].isdigit() else each[-1:]) for each in steps})
        raise ConfigError(
            f"methods.*.lora.modules: the {type(part).__name__} has no linear or convolution layer whose "
            f"name ends in {', '.join(missing)}; without attention there are no projections. Choose among "
            f"{', '.join(there)}, or train the whole network with lora: null"
        )


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError(
            'adapters need peft, which is not installed. Install it: pip install "domainstudio[text]"'
        ) from error
    return peft
