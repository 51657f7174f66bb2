"""Stage `register`: log an adaptation's results to MLflow, register its model, and let the gate judge it.

`python -m stages.register <adaptation>` makes one version per result. If it is better than the version with
the alias `registry.alias`, by the rules of `registry.gate`, it gets that alias, otherwise `challenger`. A
champion that was measured in another way, or against other images, is sampled and measured again first.

`--rollback <adaptation>` gives the alias back to the version before. `--promote VERSION --reason TEXT
<adaptation>` gives it to any version. `--history <adaptation>` shows who decided what, when and why.
"""

from __future__ import annotations

import argparse

from domainstudio import config
from stages.cli import run


def main() -> None:
    """Register an adaptation of params.yaml, move its alias, or show its history."""
    arguments = _arguments()
    settings = config.load()

    from domainstudio.registry import aliases, audit

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


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m stages.register",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adaptation", help="a key of adaptations in params.yaml")
    action = parser.add_mutually_exclusive_group()
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
