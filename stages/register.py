"""Stage `register`: log an adaptation's results to MLflow and register its model.

`python -m stages.register <adaptation>` makes one version per result and gives it the alias of
`registry.alias`. `--rollback <adaptation>` gives the alias back to the version that had it before, and
`--promote VERSION <adaptation>` gives it to any version.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from domainstudio import config
from stages.cli import run


def main() -> None:
    """Register an adaptation of params.yaml, or move its alias."""
    parser = argparse.ArgumentParser(
        prog="python -m stages.register",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adaptation", help="a key of adaptations in params.yaml")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--rollback", action="store_true", help="give the alias back to the version before")
    what.add_argument("--promote", metavar="VERSION", help="give the alias to this version")
    parser.add_argument("--reason", default="", help="why, kept as a tag of the version")
    arguments = parser.parse_args()
    settings = config.load()
    name = settings.adaptation(arguments.adaptation).name
    model = settings.registry.model_prefix + name
    alias = settings.registry.alias
    if arguments.rollback:
        _rollback(model, alias, arguments.reason)
    elif arguments.promote:
        _promote(model, arguments.promote, alias, arguments.reason or "promoted by hand")
    else:
        _register(name, settings, arguments.reason or "newest result")


def _register(name: str, settings: config.Settings, reason: str) -> None:
    from domainstudio.integrations import mlflow_card, mlflow_registry
    from domainstudio.integrations.mlflow_results import Result, ensure_run, log_results

    registry, result = settings.registry, Result.load(name)
    model, alias = registry.model_prefix + name, registry.alias
    with mlflow_registry.talking() as client:
        run_id = ensure_run(client, result, registry.experiment)
        log_results(client, run_id, result)
        grid = "samples/grid.png" if Path("samples/adapted", name, "grid.png").is_file() else None
        card = mlflow_card.model_card(result.readme, result.metrics, model, alias, name, run_id, grid)
        client.log_text(run_id, card, "model_card.md")
        commit = client.get_run(run_id).data.tags.get("git.commit")
    entry = mlflow_registry.Entry(
        name=model,
        folder=result.folder,
        key=result.key,
        run_id=run_id,
        summary=mlflow_card.summary(result.adaptation, alias),
        card=card,
        tags={
            "source": result.adaptation.source,
            "target": result.adaptation.target,
            "method": result.adaptation.method,
            **({"git.commit": commit} if commit else {}),
            **mlflow_card.headline(result.metrics),
        },
        step=result.steps,
        seed=result.seed,
        sampling_steps=result.sampling_steps,
    )
    registered = mlflow_registry.register(entry)
    version = registered.version
    print(f"{model}: version {version} {'registered' if registered.created else 'is this result already'}")
    if mlflow_registry.was_rolled_back(model, version, alias):
        print(f"{model}: version {version} was rolled back; --promote {version} takes it again")
    else:
        _promote(model, version, alias, reason)
    _write(name, {"model": model, "alias": alias, "key": result.key, "digest": registered.digest})


def _promote(model: str, version: str, alias: str, reason: str) -> None:
    from domainstudio.integrations import mlflow_registry

    previous = mlflow_registry.set_alias(model, version, alias, reason)
    print(f"{model}@{alias} is version {version}" + (f", before it was {previous}" if previous else ""))


def _rollback(model: str, alias: str, reason: str) -> None:
    from domainstudio.integrations import mlflow_registry

    before, now = mlflow_registry.rollback(model, alias, reason)
    print(f"{model}@{alias} is version {now}, before it was {before}")


def _write(name: str, content: dict[str, str]) -> None:
    """Write registry/<name>.json: neither run id nor version, which differ from database to database."""
    path = Path("registry", f"{name}.json")
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps({"format": 1, **content}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    run(main)
