"""Weights as they are loaded: complete, of the right names and shapes, and finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from domainstudio.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_FAULTS = {
    "missing_keys": "lacks",
    "unexpected_keys": "has the unknown",
    "mismatched_keys": "has the misshapen",
}
"""What diffusers and transformers say of a loading; otherwise they go on, with weights of their own."""

_HARMLESS = {"unexpected_keys": ("position_ids", "lm_head."), "missing_keys": ("position_ids",)}
"""Weights that are computed, or of a language model's head, which a class without one does not use."""


def load_part(kind: Any, folder: str | Path, **options: Any) -> Any:
    """Read a network of diffusers' or transformers', on the CPU, and check that its weights are whole.

    Args:
        kind: its class.
        folder: with `config.json` and weights as safetensors; or a hub id.
        options: of `from_pretrained`.

    Raises:
        CheckpointError: a weight is missing, unknown, of another shape, or not finite: the message names the
            file and the weight.
        Exception: what `from_pretrained` raises.
    """
    library = kind.__module__.partition(".")[0]
    with quiet(library):
        network, found = _read(kind, folder, {**options, "use_safetensors": True}, library)
    for key, fault in _FAULTS.items():
        harmless = _HARMLESS.get(key, ())
        names = sorted(map(_name, found.get(key, ())))
        names = [name for name in names if not any(part in name for part in harmless)]
        if names:
            raise _unusable(
                folder, f"{fault} weight {names[0]}" + f" and {len(names) - 1} more" * (len(names) > 1)
            )
    check_finite(network.state_dict(), folder)
    return network


@contextmanager
def quiet(library: str) -> Iterator[None]:
    """Keep "diffusers" or "transformers" from warnings of what the caller itself checks."""
    logging = import_module(f"{library}.utils.logging")
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _read(kind: Any, folder: str | Path, options: Mapping[str, Any], library: str) -> tuple[Any, Any]:
    """Return a network, and what its library says of the loading, with all misshapen weights."""
    read = partial(kind.from_pretrained, folder, output_loading_info=True, **options)
    listing = {"ignore_mismatched_sizes": True}
    if library == "transformers":
        return cast("tuple[Any, Any]", read(**listing))
    try:
        return cast("tuple[Any, Any]", read())
    except ValueError as error:
        if "expected shape" not in str(error):
            raise
        # diffusers lists them only where it initialises all weights first, which is slow
        return cast("tuple[Any, Any]", read(**listing, low_cpu_mem_usage=False))


def _name(weight: Any) -> str:
    """Return the name of a weight, with its shapes where they differ."""
    if isinstance(weight, str):
        return weight
    name, found, expected = weight
    return f"{name} of shape {list(found)}, expected {list(expected)}"


def check_finite(weights: Mapping[str, Tensor], place: str | Path) -> None:
    """Check that weights are numbers.

    Args:
        weights: by name.
        place: their file, or its folder.

    Raises:
        CheckpointError: one is infinite, or not a number.
    """
    import torch

    for name, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise _unusable(place, f"has values in {name} that are not finite")


def check_shapes(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], place: Path) -> None:
    """Check that weights are those expected.

    Raises:
        CheckpointError: one is missing, unknown or of another shape.
    """
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights or name not in expected:
            raise _unusable(place, f"{'has the unknown' if name in weights else 'lacks'} weight {name}")
        if (found := weights[name].shape) != (wanted := expected[name].shape):
            raise _unusable(place, f"has {name} with shape {list(found)}, expected {list(wanted)}")


def _unusable(place: str | Path, fault: str) -> CheckpointError:
    files = sorted(Path(place).glob("*.safetensors"))
    where = files[0] if len(files) == 1 else place
    return CheckpointError(f"{where} {fault}: it is damaged or of another model. Bring the whole model again")
