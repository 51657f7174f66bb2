"""Get what others made: `python -m flows.pull [adaptation ...]`.

It is `dvc pull` that ends well where something was never pushed, and says in one line what that is.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence

from domainstudio.errors import ConfigError
from flows import cli
from flows.run import graph


def main(arguments: Sequence[str] | None = None) -> int:
    """Pull what the command line names; the exit status is 0 also if something was never pushed."""
    parser = cli.parser("flows.pull", __doc__)
    parser.add_argument("adaptations", nargs="*", metavar="adaptation", help="default: everything")
    options = parser.parse_args(arguments)
    return cli.run(lambda: _pull(options.adaptations), "a second call goes on")


def _pull(names: Sequence[str]) -> int:
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    for name in ("dvc", "dvc_data"):  # which list the hash of each file that is missing
        logging.getLogger(name).setLevel(logging.ERROR)
    known = graph.read()
    wanted = graph.select(known, names) if names else known
    with Repo() as repo:
        if not repo.config["core"].get("remote"):
            raise ConfigError(
                "DVC has no default remote to pull from: `dvc remote add --default team s3://bucket/prefix`"
            )
        try:
            fetched = repo.pull(sorted(wanted), allow_missing=True)["stats"]["fetched"]
        except DvcException as error:
            raise ConfigError(f"the DVC remote gave nothing: {error}") from error
        lacking = [
            stage.addressing
            for stage in repo.index.stages
            if stage.addressing in wanted and not all(out.exists for out in stage.outs if out.use_cache)
        ]
    print(f"{fetched} files fetched. {_never_pushed(lacking)}")
    return 0


def _never_pushed(addresses: Iterable[str]) -> str:
    """Return one line about what is not here after all was pulled; members of a group are counted."""
    groups: dict[str, list[str]] = {}
    for address in sorted(addresses):
        groups.setdefault(address.partition("@")[0], []).append(address)
    if not groups:
        return "All is here"
    shown = ", ".join(
        each[0] if len(each) == 1 else f"{len(each)} of {group}" for group, each in groups.items()
    )
    return (
        f"Never pushed were the results of {shown}: `dvc repro` makes them here, and `dvc push` where they "
        "were made shares them"
    )


if __name__ == "__main__":
    sys.exit(main())
