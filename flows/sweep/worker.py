"""One trial of a sweep, as a task of Ray: trained, sampled and measured on whatever node Ray chooses.

A trial works in its folder and goes on where a killed one stopped. In the end the training's states and the
samples are removed.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.sweep import shipping
from flows.sweep.order import FOLDER, Order, Record, folder, read, write

if TYPE_CHECKING:
    from domainstudio.training.trainer import Tracker


def run(order: Order, variables: Mapping[str, str], archives: Mapping[str, Any]) -> tuple[Record, bytes]:
    """Run a trial in this process, which is Ray's and ends with it.

    Args:
        order: what to do.
        variables: environment variables of the sweep. They come as an object of Ray's, and not by its runtime
            environment, which its logs and its dashboard show.
        archives: the inputs by path, where this node does not see the project's folder.

    Returns:
        What is kept of it: its record, and the grid of samples as PNG.

    Raises:
        DataError: this node does not see the project's folder.
    """
    from domainstudio.errors import DataError

    os.environ.update(variables)
    root = shipping.unpack(archives) if archives else Path(order.root)
    if not root.is_dir():
        raise DataError(f"the node does not see {root}: share it among the nodes, or set send_inputs: true")
    os.chdir(root)

    from filelock import FileLock

    place = folder(order.key)
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / ".lock"):  # another sweep may have the same trial, or Ray lost sight of a node
        if (record := read(order.key)) is None:
            record = _run(order, place)
    return record, (place / "grid.png").read_bytes()


def _run(order: Order, place: Path) -> Record:
    import ray

    from domainstudio.tracking.tracker import tracked

    context, started = ray.get_runtime_context(), time.time()
    with tracked(order.run) if order.live else nullcontext() as tracker:
        history, metrics = _train_and_measure(order, place, tracker)
    record = Record(
        key=order.key,
        metrics=metrics,
        history=history,
        node=ray.util.get_node_ip_address(),
        node_id=context.get_node_id(),
        gpus=context.get_accelerator_ids()["GPU"],
        started=started,
        ended=time.time(),
    )
    write(record, (place / "samples/grid.png").read_bytes())
    for done in ("samples", "states"):
        shutil.rmtree(place / done, ignore_errors=True)
    return record


def _train_and_measure(
    order: Order, place: Path, tracker: Tracker | None
) -> tuple[list[Mapping[str, float]], dict[str, Any]]:
    from filelock import FileLock

    from domainstudio.distributed import this_process
    from domainstudio.metrics.measure import measure_folders
    from domainstudio.project import SOURCE_IMAGES, TARGETS
    from domainstudio.sampling.pairs import sample_adapted, sample_source
    from domainstudio.training.recipe import Recipe
    from domainstudio.training.run import TrainingRun

    settings, adaptation, process = order.settings, order.adaptation, this_process()
    lock = FileLock(FOLDER / ".lock")  # the first trial draws what others need too
    with lock:
        source = sample_source(settings, adaptation.source, FOLDER)
    with lock if adaptation.weights.uses_prior else nullcontext():
        recipe = Recipe.load(adaptation, settings.sample, process)
    training = TrainingRun(adaptation.name, adaptation, recipe.digests)
    trainer = training.train(recipe.trainer, nullcontext(tracker), place / "states")
    samples, target = place / "samples", TARGETS / adaptation.target
    sample_adapted(recipe.denoiser, adaptation, settings, samples)
    metrics, _ = measure_folders(
        samples, source, target, settings.evaluate, source_images=SOURCE_IMAGES / adaptation.source
    )
    return trainer.history, metrics
