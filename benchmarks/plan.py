"""What a training step of a published model costs, known without weights and without a GPU.

    python -m benchmarks.plan --models sd15 --resolutions 512
    python -m benchmarks.plan --models sdxl --resolutions 1024 --batch-sizes 1 4 10 --trained lora

Each step is the project's own: its trainer, objective and optimiser, on fake tensors, which have shapes
and no values. `released` and `diffusers` are the loops of `benchmarks.loops`. Operations are torch's count of
matrix products and convolutions; encoding is that of one image, which is encoded once. Memory is the sum of
the live tensors at its peak; a card fits that has 5% more for the allocator, and 1 GiB for CUDA.
"""

from __future__ import annotations

import gc
import itertools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol
from unittest import mock

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from benchmarks import cli, planned, published, step_cost
from benchmarks.cost import Cost, GpuAutocast
from benchmarks.loops import DiffusersLoop, ReleasedLoop
from domainstudio import precision
from domainstudio.config import MIN_PAIRED_BATCH, LoraSettings, Method, TrainingSettings
from domainstudio.models import lora
from domainstudio.models.linear_decoder import KERNEL, LinearDecoder
from domainstudio.training.decoders import one_by_one
from domainstudio.training.examples import Examples
from domainstudio.training.objective import Objective
from domainstudio.training.trainer import Trainer
from stages.cli import run

if TYPE_CHECKING:
    from domainstudio.models.denoiser import Denoiser, Prediction

CARDS = (12, 24, 48, 80)
"""Memory of the cards that plans are for, in GiB."""

DECODERS = ("linear", "tiny", "full", "latent")
STEPS = ("plain", *(f"domainstudio-{name}" for name in DECODERS), "diffusers", "released")
ENCODE, FORWARD, BACKWARD, SOURCE, DECODE, OPTIMISER, LOSSES = (
    *("encode", "adapted forward", "adapted backward", "source"),
    *("decodes", "optimiser", "losses"),
)
PASSES = (ENCODE, FORWARD, BACKWARD, SOURCE, DECODE)
"""The parts that multiply matrices. What the optimiser and the losses do is next to nothing beside them."""


class Step(step_cost.Step, Protocol):
    """What takes a step: a trainer of the project, or one of `benchmarks.loops`."""

    optimizer: Any


@dataclass(frozen=True)
class Choice:
    """What to plan.

    Attributes:
        model: a key of `published.DENOISERS`.
        step: one of `STEPS`.
        trained: `full`, or `lora` for adapters of rank 16.
        resolution: height and width, in pixels.
        batch_size: training images; with a prior as many of it come on top.
        checkpointing: recompute activations in the backward pass.
        prior: whether ours and diffusers' loop have a prior; the released one always has.
        mixed_precision: autocast's type, and the type of frozen networks.
    """

    model: str
    step: str
    trained: str = "full"
    resolution: int = 512
    batch_size: int = 4
    checkpointing: bool = False
    prior: bool = False
    mixed_precision: Literal["no", "bf16"] = "bf16"

    @property
    def rows(self) -> int:
        """Images of a whole batch."""
        return self.batch_size * (2 if self.prior or self.step == "released" else 1)

    @property
    def too_small(self) -> bool:
        """Whether the batch has no pairs to compare; such steps are left out."""
        pairs = self.step == "released" or self.step.startswith("domainstudio")
        return pairs and self.batch_size < MIN_PAIRED_BATCH

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of `mixed_precision`."""
        return torch.bfloat16 if self.mixed_precision == "bf16" else None


@dataclass(frozen=True)
class Plan:
    """What a step costs.

    Attributes:
        choice: of what.
        operations: floating-point operations by part; `encode` is of one image, once and not per step.
        rest: bytes before the step: weights and the optimiser's state.
        peak: bytes at the step's peak.
        peak_part: what runs then.
    """

    choice: Choice
    operations: Mapping[str, int]
    rest: int
    peak: int
    peak_part: str

    @property
    def total(self) -> int:
        """Operations of the step."""
        once = 0 if self.choice.step == "diffusers" else self.operations.get(ENCODE, 0)
        return sum(self.operations.values()) - once

    @property
    def card(self) -> int | None:
        """The smallest card that it fits on, in GiB."""
        needed = 1.05 * self.peak / 2**30 + 1
        return next((card for card in CARDS if needed <= card), None)


def main() -> None:
    """Plan every combination that the command line names, and print a table."""
    parser = cli.parser("plan", __doc__)
    parser.add_argument("--models", nargs="+", choices=tuple(published.DENOISERS), default=["sd15"])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--trained", nargs="+", choices=("full", "lora"), default=["full"])
    parser.add_argument("--resolutions", nargs="+", type=int, default=[512])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[4])
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--prior", action="store_true", help="with as many images of the prior")
    parser.add_argument("--mixed-precision", choices=("bf16", "no"), default="bf16")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    values = itertools.product(
        options.models, options.trained, options.resolutions, options.batch_sizes, options.steps
    )
    fixed = (options.checkpointing, options.prior, options.mixed_precision)
    choices = [
        Choice(model, step, trained, resolution, batch_size, *fixed)
        for model, trained, resolution, batch_size, step in values
    ]
    if left_out := sum(each.too_small for each in choices):
        print(f"{left_out} left out, as they compare {MIN_PAIRED_BATCH} or more images: raise --batch-sizes")
        choices = [each for each in choices if not each.too_small]
    if not choices:
        return
    plans = [plan(each) for each in tqdm(choices, unit="step")]
    print(table(plans))
    if options.out:
        rows = [{**asdict(each), "total": each.total, "card": each.card} for each in plans]
        options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def table(plans: Sequence[Plan]) -> str:
    """Return plans as a table; steps are compared with the plain one of the same model, size and batch.

    What is encoded once stands there for one image, and is not part of the step.
    """
    plain = {_case(each.choice): each.total for each in plans if each.choice.step == "plain"}
    parts = [f"{name}, TFLOP" for name in (*PASSES, "all")]
    columns = ["", *parts, "against plain", "at rest, GiB", "peak, GiB", "peak in", "fits, GiB"]
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    for each in plans:
        choice, found = each.choice, plain.get(_case(each.choice))
        name = (
            f"{choice.model}, {choice.trained}, {choice.resolution}, batch {choice.batch_size}, {choice.step}"
        )
        counts = [each.operations.get(part, 0) / 1e12 for part in PASSES] + [each.total / 1e12]
        ratio = f"{each.total / found:.2f}" if found else ""
        memory = [f"{size / 2**30:.1f}" for size in (each.rest, each.peak)]
        cells = [name, *(f"{count:.2f}" for count in counts), ratio, *memory, each.peak_part]
        lines.append(f"| {' | '.join([*cells, str(each.card or 'none')])} |")
    return "\n".join(lines)


def _case(choice: Choice) -> tuple[str, str, int, int]:
    return choice.model, choice.trained, choice.resolution, choice.batch_size


def plan(choice: Choice) -> Plan:
    """Take a step on fake tensors and count."""
    cost = Cost()
    with fake(cost):
        step = _made(choice, cost)
        encode = cost.operations[ENCODE] // choice.rows
        fill_state(step.optimizer)
        gc.collect()
        cost.restart()
        rest = cost.peak
        cost.enter(LOSSES)
        step.take_step()
    operations = dict(cost.operations)
    if choice.step != "diffusers":
        operations[ENCODE] = encode
    return Plan(choice, operations, rest, cost.peak, cost.peak_part)


class _Fake(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Fake tensors whose copies are of the same mode: a frozen source is a deep copy."""

    def __deepcopy__(self, memo: Any) -> _Fake:
        return self


@contextmanager
def fake(cost: Cost) -> Iterator[None]:
    """Make all tensors fake ones, computed with as a GPU does, and count."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # by deepcopy
        stack.enter_context(mock.patch.object(precision, "cpu_has_bfloat16", return_value=True))
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _apply))
        for mode in (_Fake(), cost, GpuAutocast()):
            stack.enter_context(mode)
        yield


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Convert or move a module: torch swaps fake parameters in place, and not where they are watched."""
    for child in module.children() if recurse else ():
        _apply(child, function)
    for name, parameter in module._parameters.items():
        if parameter is not None and (new := function(parameter)) is not parameter:
            module._parameters[name] = nn.Parameter(new, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def _made(choice: Choice, cost: Cost) -> Step:
    denoiser = planned.denoiser(choice.model, choice.resolution)
    denoiser.encode = cost.counted(ENCODE, denoiser.encode)  # type: ignore[method-assign]
    if choice.trained == "lora":
        lora.attach(denoiser, LoraSettings(rank=16), 0)
    if choice.step in ("diffusers", "released"):
        return _loop(choice, denoiser, cost)
    return trainer(choice, denoiser, cost)


def trainer(choice: Choice, denoiser: Denoiser, cost: Cost) -> Trainer:
    """Return the project's trainer of a model, whose parts are counted."""
    weights = _weights(choice)
    source = denoiser.frozen_source() if weights.pairwise else None
    exact = weights.decoder != "linear"
    objective = Objective(denoiser, weights, source, _decoder(choice, denoiser), exact=exact)
    settings = TrainingSettings(
        steps=10,
        batch_size=choice.batch_size,
        learning_rate=1e-5,
        ema_decay=0,
        mixed_precision=choice.mixed_precision,
        frozen_precision=choice.mixed_precision,
        gradient_checkpointing=choice.checkpointing,
    )
    examples = _examples(choice)
    made = Trainer(objective, examples, settings, Path("unused"), prior=examples if choice.prior else None)
    watch(objective, cost)
    made.optimizer.step = cost.counted(OPTIMISER, made.optimizer.step)
    return made


def watch(objective: Objective, cost: Cost) -> None:
    """Count the passes of an objective as parts, their backward passes too."""
    if (source := objective.source) is not None:
        source.predict = cost.counted(SOURCE, source.predict)  # type: ignore[method-assign]
    _watch_network(objective.adapted, cost)
    objective.decode = watched_decoder(objective.decode, cost)


def _watch_network(denoiser: Denoiser, cost: Cost) -> None:
    predict = cost.counted(FORWARD, denoiser.predict)

    def watched(xt: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Prediction:
        prediction = predict(xt, timesteps, condition)
        prediction.output.register_hook(lambda _: cost.enter(BACKWARD))  # type: ignore[no-untyped-call]
        return prediction

    denoiser.predict = watched  # type: ignore[method-assign]


def watched_decoder(decode: Callable[[Tensor], Tensor], cost: Cost) -> Callable[[Tensor], Tensor]:
    """Return a decoder whose passes, backward too, count as decodes."""
    counted = cost.counted(DECODE, decode)

    def watched(x0: Tensor) -> Tensor:
        images = counted(x0)
        if images.requires_grad:
            images.register_hook(lambda _: cost.enter(DECODE))  # type: ignore[no-untyped-call]
        return images

    return watched


def _weights(choice: Choice) -> Method:
    prior = float(choice.prior)
    if choice.step == "plain":
        return Method(prior=prior, vlb=0)
    space = "latent" if choice.step.endswith("latent") else "pixel"
    decoder = "full" if choice.step.endswith("full") else "linear"
    terms = {"image": 0.5, "high_frequency": 0.5, "high_frequency_mse": 0.05}
    return Method.model_validate({"prior": prior, "vlb": 0, "space": space, "decoder": decoder, **terms})


def _decoder(choice: Choice, denoiser: Denoiser) -> Callable[[Tensor], Tensor]:
    channels, side, _ = denoiser.shape
    factor = choice.resolution // side
    if choice.step.endswith("linear"):
        weight = torch.zeros(3 * factor**2, channels, KERNEL, KERNEL)
        return LinearDecoder(weight, torch.zeros(len(weight)), factor)
    if choice.step.endswith("tiny"):  # the configuration of madebyollin/taesd
        tiny = AutoencoderTiny(latent_channels=channels).requires_grad_(False)
        return lambda x0: tiny.decode(x0).sample
    return one_by_one(denoiser.decode)


def _examples(choice: Choice) -> Examples:
    number, side = choice.batch_size, choice.resolution
    condition = planned.condition(choice.model, number, side)
    images = torch.zeros(number, 3, side, side, dtype=torch.uint8)
    return Examples(images, condition, condition)


def _loop(choice: Choice, denoiser: Denoiser, cost: Cost) -> Step:
    side = choice.resolution
    condition = {
        name: each[:, 0] for name, each in planned.condition(choice.model, choice.rows, side).items()
    }
    images = torch.zeros(choice.rows, 3, side, side)
    if choice.checkpointing:
        denoiser.enable_gradient_checkpointing()
    kind = ReleasedLoop if choice.step == "released" else DiffusersLoop
    prior = choice.rows > choice.batch_size
    loop = kind(denoiser, images, condition, prior=prior, precision=choice.dtype)
    denoiser.decode = watched_decoder(denoiser.decode, cost)  # type: ignore[method-assign, assignment]
    _watch_network(denoiser, cost)
    loop.optimizer.step = cost.counted(OPTIMISER, loop.optimizer.step)  # type: ignore[method-assign]
    return loop


def fill_state(optimizer: Any) -> None:
    """Make the optimiser's state, which is there from the second step on."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


if __name__ == "__main__":
    run(main)
