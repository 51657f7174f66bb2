"""Selecting stages of the graph: what an adaptation needs, and no more."""

import pytest

from domainstudio.errors import ConfigError
from flows.run.graph import Stage, select, settled


def graph_of(*frozen, **edges):
    """Return stages from `finetune_at_a="data@ink"`; addresses are separated by spaces."""
    upstream = {name.replace("_at_", "@"): tuple(names.split()) for name, names in edges.items()}
    return {name: Stage(name, names, frozen=name in frozen) for name, names in upstream.items()}


PIPELINE = graph_of(
    "pretrain",
    source="",
    pretrain="source",
    data_at_ink="",
    data_at_line="",
    finetune_at_a="pretrain data@ink",
    finetune_at_b="pretrain data@line",
    evaluate_at_a="finetune@a data@ink",
    evaluate_at_b="finetune@b data@line",
    report="evaluate@a evaluate@b data@ink data@line",
    register_at_a="evaluate@a",
    register_at_b="evaluate@b",
)


def test_all_stages_but_the_frozen_ones_are_the_default():
    assert set(select(PIPELINE)) == set(PIPELINE) - {"pretrain"}


def test_every_stage_comes_after_what_it_needs():
    order = list(select(PIPELINE))
    for position, address in enumerate(order):
        needed = set(PIPELINE[address].upstream) - {"pretrain"}
        assert needed <= set(order[:position])


def test_an_adaptation_brings_its_ancestors_and_no_other_adaptation():
    selected = select(PIPELINE, ["a"])
    assert set(selected) == {"data@ink", "finetune@a", "evaluate@a", "register@a"}
    assert selected["evaluate@a"].upstream == ("finetune@a", "data@ink")
    assert select(PIPELINE, ["finetune@a"])["finetune@a"].upstream == ("data@ink",)  # "pretrain" is frozen


def test_a_target_with_the_name_of_an_adaptation_hides_no_other_target():
    stages = graph_of(data_at_a="", data_at_ink="", finetune_at_a="data@ink", finetune_at_b="data@a")
    assert set(select(stages, ["a"])) == {"data@a", "data@ink", "finetune@a"}


def test_stages_can_be_named_by_address():
    others = {"source", "pretrain", "register@a", "register@b"}
    assert set(select(PIPELINE, ["report"])) == set(PIPELINE) - others
    chosen = {"finetune@a", "finetune@b"}
    assert set(select(PIPELINE, chosen)) == chosen | {"data@ink", "data@line"}


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'c'.*keys a, b, ink, line"):
        select(PIPELINE, ["a", "c"])


def test_what_follows_a_changed_stage_is_not_settled():
    assert settled(PIPELINE, []) == set(PIPELINE)
    unsettled = {"finetune@b", "evaluate@b", "report", "register@b"}
    assert settled(PIPELINE, ["finetune@b"]) == set(PIPELINE) - unsettled
    assert settled(PIPELINE, ["source"]) == set(PIPELINE) - {"source"}  # what it leads to is frozen
