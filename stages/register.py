"""Stage `register`: log an adaptation's results to MLflow, register its model, and let the gate judge it.

`python -m stages.register <adaptation>` makes one version per result. If it is better than the version with
the alias `registry.alias`, by the rules of `registry.gate`, it gets that alias, otherwise `challenger`. A
champion that was measured in another way, or against other images, is sampled and measured again first.

`dvc repro` adds `--unless-trial`: a trial is logged to its run, and no version is made. A trial is an
adaptation that `registry.models` does not name, uncommitted settings, or an experiment (`dvc exp run`).

`--rollback <adaptation>` gives the alias back to the version before. `--promote VERSION --reason TEXT
<adaptation>` gives it to any version. `--history <adaptation>` shows who decided what, when and why.
"""

from __future__ import annotations

import argparse

from domainstudio import config
from stages.cli import run

_COMMAND = "python -m stages.register"


def main() -> None:
    """Register an adaptation of params.yaml, move its alias, or show its history."""
    arguments = _arguments()
    settings = config.load()

    from domainstudio.registry import aliases, audit, releases

    if arguments.unless_trial and (why := releases.trial(arguments.adaptation, settings)):
        _try_out(arguments.adaptation, settings, why)
        return
    alias = aliases.Alias.of(arguments.adaptation, settings)
    if arguments.history:
        print(audit.table(aliases.history(alias), alias.name))
        return
    if arguments.rollback:
        done = aliases.rollback(alias, arguments.reason)
    elif arguments.promote:
        done = aliases.promote(alias, arguments.promote, arguments.reason)
    else:
        from domainstudio.registry import registration  # which imports torch

        done = registration.register(arguments.adaptation, settings)
    print(done.describe(alias.name, arguments.adaptation))


def _try_out(adaptation: str, settings: config.Settings, why: str) -> None:
    from domainstudio.registry import registration

    registration.try_out(adaptation, settings)
    named = adaptation in settings.registry.models
    first = (
        "" if named else f"name its model in registry.models of params.yaml, as {adaptation}: <name>; then "
    )
    print(f"{adaptation}: a trial, nothing is registered: {why}")
    print(f"release it: {first}commit params.yaml and run dvc repro, or at once: {_COMMAND} {adaptation}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=_COMMAND,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adaptation", help="a key of adaptations in params.yaml")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--unless-trial", action="store_true", help="register nothing if this is a trial")
    action.add_argument("--rollback", action="store_true", help="give the alias back to the version before")
    action.add_argument("--promote", metavar="VERSION", help="give the alias to this version; needs --reason")
    action.add_argument("--history", action="store_true", help="show every decision and who made it")
    parser.add_argument("--reason", default="", help="why, for --rollback and --promote")
    arguments = parser.parse_args()
    if arguments.promote and not arguments.reason:
        parser.error("--promote overrules the gate: say why with --reason")
    if arguments.reason and not (arguments.promote or arguments.rollback):
        parser.error("--reason is for --promote and --rollback: the gate gives its own reasons")
    return arguments


if __name__ == "__main__":
    run(main)
