"""What a model came from, as it is written beside the model and read again."""

import json

import pytest
from pydantic import ValidationError

from domainstudio import config
from domainstudio.tracking.provenance import Provenance
from tests.modules import ROOT

ADAPTATION = config.load(ROOT / "params.yaml").adaptation("sunglasses-domainstudio")


@pytest.mark.parametrize("processes", [{}, {"processes": 2}])
def test_a_record_gives_its_adaptation_back(processes):
    params = {**ADAPTATION.model_dump(mode="json"), **processes}
    record = Provenance(adaptation=ADAPTATION.name, key="5", params=params, inputs={"shots": "b"}, steps=6)
    written = json.dumps(record.model_dump(mode="json"))
    assert list(json.loads(written))[:3] == ["format", "adaptation", "key"]
    read = Provenance.model_validate_json(written)
    assert read == record and read.settings == ADAPTATION
    assert "torch" in read.versions


def test_a_record_of_another_format_is_refused():
    with pytest.raises(ValidationError, match="format"):
        Provenance.model_validate({"format": 2})
