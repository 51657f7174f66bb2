"""Stages on several processes: trained over the global batch, drawn and measured in shares."""

import json
import shutil

import numpy as np
import pytest
import yaml

from tests.project import make_project, params, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


def set_processes(project, number):
    values = params()
    values["launch"]["processes"] = number
    (project / "params.yaml").write_text(yaml.safe_dump(values))


def test_two_processes_draw_the_images_that_one_draws(project):
    drawn = {}
    for number in (1, 2):
        set_processes(project, number)
        run(project, "python", "-m", "stages.sample", "source", "noto")
        images = sorted((project / "samples/sources/noto/images").glob("*.png"))
        drawn[number] = [path.read_bytes() for path in images]
        shutil.rmtree(project / "samples")
    assert len(drawn[2]) == params()["sample"]["number"]
    assert drawn[1] == drawn[2]


def test_two_processes_train_one_model(project):
    set_processes(project, 2)
    run(project, "python", "-m", "stages.prepare", "target", "ink")
    run(project, "python", "-m", "stages.finetune", "ink-domainstudio")
    history = (project / "training/ink-domainstudio/history.jsonl").read_text()
    records = [json.loads(line) for line in history.splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert all(record["image"] > 0 for record in records[2:])  # the models begin equal
    told = json.loads((project / "models/adapted/ink-domainstudio/provenance.json").read_text())
    assert told["params"]["processes"] == 2
    assert not list(project.rglob("*.partial"))


def test_features_of_shares_are_those_of_the_whole(project):
    script = (
        "import numpy as np\n"
        "from domainstudio.distributed import this_process\n"
        "from domainstudio.metrics.features import extract\n"
        "from domainstudio.metrics.networks import load_network\n"
        "images = np.random.default_rng(0).integers(0, 256, (7, 3, 16, 16), dtype=np.uint8)\n"
        "state = this_process()\n"
        "found = extract(images, load_network('efficientnet-lite0'), 2)\n"
        "name = f'{state.num_processes}-{state.process_index}'\n"
        "np.save(name, np.hstack([found.pooled, found.perceptual]))\n"
    )
    (project / "features.py").write_text(script)
    run(project, "python", "-m", "features")
    launcher = "torch.distributed.run --standalone --nproc_per_node 2 -m features"
    run(project, "python", "-m", *launcher.split())
    whole, *shares = (np.load(project / f"{name}.npy") for name in ("1-0", "2-0", "2-1"))
    for share in shares:
        np.testing.assert_allclose(share, whole, rtol=1e-3, atol=1e-4)
