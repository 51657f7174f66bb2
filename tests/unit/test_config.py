"""params.yaml: unknown keys, values out of range and dangling names are errors that say where."""

import dvc.utils.serialize as dvc_yaml
import pytest

from domainstudio import config
from domainstudio.config.document import Document
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
        (lambda v: plain(v).update(target="inc"), r"target: is 'inc', but targets has only \['sunglasses'\]"),
        (lambda v: plain(v).update(method="none"), r"Add it to methods"),
        (lambda v: v["source_images"].clear(), r"no 'avataaars': .* `avataaars: {images: demo/none.yaml}`"),
        (lambda v: v["registry"]["models"].update(ink="ink"), r"models\.ink: is 'ink', but adaptations has"),
        (lambda v: plain(v).update(finetune={"stps": 1}), r"finetune\.finetune\.stps: Extra.*got 1"),
        (lambda v: v["adaptations"].update({"a b": plain(v)}), r"a b"),
        (lambda v: v["pretrain"]["unet"].update(attention=[True]), "one true or false per resolution"),
        (lambda v: v["pretrain"]["noise"].update(prediction_type="epsilon"), "needs prediction_type v_pred"),
        (lambda v: v.pop("sources"), r"sources: Field required"),
        (
            lambda v: v["finetune"].update(batch_size=2),
            r"finetune\.batch_size: must be at least 3 .*got 2",
        ),
        (
            real_prior,
            r"prior\.images: is source, and source_images says that avataaars has none: name some, or",
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
    ("before", "after", "said"),
    [
        ("  steps: 10\n", "  steps: .inf\n", "sample.steps: Input should be a finite number, got inf"),
        ("  steps: 10\n", "  steps: true\n", "sample.steps: true and false are not possible here, got True"),
        (
            "  aspect_buckets: false",
            "  aspect_buckets: 1.0",
            "aspect_buckets: must be true or false, got 1.0",
        ),
        ("  seed: 1000\n", f"  seed: {2**63}\n", "sample.seed: is a whole number of more than 64 bits"),
        ("  alias: champion\n", "  alias: a/b\n", "registry.alias: String should match"),
        ("  experiment: domainstudio\n", "  experiment: ''\n", "registry.experiment: String should have"),
        ("    shots: demo/sunglasses.yaml\n", "    shots: ''\n", "targets.sunglasses.shots: String should"),
        ("    shots: demo/sunglasses.yaml\n", '    shots: "a\\0b"\n', "shots: has the character"),
        ("    adaptation: sunglasses-domainstudio\n", "    adaptation: x\n", "adaptation: is 'x', but adap"),
        (
            "    block_out_channels: [32, 64]\n",
            "    block_out_channels: [0]\n",
            "channels.0: Input",
        ),
        (
            "  memorized_below: 0.15\n",
            "  memorized_below: 2001-01-01\n",
            "below: is a date by",
        ),
        ("  steps: 10\n", "  steps: 10\n  steps: 11\n", "sample.steps: not valid YAML: found duplicate key"),
        ("  steps: 10\n", "  steps: [10\n", "sample.guidance_scale: not valid YAML: did not find"),
    ],
)
def test_file_line_key_and_value_of_a_refusal(tmp_path, before, after, said):
    text = PARAMS.read_text()
    assert before in text
    path = tmp_path / "params.yaml"
    path.write_text(text.replace(before, after))
    line = text[: text.index(before)].count("\n") + 1
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    assert said in str(caught.value)
    named = int(str(caught.value).split(f"{path}:")[1].split(":")[0])
    assert named - line in ((0,) if "YAML:" not in said else (0, 1, 2))


def test_a_value_of_a_method_and_of_an_overlay_are_named_where_they_stand(tmp_path):
    overlay = tmp_path / "more.yaml"
    overlay.write_text("methods:\n  finetune: {simple: -1}\nfinetune:\n  batch_size: 2\n")
    with pytest.raises(ConfigError, match=rf"{overlay}:2: methods.finetune.simple: Input .*got -1"):
        config.load(PARAMS, overlay)
    overlay.write_text("finetune:\n  batch_size: 2\n")
    with pytest.raises(ConfigError, match=rf"{overlay}:2: finetune.batch_size: must be at least 3"):
        config.load(PARAMS, overlay)


def test_yaml_is_read_as_dvc_reads_it(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: 0600\nb: 10:00\nc: yes\nd: 1e-3\ne: &x {f: 1}\ng: {<<: *x, h: no}\n")
    values = Document.read(path).values
    assert values == dvc_yaml.load_yaml(str(path))
    assert (values["a"], values["b"], values["c"], values["d"]) == (600, "10:00", "yes", 0.001)
    assert Document.read(path).place(("g", "f")) == f"{path}:5"


@pytest.mark.parametrize(
    "text",
    ["a: &x [*x]", "a: -_", "a: !!bool x", "a: " + "9" * 5000, "a: " + "[" * 200_000, "1: a", "a: !!set {b}"],
)
def test_what_parsers_stumble_over_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"^{path}[^\n]*$"):
        Document.read(path)


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
