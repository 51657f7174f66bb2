"""Two models that draw together: the frozen source model and the one adapted from it.

`config.combination` says how.

*Interpolated* weights are one plain model. *Guided* and *switched* models are a denoiser that asks both, so
samplers do not change. Classifier-free guidance, where there is any, mixes what that denoiser returns. Both
mixes are linear, so their order does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Self

import torch
from torch import nn

from domainstudio.config import GuideSettings, InterpolateSettings, SwitchSettings
from domainstudio.errors import CheckpointError, ConfigError
from domainstudio.models import combination_folder, lora
from domainstudio.models.denoiser import Prediction
from domainstudio.models.interpolation import interpolate
from domainstudio.models.schedule import at_least_float32
from domainstudio.models.wording import Wording

if TYPE_CHECKING:
    from torch import Tensor

    from domainstudio.config import Combination
    from domainstudio.models.adapters import Adapters
    from domainstudio.models.condition import Condition
    from domainstudio.models.denoiser import Denoiser

_SOURCE, _ADAPTED = "source.", "adapted."
"""What the names of each model's conditions begin with."""

_UNLIKE = (
    "the source and the adapted model cannot be combined, as they differ {}: name the source model that was "
    "adapted"
)
_FACTS: Mapping[str, Callable[[Denoiser], object]] = {
    "kind": lambda denoiser: denoiser.kind,
    "shape": lambda denoiser: denoiser.shape,
    "learned variance": lambda denoiser: denoiser.learned_variance,
    "prediction type": lambda denoiser: denoiser.schedule.prediction_type,
    "timesteps": lambda denoiser: denoiser.schedule.num_train_timesteps,
}
"""What two models must share to draw together."""


def combine(
    source: Denoiser, adapted: Denoiser, combination: Combination, wording: Wording | None = None
) -> Denoiser:
    """Return the model that two models are together.

    Args:
        source: the source model. Of adapters it is `adapted.frozen_source()`, which needs no copy.
        adapted: the adapted model. Interpolation changes its weights in place, and returns it.
        combination: how they work together.
        wording: gives the source model's text for one of the adapted model; by default it is the same one.

    Raises:
        CheckpointError: the models do not fit each other.
    """
    _check(source, adapted)
    if isinstance(combination, InterpolateSettings):
        interpolate(source, adapted, combination.weight)
        return adapted
    return CombinedDenoiser(source, adapted, combination, wording or Wording())


class CombinedDenoiser:
    """A denoiser that asks the source model, the adapted one, or both. It is for sampling alone.

    Both predict ε, or v, or velocity, of the same schedule. All are linear in x0 at a given xt and t. So
    mixing outputs mixes x0 by the same weights.

    Args:
        source: the source model.
        adapted: the adapted model.
        combination: guided or switched.
        wording: gives the source model's text for one of the adapted model.
    """

    adapters: Adapters | None = None
    name_or_path = ""

    def __init__(
        self,
        source: Denoiser,
        adapted: Denoiser,
        combination: GuideSettings | SwitchSettings,
        wording: Wording,
    ) -> None:
        self.source, self.adapted = source, adapted
        self.combination, self.wording = combination, wording
        self.kind, self.conditional, self.classes = adapted.kind, adapted.conditional, adapted.classes
        self.vae, self.text_encoders = adapted.vae, adapted.text_encoders
        self.shape, self.resolution, self.multiple = adapted.shape, adapted.resolution, adapted.multiple
        self.learned_variance, self.guidance_patch = adapted.learned_variance, adapted.guidance_patch
        self.schedule = adapted.schedule
        self.network: nn.Module = nn.ModuleList([source.network, adapted.network])

    def condition(self, values: Sequence[str], size: tuple[int, int] | None = None) -> Condition:
        """Return both models' conditions of the adapted model's texts (see `Denoiser.condition`)."""
        own = self.adapted.condition(values, size)
        other = self.source.condition([self.wording.for_source(value) for value in values], size)
        return _prefixed(_SOURCE, other) | _prefixed(_ADAPTED, own)

    def predict(self, xt: Tensor, timesteps: Tensor, condition: Condition) -> Prediction:
        """Return the prediction of both models together.

        Guided: output_source + w·(output_adapted - output_source), with the adapted model's variance
        (arXiv 2504.01521; there the source model gets no condition, here its own). Switched: each row is the
        prediction of the model that draws at its timestep.
        """
        if isinstance(self.combination, GuideSettings):
            return self._guided(self.combination.weight, xt, timesteps, condition)
        return self._switched(self.combination, xt, timesteps, condition)

    def decode(self, x0: Tensor) -> Tensor:
        """Return the images of x0."""
        return self.adapted.decode(x0)

    def to(self, device: torch.device | str) -> Self:
        """Move both models to a device."""
        self.source.to(device)
        self.adapted.to(device)
        return self

    def save(self, folder: Path, *, half: bool = False) -> None:
        """Write both models and how they work together (see `combination_folder`)."""
        source = self.source if self.adapted.adapters is None else lora.without(self.adapted)
        source.save(folder / combination_folder.SOURCE, half=half)
        lora.save_merged(self.adapted, folder / combination_folder.ADAPTED, half=half)
        combination_folder.write_record(folder, self.combination, self.wording)

    def condition_key(self, values: Sequence[str], size: tuple[int, int] | None = None) -> NoReturn:
        """Refuse: it is asked for in training only."""
        self._refuse()

    def train(
        self, *, unet: bool = True, text_encoders: bool = False, new_tokens: Mapping[str, str] | None = None
    ) -> NoReturn:
        """Refuse."""
        self._refuse()

    def encode(self, images: Tensor) -> NoReturn:
        """Refuse: it is asked for in training only."""
        self._refuse()

    def x0(self, encoded: Tensor, generator: torch.Generator) -> NoReturn:
        """Refuse: it is asked for in training only."""
        self._refuse()

    def enable_gradient_checkpointing(self) -> NoReturn:
        """Refuse: it is asked for in training only."""
        self._refuse()

    def frozen_source(self) -> NoReturn:
        """Refuse: it is asked for in training only."""
        self._refuse()

    def _guided(self, weight: float, xt: Tensor, timesteps: Tensor, condition: Condition) -> Prediction:
        source, adapted = (
            each.predict(xt, timesteps, _chosen(prefix, condition))
            for prefix, each in ((_SOURCE, self.source), (_ADAPTED, self.adapted))
        )
        # lerp is exact at both ends: 0 is the source model's output, 1 the adapted one's
        mixed = torch.lerp(at_least_float32(source.output), at_least_float32(adapted.output), weight)
        return replace(adapted, output=mixed)

    def _switched(
        self, switch: SwitchSettings, xt: Tensor, timesteps: Tensor, condition: Condition
    ) -> Prediction:
        above = timesteps >= first_timestep(switch.at, self.schedule.num_train_timesteps)
        of_source = above if switch.source == "above" else ~above
        parts = [(of_source, _SOURCE, self.source), (~of_source, _ADAPTED, self.adapted)]
        asked = [part for part in parts if bool(part[0].any())]
        if len(asked) == 1:
            _, prefix, denoiser = asked[0]
            return denoiser.predict(xt, timesteps, _chosen(prefix, condition))
        found = []
        for rows, prefix, denoiser in asked:
            own = {
                name: values[rows.to(values.device)] for name, values in _chosen(prefix, condition).items()
            }
            found.append(denoiser.predict(xt[rows], timesteps[rows], own))
        return _joined(of_source, *found)

    def _refuse(self) -> NoReturn:
        raise ConfigError(
            f"the model is two models together ({self.combination.title}), and they are not trained further: "
            "name the adapted one, or its source, as the source model of an adaptation"
        )


def first_timestep(at: float, number: int) -> int:
    """Return the lowest timestep at or above a noise level, a fraction of `number` timesteps."""
    return math.ceil(round(at * number, 6))  # 0.07 · 100 is a little above 7


def _check(source: Denoiser, adapted: Denoiser) -> None:
    """Refuse models that do not draw in one space by one schedule.

    Raises:
        CheckpointError: they do not.
    """
    for name, fact in _FACTS.items():
        if (first := fact(source)) != (second := fact(adapted)):
            raise CheckpointError(_UNLIKE.format(f"in {name}, {first} and {second}"))
    if not torch.equal(source.schedule.levels, adapted.schedule.levels):
        raise CheckpointError(_UNLIKE.format("in their noise levels"))


def _joined(of_source: Tensor, source: Prediction, adapted: Prediction) -> Prediction:
    """Return rows of two predictions in the order of the batch."""

    def join(first: Tensor, second: Tensor) -> Tensor:
        whole = first.new_empty((len(of_source), *first.shape[1:]))
        whole[of_source], whole[~of_source] = first, second
        return whole

    if source.variance is None or adapted.variance is None:
        return Prediction(join(source.output, adapted.output))
    return Prediction(join(source.output, adapted.output), join(source.variance, adapted.variance))


def _prefixed(prefix: str, condition: Condition) -> dict[str, Tensor]:
    return {prefix + name: values for name, values in condition.items()}


def _chosen(prefix: str, condition: Condition) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): values for name, values in condition.items() if name.startswith(prefix)
    }
