"""The tables that a sweep leaves behind: its settings, the best first, and every trial.

Ray Tune's result grid (Ray 2.60) does not serve here: it has the trials of one call only, not those that were
measured before, and knows neither means over seeds nor bounds.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from domainstudio.config import ObjectiveSettings
from flows.sweep.ranking import Candidate, Outcome, best


def rows(ranked: Sequence[Candidate], objective: ObjectiveSettings) -> list[dict[str, str]]:
    """Return the table of the settings, as text by column.

    Args:
        ranked: the settings, the best first.
        objective: its metrics are shown, as means over the seeds and their standard deviations.
    """
    chosen, table = best(ranked), []
    for candidate in ranked:
        row = {key: str(value) for key, value in candidate.values.items()}
        row |= {name: _figure(candidate, name) for name in objective.metrics}
        row["verdict"] = "best" if candidate is chosen else " ".join("; ".join(candidate.objections).split())
        table.append(row)
    return table


def markdown(table: Sequence[dict[str, str]]) -> str:
    """Return a table in Markdown."""
    columns = list(table[0])
    lines = [columns, ["---"] * len(columns), *(list(row.values()) for row in table)]
    cells = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def to_csv(outcomes: Sequence[Outcome]) -> str:
    """Return every trial with all that is known of it, as CSV."""
    swept = dict.fromkeys(key for outcome in outcomes for key in outcome.trial.overrides)
    metrics = dict.fromkeys(name for outcome in outcomes for name in outcome.scores)
    columns = ["trial", *swept, "status", *metrics, "seconds", "place", "error", "key"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for outcome in outcomes:
        known = {name: getattr(outcome, name) for name in ("status", "seconds", "place", "error", "key")}
        writer.writerow({"trial": outcome.trial.number, **outcome.trial.overrides, **outcome.scores, **known})
    return text.getvalue()


def _figure(candidate: Candidate, metric: str) -> str:
    mean, spread = candidate.mean(metric), candidate.spread(metric)
    if mean is None:
        return "–"
    return f"{mean:.4g}" if spread is None else f"{mean:.4g} ± {spread:.2g}"
