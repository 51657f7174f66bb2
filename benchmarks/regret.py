r"""Say what the rule of docs/choose.md loses against the best step, judged by real images that it never saw.

    python -m benchmarks.regret benchmarks/results/faces-*.jsonl

Reads what `benchmarks.compare --choose` wrote. The regret of a step is the largest value of its run minus its
own value V = F − g·(1 − D), computed from the whole domain. F is the share of the way from the source model
to the domain by the kernel distance. D is the variety in the domain as a share of that of real images. Both
are at most 1. The rule knows neither: it sees the training images and a few samples. Beside it stand steps
that are fixed beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from benchmarks import cli, records
from benchmarks.records import Measurement, Records
from domainstudio.errors import DataError
from stages.cli import run

CHOSEN = "the rule's step"


def main() -> None:
    """Print the regret of each policy, by file and over all."""
    parser = cli.parser("regret", __doc__)
    parser.add_argument("records", nargs="+", type=Path, help="files of benchmarks.compare --choose")
    parser.add_argument(
        "--gain-per-loss", type=float, default=1.0, help="g: fidelity that diversity must buy"
    )
    arguments = parser.parse_args()
    found = {path.stem: regrets(records.read([path]), arguments.gain_per_loss) for path in arguments.records}
    everything: dict[str, list[float]] = {}
    for each in found.values():
        for policy, values in each.items():
            everything.setdefault(policy, []).extend(values)
    print("| records | step | runs | mean regret | largest |\n|---|---|---:|---:|---:|")
    for name, each in {**found, "all": everything}.items():
        for policy, values in each.items():
            print(f"| {name} | {policy} | {len(values)} | {np.mean(values):.3f} | {max(values):.3f} |")


def regrets(of: Records, gain_per_loss: float = 1.0) -> dict[str, list[float]]:
    """Return the regret of each run, by policy: the rule's step, and each step for all runs.

    Runs count that were measured at all steps, where every step has a value.

    Args:
        of: Measurements, some of them chosen, and the references `source` and `domain`.
        gain_per_loss: g of the value.

    Raises:
        DataError: a reference is missing, or no run counts.
    """
    if lacking := {"source", "domain"} - {*of.references}:
        raise DataError(
            f"the records lack the reference {sorted(lacking)[0]}: measure again, from the first step"
        )
    found: dict[str, list[float]] = {}
    for items in _complete(of):
        values = {item.step: value(item, of.references, gain_per_loss) for item in items}
        best, chosen = max(values.values()), next(item.step for item in items if item.chosen)
        if not math.isfinite(best):
            continue
        for policy, step in {CHOSEN: chosen, **{f"always {step}": step for step in values}}.items():
            found.setdefault(policy, []).append(best - values[step])
    if not found:
        raise DataError(
            "no run with a chosen step was measured at all steps: use benchmarks.compare --choose"
        )
    return found


def value(
    item: Measurement, references: Mapping[str, Mapping[str, float]], gain_per_loss: float = 1.0
) -> float:
    """Return V = F − g·(1 − D) of one measurement; -∞ where its samples have no variety in the domain."""
    varied = item.values.get("intra_distance_in_domain")
    if varied is None:
        return -math.inf
    way = math.sqrt(max(item.values["kid"], 0) / references["source"]["kid"])
    lost = 1 - min(1.0, varied / references["domain"]["intra_distance_in_domain"])
    return 1 - way - gain_per_loss * lost


def _complete(of: Records) -> Iterable[list[Measurement]]:
    """Yield the runs with a chosen step that were measured at all of their adaptation's steps."""
    for name in of.names:
        steps = of.steps(name)
        for items in of.runs(name).values():
            if any(item.chosen for item in items) and [item.step for item in items] == steps:
                yield items


if __name__ == "__main__":
    run(main)
