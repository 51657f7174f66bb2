"""How near a cheaper decoder's gradients are to those of the model's own VAE, term by term.

    python -m benchmarks.gradients --params params.yaml benchmarks/ink.yaml benchmarks/text.yaml \
        --adaptation text-domainstudio --tiny-vae .cache/tiny-vae

Gradients are of all trained weights. The adapted model is the source model with its weights moved at
random, because between equal models the pairwise terms have no gradient.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import cli
from domainstudio import config
from domainstudio.distributed import this_process
from domainstudio.seeding import generator
from domainstudio.training.objective import Objective, noisy_batch
from domainstudio.training.recipe import Recipe
from stages.cli import run

if TYPE_CHECKING:
    from domainstudio.config import Adaptation
    from domainstudio.training.objective import NoisyBatch
    from domainstudio.training.trainer import Trainer

TERMS = ("image", "high_frequency", "high_frequency_mse")
MOVED = 0.05
"""How far each weight is moved, as a part of its tensor's standard deviation."""


def main() -> None:
    """Print the mean cosine of each decoder's gradient to the whole decoder's."""
    parser = cli.settings_parser("gradients", __doc__)
    parser.add_argument("--adaptation", required=True, help="one with the terms, of a model of latents")
    parser.add_argument("--tiny-vae", help="a small decoder to compare, too")
    parser.add_argument("--batches", type=int, default=3)
    options = parser.parse_args()
    settings = config.load(*options.params)
    adaptation = settings.adaptation(options.adaptation)
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe.load(adaptation, settings.sample, this_process())
        recipe = replace(recipe, latents=None, sampling=None)
        trainer = recipe.trainer(Path(folder))
        choices = {
            "full": {"decoder": "full"},
            "linear": {"decoder": "linear"},
            "latent": {"space": "latent"},
        }
        if options.tiny_vae:
            choices["tiny"] = {"decoder": "tiny", "tiny_vae": options.tiny_vae}
        objectives = {name: _objective(recipe, trainer, values) for name, values in choices.items()}
    found = compare(trainer, objectives, options.batches)
    print(f"| | {' | '.join(TERMS)} |\n|---|{'---:|' * len(TERMS)}")
    for name, cosines in found.items():
        print(f"| {name} | {' | '.join(f'{cosines[term]:.2f}' for term in TERMS)} |")


def compare(trainer: Trainer, objectives: dict[str, Objective], batches: int) -> dict[str, dict[str, float]]:
    """Return the mean cosine of each objective's gradient to the first one's, for each term."""
    _move(trainer)
    names = [name for name in objectives if name != next(iter(objectives))]
    cosines: dict[tuple[str, str], list[float]] = {(name, term): [] for name in names for term in TERMS}
    for batch in _batches(trainer, batches):
        gradients = {name: _gradients(each, batch) for name, each in objectives.items()}
        whole = next(iter(gradients.values()))
        for name, term in cosines:
            cosine = functional.cosine_similarity(whole[term], gradients[name][term], dim=0)
            cosines[name, term].append(float(cosine))
    return {name: {term: statistics.mean(cosines[name, term]) for term in TERMS} for name in names}


def _objective(recipe: Recipe, trainer: Trainer, values: dict[str, str]) -> Objective:
    """Return the same adaptation's objective with another decoder."""
    adaptation: Adaptation = recipe.adaptation
    terms = {"simple": 0.0, "prior": 0.0, "vlb": 0.0, **dict.fromkeys(TERMS, 1.0), "tiny_vae": None}
    weights = adaptation.weights.model_validate({**adaptation.weights.model_dump(), **terms, **values})
    other = replace(recipe, adaptation=adaptation.model_copy(update={"weights": weights}))
    examples = [feeds[0].examples for feeds in trainer.buckets]
    source, exact = trainer.objective.source, weights.decoder != "linear"
    return Objective(recipe.denoiser, weights, source, other.decoder(examples), exact=exact)


def _move(trainer: Trainer) -> None:
    draw = generator(trainer.settings.seed)
    with torch.no_grad():
        for parameter in (each for each in trainer.parameters if each.numel() > 1):
            noise = torch.randn(parameter.shape, generator=draw).to(parameter)
            parameter.add_(MOVED * parameter.std() * noise)


def _batches(trainer: Trainer, number: int) -> Iterator[NoisyBatch]:
    settings, feed = trainer.settings, trainer.buckets[0][0]
    for index in range(number):
        draws = [generator(settings.seed, index, which) for which in range(4)]
        batch = feed.draw(draws[0], draws[1], settings.batch_size, 1, 0)
        yield noisy_batch(trainer.denoiser, batch, settings, draws[2], draws[3])


def _gradients(objective: Objective, batch: NoisyBatch) -> dict[str, Tensor]:
    parameters = [p for p in objective.adapted.network.parameters() if p.requires_grad]
    terms, found = objective(batch), {}
    for term in TERMS:
        gradients = torch.autograd.grad(terms[term], parameters, retain_graph=True, allow_unused=True)
        found[term] = torch.cat([each.flatten() for each in gradients if each is not None])
    return found


if __name__ == "__main__":
    run(main)
