"""What people read of a registered model: its card, its summary and its headline figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from domainstudio.config import Adaptation

HEADLINE = ("frechet_distance", "kid", "intra_distance", "memorized_share")
"""Metrics that are shown first, where they were measured."""


def summary(adaptation: Adaptation, alias: str) -> str:
    """Return the registered model's description: what all its versions have in common."""
    return (
        f"Source model `{adaptation.source}` adapted to the domain `{adaptation.target}` by DomainStudio's "
        f"method `{adaptation.method}` (adaptation `{adaptation.name}` of `params.yaml`). Use the version "
        f"with the alias `{alias}`; every version has its own card."
    )


def model_card(
    readme: str, metrics: Mapping[str, Any], name: str, alias: str, folder: str, run_id: str, grid: str | None
) -> str:
    """Return the card of a version, in Markdown: samples, figures, use, then what the model's own card says.

    Args:
        readme: the model folder's README.md; its header for the hub is left out.
        metrics: `evaluation/<adaptation>/metrics.json`.
        name: the registered model's name.
        alias: the alias that users should load.
        folder: name of the model folder within the version's artifacts.
        run_id: the run whose artifact `grid` is.
        grid: path of the picture of samples within that run, or None.
    """
    body = readme.split("---\n", 2)[2] if readme.startswith("---\n") and readme.count("---\n") > 1 else readme
    title, _, rest = body.strip().partition("\n")
    # MLflow's list of versions shows the first line as it is, so it is no heading and holds the figures.
    figures = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in headline(metrics).items())
    first = title.lstrip("# ") + (f": {figures}" if figures else "")
    # The address is relative to MLflow's own pages, which serve the artifacts of runs there.
    picture = f"![samples](get-artifact?path={grid}&run_uuid={run_id})" if grid else ""
    own = rest.partition("```python")[0].strip()
    parts = [first, picture, _figures(metrics), own, _usage(name, alias, folder)]
    return "\n\n".join(part for part in parts if part) + "\n"


def headline(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return the first metrics as tags, each with the feature network that the figure depends on."""
    network, samples = metrics.get("features", "unknown"), metrics.get("samples", {})
    return {name: f"{samples[name]:.4g} ({network})" for name in HEADLINE if _measured(samples, name)}


def _measured(values: Mapping[str, Any], name: str) -> bool:
    return isinstance(values.get(name), int | float)


def _figures(metrics: Mapping[str, Any]) -> str:
    columns = {"this model": metrics.get("samples", {}), **metrics.get("references", {})}
    names = [name for name in HEADLINE if any(_measured(values, name) for values in columns.values())]
    if not names:
        return ""
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name in names:
        cells = [f"{v[name]:.4g}" if _measured(v, name) else "–" for v in columns.values()]
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
    number = f" of {metrics['number']} samples" if "number" in metrics else ""
    lines += ["", f"Measured{number} with the features of `{metrics.get('features', 'unknown')}`."]
    return "\n".join(lines)


def _usage(name: str, alias: str, folder: str) -> str:
    return f"""```python
import mlflow
from diffusers import DiffusionPipeline

model = mlflow.pyfunc.load_model("models:/{name}@{alias}")
images = model.predict([{{}}], params={{"number": 4, "seed": 0, "steps": 30}})  # columns seed, png (base64)

path = mlflow.artifacts.download_artifacts("models:/{name}@{alias}")
pipeline = DiffusionPipeline.from_pretrained(f"{{path}}/artifacts/{folder}")
```

The same seed gives the same picture in both. Over HTTP: `mlflow models serve -m models:/{name}@{alias}`, then
POST `{{"dataframe_records": [{{}}], "params": {{"number": 4, "seed": 0}}}}` to `/invocations`."""
