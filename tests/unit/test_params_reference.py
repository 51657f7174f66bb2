"""The reference of params.yaml and the editors' schema say what the settings say."""

import json
from functools import reduce
from operator import getitem

import jsonschema
import pytest
import yaml

from domainstudio.config import reference
from tests.modules import ROOT


@pytest.fixture
def params():
    return yaml.safe_load((ROOT / "params.yaml").read_text())


def faults(values):
    validator = jsonschema.Draft202012Validator(reference.schema())
    return ["/".join(map(str, error.absolute_path)) for error in validator.iter_errors(values)]


def test_both_files_are_up_to_date():
    remedy = "run python -m domainstudio.config.reference"
    assert (ROOT / "docs/params.md").read_text() == reference.markdown(), remedy
    assert json.loads((ROOT / "docs/params.schema.json").read_text()) == reference.schema(), remedy


def test_the_projects_params_fit_the_schema(params):
    assert faults(params) == []
    first = (ROOT / "params.yaml").read_text().partition("\n")[0]
    assert first.startswith("# yaml-language-server: $schema=docs/params.schema.json")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("sample", "nummber"), 3),
        (("finetune", "steps"), "many"),
        (("finetune", "steps"), 0),
        (("adaptations", "sunglasses-finetune", "finetune"), {"stepps": 5}),
        (("adaptations", "sunglasses-finetune", "weights"), {"image": -1}),
        (("registry", "gate", "tolerance"), {"frechet": 0.1}),
    ],
)
def test_editors_mark_what_the_settings_refuse(params, path, value):
    *outer, last = path
    reduce(getitem, outer, params)[last] = value
    assert len(faults(params)) == 1


def test_overrides_of_an_adaptation_need_no_other_key(params):
    params["adaptations"]["sunglasses-finetune"] |= {
        "finetune": {"steps": 5},
        "weights": {"lora": {"rank": 4}},
    }
    assert faults(params) == []
