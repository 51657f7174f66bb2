r"""Measure adaptations along their training, over seeds and draws: a JSON record for each of their steps.

    python -m benchmarks.compare --adaptations sunglasses-finetune sunglasses-domainstudio --seeds 0 1 2 \
        --draws 1 2 --steps 100 200 400 800 --out benchmarks/results/sunglasses.jsonl

Needs what `dvc repro prepare_target@sunglasses` makes. Goes on where it was interrupted: trained models and
measured points are kept. Adaptations that differ in `combine` alone share their training. A small model
leaves a GPU waiting for Python: `--jobs 15` trains fifteen side by side. `python -m benchmarks.curves` draws
the result.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

import torch

from benchmarks import cli
from benchmarks.memory import peak_memory, reset_peak_memory
from domainstudio import config, models
from domainstudio.config import Adaptation, Settings
from domainstudio.data import ImageSet
from domainstudio.distributed import this_process
from domainstudio.metrics.measure import measure_folders
from domainstudio.models.denoiser import Denoiser
from domainstudio.models.stored import StoredModel, Together
from domainstudio.project import SOURCE_IMAGES, SOURCE_MODELS, TARGETS
from domainstudio.sampling.pairs import sample_adapted_stored, sample_source
from domainstudio.selection.chooser import SOURCE, Candidate, Chooser
from domainstudio.storage import checkpoint
from domainstudio.storage.files import output_folder, write_json
from domainstudio.training.examples import texts_of
from domainstudio.training.recipe import Recipe
from stages.cli import run

WORK = Path(".checkpoints/compare")

Point: TypeAlias = tuple[str, int, int, int]
"""Adaptation, draw, seed and step."""

_MEMOS: defaultdict[tuple[Path, str], dict[Any, Any]] = defaultdict(dict)
"""What is the same for all samples of a target, by its folder and the source model: computed once."""


def main() -> None:
    """Measure every point of the command line that the output file lacks."""
    parser = cli.settings_parser("compare", __doc__)
    parser.add_argument("--adaptations", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the training")
    parser.add_argument(
        "--draws", nargs="+", type=int, help="seeds of the draw of training images; by default the target's"
    )
    parser.add_argument("--steps", nargs="+", type=int, default=[100, 200, 400, 800])
    parser.add_argument(
        "--choose", action="store_true", help="mark the step that the rule of params.yaml takes among these"
    )
    parser.add_argument(
        "--only-chosen", action="store_true", help="measure none but that step; with --choose"
    )
    parser.add_argument(
        "--null", metavar="ADAPTATION", help="measure it at half the learning rate too, after twice the steps"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="trainings side by side; several small ones share a GPU well"
    )
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs {arguments.jobs}: give the number of trainings side by side, at least 1")
    if arguments.only_chosen and not arguments.choose:
        parser.error("--only-chosen: give --choose too, which says what chooses")
    settings = config.load(*arguments.params)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    runs = [
        Run(settings, adaptation, seed, draw, null_of)
        for draw in arguments.draws or [None]
        for seed in arguments.seeds
        for adaptation, null_of in _compared(settings, arguments.adaptations, arguments.null)
    ]
    choose, alone = arguments.choose, arguments.only_chosen
    measure = partial(_measure, out=arguments.out, every=arguments.steps, choose=choose, alone=alone)
    missing = _missing(runs, arguments.steps, _done(arguments.out), alone)
    if arguments.jobs == 1:
        for each in missing:
            measure(each)
        return
    _draw_shared(runs)
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    spawn = get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, spawn, torch.set_num_threads, (threads,)) as pool:
        list(pool.map(measure, missing))  # raises what a process has raised


@dataclass(frozen=True)
class Missing:
    """What one process measures: the runs of one training, as they are drawn alone and in combinations.

    Attributes:
        runs: each with the steps that the output file lacks.
        references: whether to measure the target's references too.
    """

    runs: tuple[tuple[Run, list[int]], ...]
    references: bool


def _missing(
    runs: Sequence[Run], steps: Sequence[int], done: Mapping[Point, bool], alone: bool
) -> list[Missing]:
    trainings: dict[Path, list[tuple[Run, list[int]]]] = {}
    for each in runs:
        at = (each.of.name, each.drawn, each.seed)
        points = [(*at, step) for step in each.steps(steps)]
        chosen = any(done.get(point, False) for point in points)
        lacking = [point[-1] for point in points if alone or point not in done]
        if lacking and not (alone and chosen):
            trainings.setdefault(each.folder, []).append((each, lacking))
    found, seen = [], set()
    for training in trainings.values():
        target = training[0][0].target
        found.append(Missing(tuple(training), references=target not in seen))
        seen.add(target)
    return found


def _measure(missing: Missing, out: Path, every: Sequence[int], choose: bool, alone: bool) -> None:
    """Measure runs, and append their records to the output file, a line each."""
    references = missing.references
    for each, steps in missing.runs:
        chosen = each.choose(each.steps(every)) if choose else None
        measured = [step for step in steps if step == chosen or not alone]
        for record in each.measure(measured, chosen, references=references):
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            print(_line(record), flush=True)
        references = False


def _draw_shared(runs: Sequence[Run]) -> None:
    """Draw what several trainings need, so that no two processes draw the same at once."""
    for each in {each.of.source: each for each in runs}.values():
        sample_source(each.settings, each.of.source, WORK)
    for each in {each.of.name: each for each in runs if each.of.weights.uses_prior}.values():
        Recipe.load(each.of, each.settings.sample, this_process())


def _compared(
    settings: Settings, names: list[str], null: str | None
) -> Iterator[tuple[Adaptation, str | None]]:
    """Yield what is trained, and of which adaptation it is a repetition at half the learning rate."""
    for name in names:
        yield settings.adaptation(name), None
    if null is not None:
        of = settings.adaptation(null)
        slow = _with(of, learning_rate=of.training.learning_rate / 2)
        yield slow.model_copy(update={"name": f"{null}-half-speed"}), null


@dataclass(frozen=True)
class Run:
    """One training of a comparison.

    Attributes:
        settings: all settings; `sample` and `evaluate` decide how points are measured.
        of: what is trained.
        seed: replaces the training's seed.
        draw: replaces the seed of the target's draw of training images, where it is given.
        null_of: the adaptation that this one repeats at another speed, if it does.
    """

    settings: Settings
    of: Adaptation
    seed: int
    draw: int | None = None
    null_of: str | None = None

    def choose(self, steps: list[int]) -> int:
        """Return the step that section `choose` takes among some, by training images and few samples.

        Args:
            steps: the candidates, ascending.
        """
        for step in steps:
            self._trained(step)
        shots = ImageSet.load(self.target / "shots")
        mirrored, features = self.of.training.horizontal_flip, self.settings.evaluate.features
        rule, sampling = self.settings.choose, self.settings.sample
        chooser = Chooser(shots.images, rule, sampling, features, self.folder / "choice", mirrored)
        source = StoredModel(SOURCE_MODELS / self.of.source)
        drawn = [
            (candidate, chooser.draw(candidate, texts_of(model, self.of, "target", shots)))
            for candidate, model in (self._candidate(step) for step in steps)
        ]
        model = source.load().to(this_process().device)
        unadapted = Candidate(0, SOURCE, source.digest, lambda: model)
        return chooser.choose(
            chooser.draw(unadapted, texts_of(model, self.of, "source", shots)), drawn
        ).chosen

    def _candidate(self, step: int) -> tuple[Candidate, Denoiser]:
        stored = StoredModel(self._model(step), Together.of(self.of))
        model = stored.load().to(this_process().device)
        return Candidate(step, f"step-{step:05d}", stored.digest, lambda: model), model

    def steps(self, steps: Sequence[int]) -> list[int]:
        """Return where the training is measured, ascending: at half the speed after twice the steps."""
        return sorted(step if self.null_of is None else 2 * step for step in steps)

    def measure(
        self, steps: list[int], chosen: int | None = None, *, references: bool = False
    ) -> Iterator[dict[str, Any]]:
        """Yield the record of each step, and the references before the first.

        Args:
            steps: where to measure, ascending.
            chosen: the step that `choose` has found; its record says so.
            references: whether to yield the references.
        """
        for step in steps:
            cost, samples = self._trained(step), self.samples(step)
            source = sample_source(self.settings, self.of.source, WORK)
            first = references and step == steps[0]
            report, _ = measure_folders(
                samples,
                source,
                self.target,
                self.settings.evaluate,
                source_images=SOURCE_IMAGES / self.of.source,
                references=first,
                memo=_MEMOS[self.target, self.of.source],
            )
            paired = report.get("paired", {"samples": {}, "references": {}})
            kept = report.get("attributes", {"samples": {}})["samples"]
            if first:
                for name, scores in report["references"].items():
                    scores |= paired["references"].get(name, {})
                    yield {"reference": name, "target": self.of.target, **scores}
            yield {
                "adaptation": self.of.name,
                "method": self.of.method,
                "draw": self.drawn,
                "seed": self.seed,
                "step": step,
                **({} if self.null_of is None else {"null_of": self.null_of}),
                **({"chosen": True} if step == chosen else {}),
                **cost,
                "target": self.of.target,
                "features": report["features"],
                "features_digest": report["features_digest"],
                **report["samples"],
                **paired["samples"],
                **{key: value for key, value in kept.items() if key.startswith("attributes_")},
            }

    def samples(self, step: int) -> Path:
        """Return the folder of the samples at a step, drawn now if need be."""
        self._trained(step)
        stored = StoredModel(self._model(step), Together.of(self.of))
        return sample_adapted_stored(stored, self.of, self.settings, self.folder)

    @property
    def drawn(self) -> int:
        """The seed of the draw of training images."""
        return self.settings.targets[self.of.target].seed if self.draw is None else self.draw

    @cached_property
    def _adaptation(self) -> Adaptation:
        return _with(self.of, seed=self.seed, preview_every=0)

    @cached_property
    def folder(self) -> Path:
        """The folder of states, models and samples, whatever the number of steps."""
        params = self._adaptation.model_dump(mode="json", exclude={"training": {"steps"}, "name": True})
        shots = ImageSet.load(self.target / "shots").digest
        digests = {"source": models.digest(SOURCE_MODELS / self.of.source), "shots": shots}
        return WORK / checkpoint.run_key(params, digests)

    @cached_property
    def target(self) -> Path:
        """The folder of the target, with the training images of this draw."""
        prepared = TARGETS / self.of.target
        if self.draw is None:
            return prepared
        domain = ImageSet.load(prepared / "domain")
        shots = domain.draw(self.settings.targets[self.of.target].number, self.draw)
        folder = WORK / "targets" / f"{self.of.target}-{self.draw}-{shots.digest[:16]}"
        if not folder.is_dir():
            with output_folder(folder) as partial:
                shots.save(partial / "shots")
                (partial / "domain").symlink_to((prepared / "domain").resolve())
        return folder

    def _model(self, step: int) -> Path:
        return self.folder / f"model-{step:05d}"

    def _trained(self, step: int) -> dict[str, Any]:
        """Train to a step if that was not done yet, and return what it took."""
        record = self.folder / f"cost-{step:05d}.json"
        if not record.is_file():
            states = self.folder / "states"
            if any(int(path.name.rpartition("-")[2]) > step for path in states.glob("step-*")):
                shutil.rmtree(states)  # an earlier call has trained beyond this step
            cost = self._train(_with(self._adaptation, steps=step, checkpoint_every=step), states)
            write_json(record, cost)
        found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        return found

    def _train(self, adaptation: Adaptation, states: Path) -> dict[str, Any]:
        recipe = Recipe.load(adaptation, self.settings.sample, this_process())
        shots = ImageSet.load(self.target / "shots")
        reset_peak_memory()
        recipe = replace(recipe, shots=shots, latents=None, sampling=None)
        history, peak = recipe.trainer(states).train(), peak_memory()
        seconds, steps = round(history[-1]["seconds"], 3), adaptation.training.steps
        recipe.denoiser.save(self._model(steps))
        return {"seconds": seconds, "seconds_per_step": round(seconds / steps, 4), "peak_memory_mib": peak}


def _with(adaptation: Adaptation, **training: Any) -> Adaptation:
    changed = adaptation.training.model_copy(update=training)
    return adaptation.model_copy(update={"training": changed})


def _done(path: Path) -> dict[Point, bool]:
    """Return the points that a file has, and whether each is the chosen one of its run."""
    if not path.is_file():
        return {}
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {
        (r["adaptation"], r["draw"], r["seed"], r["step"]): r.get("chosen", False)
        for r in records
        if "adaptation" in r
    }


def _line(record: dict[str, Any]) -> str:
    name = record.get("adaptation", f"({record.get('reference')})")
    at = ("draw", "seed", "step")
    where = " ".join(f"{key} {record[key]}" for key in at) if "step" in record else ""
    shown = (
        "frechet_distance_infinity",
        "kid",
        "intra_distance_in_domain",
        "in_domain_share",
        "recall",
        "coverage",
        "memorized_share",
        "attributes_kept",
        "top_1",
        "top_5",
    )
    values = "  ".join(f"{key} {record[key]:.4g}" for key in shown if record.get(key) is not None)
    return f"{name:24} {where}  {values}"


if __name__ == "__main__":
    run(main)
