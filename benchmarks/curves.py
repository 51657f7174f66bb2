"""Plain fine-tuning against other methods along training: pictures and tables from recorded measurements.

    python -m benchmarks.curves benchmarks/results/*.jsonl --output benchmarks/results/curves

writes `<output>.png`, `.svg` and `.md`, and `<output>-difference.png`, `.svg`. A model that trains longer
moves along its curve. So adaptations are compared at equal Fréchet distance, never at an equal step alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks import cli
from benchmarks import curves_figures as figures
from benchmarks.records import METRICS, Difference, Records, difference, find_baseline, read
from stages.cli import run


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
    found = {name: difference(records, name, baseline) for name in records.names if name != baseline}
    differences = {name: item for name, item in found.items() if item is not None}
    output: Path = arguments.output
    output.parent.mkdir(parents=True, exist_ok=True)
    figures.save(figures.overview(records), output)
    text = f"{records.network}\n\n{table(records)}"
    if differences:
        shown = figures.differences(differences, baseline, records.names)
        figures.save(shown, output.with_name(f"{output.name}-difference"))
        title = "Intra distance at equal Fréchet distance, minus the baseline's (above 0: more varied):"
        text += f"\n{title}\n\n{difference_table(differences, baseline)}"
    output.with_name(f"{output.name}.md").write_text(text, encoding="utf-8")
    print(text, end="")


def table(records: Records) -> str:
    """Mean ± standard deviation over seeds of every figure, adaptation and step, as Markdown."""
    metrics = [m for m in METRICS if any(m in item.values for item in records.measurements)]
    lines = ["| | step | seeds | " + " | ".join(m.replace("_", " ") for m in metrics) + " |"]
    lines.append("|---|---:|---:|" + "---:|" * len(metrics))
    for adaptation in records.names:
        for step in records.steps(adaptation):
            seeds = sum((item.name, item.step) == (adaptation, step) for item in records.measurements)
            cells = [_spread(records.over_seeds(adaptation, step, metric)) for metric in metrics]
            lines.append(f"| {adaptation} | {step} | {seeds} | " + " | ".join(cells) + " |")
    for name, values in records.references.items():
        cells = [_spread(np.array([values[m]] if m in values else [])) for m in metrics]
        lines.append(f"| *{name}* | – | – | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def difference_table(differences: Mapping[str, Difference], baseline: str) -> str:
    """Difference of intra distance at equal Fréchet distance, per adaptation, as Markdown."""
    lines = [f"| against {baseline} | seeds | mean ± std over seeds | each seed |", "|---|---:|---:|---|"]
    for adaptation, found in differences.items():
        each = ", ".join(f"{seed}: {mean:+.4f}" for seed, mean in zip(found.seeds, found.means, strict=True))
        spread = f" ± {found.means.std(ddof=1):.4f}" if len(found.seeds) > 1 else ""
        lines.append(f"| {adaptation} | {len(found.seeds)} | {found.means.mean():+.4f}{spread} | {each} |")
    return "\n".join(lines) + "\n"


def _spread(values: np.ndarray) -> str:
    if not len(values):
        return "–"
    mean = values.mean()
    places = 1 if abs(mean) >= 10 else 3 if abs(mean) >= 0.1 else 4
    return f"{mean:.{places}f}" + (f" ± {values.std(ddof=1):.{places}f}" if len(values) > 1 else "")


if __name__ == "__main__":
    run(main)
