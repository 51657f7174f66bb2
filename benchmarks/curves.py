"""Plain fine-tuning against other methods along training: pictures and tables from recorded measurements.

    python -m benchmarks.curves benchmarks/results/*.jsonl --output benchmarks/results/curves

writes `<output>.png`, `.svg` and `.md`, and `<output>-difference.png`, `.svg`. A model that trains longer
moves along its curve. So adaptations are compared at equal nearness to the domain, and each at its own best
step, never at an equal step alone. Beside each comparison stands what it makes of the baseline against
itself. A method wins by a figure where the interval of the paired difference excludes 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks import cli
from benchmarks import curves_figures as figures
from benchmarks.records import (
    METRICS,
    Difference,
    Records,
    difference,
    find_baseline,
    null_difference,
    read,
)
from benchmarks.verdicts import next_seeds, null, verdicts
from benchmarks.verdicts import table as verdict_table
from stages.cli import run

NULL = "the same with the next seed"
VERDICTS = (
    "Each at its own best step, minus the baseline's. A method wins where the interval over draws and seeds "
    "excludes 0 and every draw is on its side. In italics: the baseline against itself, which is chance."
)


def main() -> None:
    """Read the records, draw the pictures, write the tables."""
    parser = cli.parser("curves", __doc__)
    parser.add_argument("records", nargs="+", type=Path, help="JSON lines, one record each")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/curves"), help="path without suffix"
    )
    parser.add_argument("--baseline", default="finetune", help="adaptation or method to compare with")
    arguments = parser.parse_args()
    records = read(arguments.records)
    baseline = find_baseline(records, arguments.baseline)
    others = [name for name in records.names if name != baseline]
    found = {name: difference(records, name, baseline) for name in others}
    differences = {name: item for name, item in found.items() if item is not None}
    output: Path = arguments.output
    output.parent.mkdir(parents=True, exist_ok=True)
    figures.save(figures.overview(records), output)
    text = f"{records.network}\n\n{table(records)}"
    text += _judgements(records, others, baseline)
    if differences:
        shown = figures.differences(differences, baseline, records.names)
        figures.save(shown, output.with_name(f"{output.name}-difference"))
        nearness, diversity = (key.replace("_", " ") for key in records.axes)
        title = f"The {diversity} at equal {nearness}, minus the baseline's (above 0: more varied):"
        again = null_difference(records, baseline, next_seeds(records.runs(baseline)))
        beside = differences if again is None else {**differences, NULL: again}
        text += f"\n{title}\n\n{difference_table(beside, baseline)}"
    output.with_name(f"{output.name}.md").write_text(text, encoding="utf-8")
    print(text, end="")


def _judgements(records: Records, others: Sequence[str], baseline: str) -> str:
    """Verdicts of all adaptations at their best steps, those of the baseline against itself last."""
    nulls = records.nulls(baseline)
    order = [name for name in others if name not in nulls] + nulls
    found = {f"*{name}*" if name in nulls else name: verdicts(records, name, baseline) for name in order}
    found[f"*{NULL}*"] = null(records, baseline)
    if not any(found.values()):
        return ""
    return f"\n{VERDICTS}\n\n{verdict_table(found, baseline)}"


def table(records: Records) -> str:
    """Mean ± standard deviation over runs of every figure, adaptation and step, as Markdown.

    Where steps were chosen for each run, a row more has the runs at those steps.
    """
    metrics = [m for m in METRICS if any(m in item.values for item in records.measurements)]
    lines = ["| | step | runs | " + " | ".join(m.replace("_", " ") for m in metrics) + " |"]
    lines.append("|---|---:|---:|" + "---:|" * len(metrics))
    for adaptation in records.names:
        items = [item for found in records.runs(adaptation).values() for item in found]
        rows = {
            str(step): [each for each in items if each.step == step] for step in records.steps(adaptation)
        }
        if chosen := [each for each in items if each.chosen]:
            rows[f"chosen: {', '.join(str(each.step) for each in chosen)}"] = chosen
        for step, runs in rows.items():
            known = [[each.values[m] for each in runs if m in each.values] for m in metrics]
            cells = [_spread(np.array(values)) for values in known]
            lines.append(f"| {adaptation} | {step} | {len(runs)} | " + " | ".join(cells) + " |")
    for name, values in records.references.items():
        cells = [_spread(np.array([values[m]] if m in values else [])) for m in metrics]
        lines.append(f"| *{name}* | – | – | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def difference_table(differences: Mapping[str, Difference], baseline: str) -> str:
    """Difference of diversity at equal nearness, per adaptation, as Markdown."""
    lines = [f"| against {baseline} | runs | mean ± std over runs | each run |", "|---|---:|---:|---|"]
    for adaptation, found in differences.items():
        each = ", ".join(
            f"{'.'.join(map(str, run))}: {mean:+.4f}"
            for run, mean in zip(found.runs, found.means, strict=True)
        )
        spread = f" ± {found.means.std(ddof=1):.4f}" if len(found.runs) > 1 else ""
        lines.append(f"| {adaptation} | {len(found.runs)} | {found.means.mean():+.4f}{spread} | {each} |")
    return "\n".join(lines) + "\n"


def _spread(values: np.ndarray) -> str:
    if not len(values):
        return "–"
    mean = values.mean()
    places = 1 if abs(mean) >= 10 else 3 if abs(mean) >= 0.1 else 4
    return f"{mean:.{places}f}" + (f" ± {values.std(ddof=1):.{places}f}" if len(values) > 1 else "")


if __name__ == "__main__":
    run(main)
