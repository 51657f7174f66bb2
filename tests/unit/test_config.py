"""params.yaml: unknown keys, values out of range and dangling names are errors that say where."""

import pytest

from domainstudio import config
from domainstudio.errors import ConfigError
from tests.modules import ROOT
from tests.project import changed_params

PARAMS = ROOT / "params.yaml"


def plain(values):
    return values["adaptations"]["sunglasses-finetune"]


def real_prior(values):
    plain(values).update(prior={"images": "source"}, weights={"prior": 1.0})
    values["source_images"]["avataaars"] = {"images": "demo/none.yaml"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["finetune"].update(stepz=3), r"finetune\.stepz: Extra inputs"),
        (lambda v: v["sample"].update(number=0), r"sample\.number: Input should be greater"),
        (lambda v: plain(v).update(target="inc"), r"target is 'inc'.*\['sunglasses'\]"),
        (lambda v: plain(v).update(method="none"), r"Add it to methods"),
        (lambda v: v["source_images"].clear(), r"no 'avataaars': .* `avataaars: {images: demo/none.yaml}`"),
        (lambda v: v["registry"]["models"].update(ink="ink"), r"registry\.models names ink, but adaptations"),
        (
            lambda v: v["registry"]["models"].update(ink="ink"),
            r"registry\.models names ink, but adaptations has",
        ),
        (lambda v: plain(v).update(finetune={"stps": 1}), r"sunglasses-finetune.*\n.*stps"),
        (lambda v: v["adaptations"].update({"a b": plain(v)}), r"a b"),
        (lambda v: v["pretrain"]["unet"].update(attention=[True]), "one true or false per resolution"),
        (lambda v: v["pretrain"]["noise"].update(prediction_type="epsilon"), "needs prediction_type v_pred"),
        (lambda v: v.pop("sources"), r"sources: Field required"),
        (lambda v: v["finetune"].update(batch_size=2), r"batch_size must be at least 3 per process, got 2"),
        (
            real_prior,
            r"prior\.images is source, and source_images says that avataaars has none: name some, or",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        config.load(changed_params(tmp_path, change))


def test_overrides_win_and_the_rest_stays(tmp_path):
    def change(values):
        item = values["adaptations"]["sunglasses-domainstudio"]
        item["finetune"], item["weights"] = {"steps": 7}, {"image": 9.0}

    adaptation = config.load(changed_params(tmp_path, change)).adaptation("sunglasses-domainstudio")
    default = config.load(PARAMS).adaptation("sunglasses-domainstudio")
    assert adaptation.training.steps == 7
    assert adaptation.weights.image == 9.0
    assert adaptation.weights.high_frequency == default.weights.high_frequency
    assert adaptation.training.batch_size == default.training.batch_size


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "not valid YAML"), ("- 1", "mapping of sections"), (None, "does not exist")],
)
def test_files_that_are_no_settings(tmp_path, text, message):
    path = tmp_path / "params.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        config.load(path)


def test_an_unknown_adaptation_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"no 'x'; there are \["):
        config.load(PARAMS).adaptation("x")
