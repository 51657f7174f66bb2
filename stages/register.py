"""Stage `register`: log an adaptation's results to MLflow, register its model, let the gate judge it.

`python -m stages.register <adaptation>` makes one version per result. Where it is better than the version
with the alias of `registry.alias`, by the rules of `registry.gate`, it gets that alias, else `challenger`. A
champion that was measured in another way, or against other images, is drawn and measured again for that.

`--rollback <adaptation>` gives the alias back to the version that had it before. `--promote VERSION --reason
TEXT <adaptation>` gives it to any version. `--history <adaptation>` shows who decided what, when and why.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from domainstudio import config
from domainstudio.storage.files import write_json
from stages.cli import run

if TYPE_CHECKING:
    from domainstudio.registry.aliases import Promotion
    from domainstudio.registry.artifacts import Entry
    from domainstudio.registry.audit import Event
    from domainstudio.registry.card import Usage
    from domainstudio.registry.gate import Measurement
    from domainstudio.registry.results import Result


def main() -> None:
    """Register an adaptation of params.yaml, move its alias, or show how it moved."""
    parser = argparse.ArgumentParser(
        prog="python -m stages.register",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adaptation", help="a key of adaptations in params.yaml")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--rollback", action="store_true", help="give the alias back to the version before")
    what.add_argument("--promote", metavar="VERSION", help="give the alias to this version; needs --reason")
    what.add_argument("--history", action="store_true", help="show every decision and who made it")
    parser.add_argument("--reason", default="", help="why, of --rollback and --promote")
    arguments = parser.parse_args()
    if arguments.promote and not arguments.reason:
        parser.error("--promote passes over the gate: say why with --reason")
    if arguments.reason and not (arguments.promote or arguments.rollback):
        parser.error("--reason is for --promote and --rollback: the gate gives its own")
    settings = config.load()
    name = settings.adaptation(arguments.adaptation).name
    model, alias = settings.registry.model_prefix + name, settings.registry.alias

    from domainstudio.registry import aliases

    if arguments.history:
        print(_table(aliases.history(model), alias))
    elif arguments.rollback:
        print(_said(aliases.rollback(model, arguments.reason, alias), alias, name))
    elif arguments.promote:
        promotion = aliases.promote(model, arguments.promote, arguments.reason, alias)
        print(_said(promotion, alias, name))
    else:
        _register(name, settings)


def _register(name: str, settings: config.Settings) -> None:
    from domainstudio.registry import aliases, versions
    from domainstudio.registry.results import Result, ensure_run, log_results
    from domainstudio.tracking.server import connect

    result, registry = Result.load(name), settings.registry
    model, alias = registry.model_prefix + name, registry.alias
    with connect() as client:
        run_id = ensure_run(client, result, registry.experiment)
        log_results(client, run_id, result)
        commit = client.get_run(run_id).data.tags.get("git.commit")
    registered = versions.register(_entry(result, model, alias, run_id, commit))
    version = registered.version
    print(f"{model}: version {version} {'registered' if registered.created else 'is this result already'}")

    def measure(rival: str) -> Measurement | None:
        from domainstudio.registry.remeasure import measure_again

        return measure_again(model, rival, result, settings.sample, settings.evaluate)

    promotion = aliases.judge(model, version, registry.gate, alias, measure=measure)
    print(_said(promotion, alias, name))
    _describe(result, promotion, alias, run_id)
    _write(name, {"model": model, "alias": alias, "key": result.key, "digest": registered.digest})


def _entry(result: Result, model: str, alias: str, run_id: str, commit: str | None) -> Entry:
    from domainstudio.registry import artifacts, card
    from domainstudio.registry.aliases import MEASURED

    return artifacts.Entry(
        name=model,
        folder=result.folder,
        key=result.key,
        run_id=run_id,
        summary=card.summary(result.adaptation, alias),
        tags={
            **result.tags,
            **({"git.commit": commit} if commit else {}),
            **card.headline(result.metrics),
            MEASURED: result.measurement.to_json(),
        },
        step=result.steps,
        seed=result.seed,
        sampling_steps=result.sampling_steps,
        guidance_scale=result.guidance_scale,
        template=result.adaptation.prompts.target,
        example=result.example,
    )


def _describe(result: Result, promotion: Promotion, alias: str, run_id: str) -> None:
    """Write the card of a version, which states the gate's verdict, as its description and its run's file."""
    from domainstudio.registry import aliases, card, versions
    from domainstudio.tracking.server import connect

    name, version = promotion.model, promotion.version
    grid = (
        "samples/grid.png"
        if (result.root / "samples/adapted" / result.adaptation.name / "grid.png").is_file()
        else None
    )
    label = f"@{alias}" if promotion.promoted else f"/{version}"
    with connect() as client:
        verdict = aliases.verdict(client, name, version)
        text = card.model_card(
            result.readme, result.metrics, _usage(result, name, label), verdict, run_id, grid
        )
        client.log_text(run_id, text, "model_card.md")
        client.update_model_version(name, version, versions.shorten(text))


def _usage(result: Result, model: str, label: str) -> Usage:
    from domainstudio.registry.card import Usage

    return Usage(
        model,
        label,
        result.adaptation.name,
        result.kind,
        result.lora,
        result.example,
        result.guidance_scale,
    )


def _said(promotion: Promotion, alias: str, name: str) -> str:
    """Return what became of a version, for people."""
    model, version, previous = promotion.model, promotion.version, promotion.previous
    if promotion.promoted:
        before = f", before it was {previous}" if promotion.changed and previous else ""
        return f"{model}@{alias} is version {version}{before}: {promotion.reason}"
    stays = f"{model}@{alias} stays version {previous}" if previous else f"{model} has no {alias}"
    by_hand = f"python -m stages.register --promote {version} --reason WHY {name}"
    return f"{stays}; version {version}: {promotion.reason}\ntake it all the same: {by_hand}"


def _table(events: list[Event], alias: str) -> str:
    """Return one line per decision, in columns; `champion` is who had the alias afterwards."""
    rows = [("when (UTC)", "version", "what", alias, "by", "why")]
    rows += [
        (e.at[:19].replace("T", " "), e.version, e.what, e.aliases.get(alias, "none"), e.by, e.why)
        for e in events
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _write(name: str, content: dict[str, str]) -> None:
    """Write registry/<name>.json: neither run id nor version, which differ from database to database."""
    write_json(Path("registry", f"{name}.json"), {"format": 1, **content})


if __name__ == "__main__":
    run(main)
