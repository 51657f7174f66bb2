"""A model as it is drawn: that of a folder, alone or together with its source model."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainstudio.config import InterpolateSettings
from domainstudio.errors import CheckpointError, ConfigError
from domainstudio.models import combination_folder, digest, has_adapters
from domainstudio.models.folders import is_combination
from domainstudio.models.wording import Wording
from domainstudio.project import SOURCE_MODELS
from domainstudio.storage.checkpoint import run_key
from domainstudio.storage.files import read_json

if TYPE_CHECKING:
    import torch

    from domainstudio.config import Adaptation, Combination
    from domainstudio.models.denoiser import Denoiser

RECORD = "provenance.json"
"""What an adapted model came from, and the digest of its files."""

_AGAIN = "Bring the whole model again, or run its stage `finetune` again"


@dataclass(frozen=True)
class Together:
    """How a source model takes part in drawing.

    Attributes:
        combination: the mode, and its weight or noise level.
        source: the source model's folder.
        wording: gives the source model's text for one of the adapted model.
    """

    combination: Combination
    source: Path
    wording: Wording

    @classmethod
    def of(cls, adaptation: Adaptation) -> Together | None:
        """Return how an adaptation is drawn; `None` for the adapted model alone."""
        if adaptation.combine is None:
            return None
        source = SOURCE_MODELS / adaptation.source
        return cls(adaptation.combine, source, Wording.of(adaptation.prompts))

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What manifests and records say of it, and what decides the pictures beside the adapted model."""
        return {"combine": self.combination.model_dump(mode="json"), "source_digest": digest(self.source)}

    def join(self, adapted: Denoiser) -> Denoiser:
        """Return the model that the source model and an adapted one are together (see `combined.combine`)."""
        from domainstudio.models import combined, load

        source = adapted.frozen_source() if adapted.adapters is not None else load(self.source)
        return combined.combine(source, adapted, self.combination, self.wording)


@dataclass(frozen=True)
class StoredModel:
    """A model folder, and how its source model takes part.

    Attributes:
        folder: a pipeline, adapters, or two models that were stored together.
        together: how the source model takes part; `None` draws from the folder's model as it is.
    """

    folder: Path
    together: Together | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides the model; without a source model taking part, that of the folder."""
        if self.together is None:
            return self._own
        return run_key({**self.together.facts, "wording": self.together.wording.pairs}, {"model": self._own})

    @cached_property
    def _own(self) -> str:
        """SHA-256 of the folder.

        Raises:
            CheckpointError: it is not the one that the model's provenance names.
            DataError: the provenance is damaged.
        """
        own, record = digest(self.folder), self.folder / RECORD
        written = read_json(record, _AGAIN).get("digest") if record.is_file() else None
        if written not in (None, own):
            raise CheckpointError(
                f"{self.folder} is damaged, or was changed: the SHA-256 of its files is not the one that "
                f"{RECORD} names. {_AGAIN}"
            )
        return own

    @property
    def is_plain(self) -> bool:
        """Whether it is one network, which diffusers can load."""
        return self.together is None or isinstance(self.together.combination, InterpolateSettings)

    def load(self, half: torch.dtype | None = None) -> Denoiser:
        """Return the model; `half` is as in `models.load`, and two models that are one are of float32.

        Raises:
            CheckpointError: there is none, or the two do not fit each other.
            MissingExtraError: a package that it needs is not installed.
        """
        from domainstudio.models import load

        if self.together is None:
            return load(self.folder, half)
        return self.together.join(load(self.folder))

    def export(self, folder: Path, *, half: bool = False) -> None:
        """Write it as a plain diffusers pipeline, with adapters fused and weights interpolated.

        Args:
            folder: where to write.
            half: store float16.

        Raises:
            ConfigError: it is two models, guided or switched.
        """
        if not self.is_plain:
            assert self.together is not None
            raise ConfigError(
                f"{self.folder} is drawn with {self.together.combination.title}: that takes two models, and "
                "a plain pipeline holds one. Export with --both, for DomainStudio; or set the adaptation's "
                "combine to {mode: interpolate, weight: 0.7}, or to null"
            )
        self.store(folder, half=half)

    def store(self, folder: Path, *, half: bool = False) -> None:
        """Write it whole: a plain pipeline, or a folder of two models (see `combination_folder`).

        Models that need no change are copied as they are, cards included.
        """
        if self.together is not None and not self.is_plain:
            _write(StoredModel(self.together.source), folder / combination_folder.SOURCE, half)
            _write(StoredModel(self.folder), folder / combination_folder.ADAPTED, half)
            combination_folder.write_record(folder, self.together.combination, self.together.wording)
        else:
            _write(self, folder, half)
        if self.together is not None:
            _note(self.folder, folder, self.together)


def _write(model: StoredModel, folder: Path, half: bool) -> None:
    if model.together is None and not half and not has_adapters(model.folder):
        shutil.copytree(model.folder, folder, dirs_exist_ok=True)
        return
    from domainstudio.models import lora

    lora.save_merged(model.load(), folder, half=half)


def _note(adapted: Path, folder: Path, together: Together) -> None:
    """Write the adapted model's provenance, where it has one, and a card, with how the model is drawn."""
    record, card = adapted / RECORD, adapted / "README.md"
    if record.is_file():
        content = {**json.loads(record.read_text(encoding="utf-8")), **together.facts}
        content.pop("digest", None)  # of the adapted model alone
        (folder / record.name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = f"# {adapted.name}\n"
    if is_combination(folder):
        text += "\nTwo models that draw together: `domainstudio.models.load` loads both from this folder.\n"
    elif card.is_file() and not has_adapters(adapted):
        text = card.read_text(encoding="utf-8")
    text += f"\nDrawn with {together.combination.title}; the source model is `{together.source.name}`.\n"
    (folder / card.name).write_text(text, encoding="utf-8")
