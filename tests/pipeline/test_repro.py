"""The whole pipeline by `dvc repro`, on a tiny model and random images, as a user runs it."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.project import environment, make_project, run

# The first test also makes everything that the others start from: minutes on a slow processor.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def first(project):
    """What the first `dvc repro` printed."""
    output = run(project, "dvc", "repro")
    run(project, "git", "add", ".")
    run(project, "git", "commit", "-q", "-m", "first results")
    return output


def stages_run(output):
    return re.findall(r"Running stage '([^']+)'", output)


def change(root, edit):
    values = yaml.safe_load((root / "params.yaml").read_text())
    edit(values)
    (root / "params.yaml").write_text(yaml.safe_dump(values))


def test_one_command_makes_everything(project, first):
    for name in ("ink-finetune", "ink-domainstudio"):
        metrics = json.loads((project / f"evaluation/{name}/metrics.json").read_text())
        assert metrics["number"] == 6
        assert set(metrics["references"]) == {"shots", "source", "domain"}
        assert len(list((project / f"samples/adapted/{name}/images").iterdir())) == 6
        assert len((project / f"training/{name}/losses.csv").read_text().splitlines()) == 7
        assert (
            sorted(p.name for p in (project / f"training/{name}/previews").iterdir())[-1] == "step-000006.png"
        )
        assert f"{name}" in (project / f"reports/{name}.html").read_text()
    assert (project / "report.html").stat().st_size > 10_000
    header = (project / "training/ink-domainstudio/losses.csv").read_text().splitlines()[0]
    assert {"simple", "image", "high_frequency", "high_frequency_mse"} <= set(header.split(","))


def test_the_registry_holds_a_model_per_adaptation(project, first):
    script = (
        "import mlflow; client = mlflow.MlflowClient('sqlite:///mlflow.db');"
        "print(sorted(m.name for m in client.search_registered_models()))"
    )
    assert "['domainstudio-ink-domainstudio', 'domainstudio-ink-finetune']" in run(
        project, "python", "-c", script
    )


def test_nothing_is_done_again_and_torch_stays_out(project, first):
    output = run(project, sys.executable, "-X", "importtime", "-m", "dvc", "repro")
    assert all(stage.startswith("release@") for stage in stages_run(output))  # which look at the server
    assert not re.search(r"\|\s+torch$", output, re.MULTILINE)


def test_metrics_and_plots_are_shown(project, first):
    table = json.loads(run(project, "dvc", "metrics", "show", "--json"))
    figures = table[""]["data"]["evaluation/ink-finetune/main.json"]["data"]
    assert {"kid", "memorized"} <= set(figures) and len(figures) < 8
    run(project, "dvc", "plots", "show", "-o", "plots")
    assert "ink-domainstudio" in (project / "plots/index.html").read_text()


def test_how_a_model_is_drawn_trains_nothing(project, first):
    """Another way of drawing finds the training finished, and makes other samples of the same model."""

    def weights():
        return (project / "models/adapted/ink-finetune/unet/diffusion_pytorch_model.safetensors").read_bytes()

    before, name = weights(), "samples/adapted/ink-finetune"
    combine = {"mode": "switch", "at": 0.6, "source": "above"}
    change(project, lambda v: v["adaptations"]["ink-finetune"].update(combine=combine))
    ran = stages_run(run(project, "dvc", "repro", "evaluate@ink-finetune"))
    assert ran == [f"{stage}@ink-finetune" for stage in ("chooser", "finetune", "sample", "evaluate")]
    assert weights() == before
    assert json.loads((project / name / "manifest.json").read_text())["combine"] == combine
    run(project, "git", "checkout", "-q", "params.yaml", "dvc.lock", "evaluation")
    run(project, "dvc", "checkout")


def test_an_edited_metric_trains_nothing(project, first):
    path = project / "domainstudio/metrics/ridge.py"
    path.write_text(path.read_text() + "# edited\n")
    output = run(project, "dvc", "repro", "finetune@ink-finetune")
    assert stages_run(output) == ["chooser@ink-finetune"]
    run(project, "git", "checkout", "-q", "domainstudio", "dvc.lock")


def test_a_changed_weight_reruns_only_what_depends_on_it(project, first):
    change(project, lambda v: v["methods"]["domainstudio"].update(image=0.25))
    output = run(project, "dvc", "repro")
    ran = stages_run(output)
    assert all(
        stage == "report" or stage.startswith("release@") or stage.endswith("@ink-domainstudio")
        for stage in ran
    )
    assert {"finetune@ink-domainstudio", "report"} <= set(ran)
    assert "ink-domainstudio: a trial, nothing is registered: params.yaml has changes" in output
    assert json.loads((project / "registry/ink-domainstudio.json").read_text())["model"] is None
    run(project, "git", "commit", "-q", "-a", "-m", "another weight")
    output = run(project, "dvc", "repro", "register@ink-domainstudio")
    assert stages_run(output) == ["release@ink-domainstudio", "register@ink-domainstudio"]
    assert "domainstudio-ink-domainstudio: version 2 registered" in output


def test_experiments_set_parameters(project, first):
    run(project, "git", "commit", "-q", "-a", "-m", "another version")
    output = run(project, "dvc", "exp", "run", "-S", "evaluate.neighbours=1", "evaluate@ink-finetune")
    assert stages_run(output) == ["evaluate@ink-finetune"]
    left = {stage.split("@")[0] for stage in stages_run(run(project, "dvc", "repro", "--dry"))}
    after = {"tradeoff", "adaptation_report", "release", "register", "report"}
    assert {"evaluate"} <= left <= {"evaluate"} | after
    assert yaml.safe_load((project / "params.yaml").read_text())["evaluate"]["neighbours"] == 1
    assert "neighbours" in run(project, "dvc", "exp", "show", "--only-changed", "--csv")


def killed(project, *command, at):
    """Start a stage and kill it once a checkpoint of step `at` or later is there."""
    before = set((project / ".checkpoints").glob("*/step-*"))
    process = subprocess.Popen(
        ["python", "-m", *command], cwd=project, env=environment(), stdout=subprocess.DEVNULL
    )
    while process.poll() is None:
        new = {path.name for path in set((project / ".checkpoints").glob("*/step-*")) - before}
        if any(name >= f"step-{at:07d}" for name in new):
            process.send_signal(signal.SIGKILL)
        time.sleep(0.02)
    assert process.wait() == -signal.SIGKILL


def runs_with(project, condition):
    """Return status and logged steps of every MLflow run that fits a condition."""
    script = f"""
import mlflow, json
client = mlflow.MlflowClient("sqlite:///mlflow.db")
experiment = client.get_experiment_by_name("domainstudio").experiment_id
found = [
    [run.info.status, [m.step for m in client.get_metric_history(run.info.run_id, "simple")]]
    for run in client.search_runs([experiment], {condition!r})
]
print("RESULT", json.dumps(found))
"""
    return json.loads(run(project, "python", "-c", script).split("RESULT ")[1])


def test_a_killed_training_goes_on_in_the_same_run(project, first):
    def longer(values):
        values["adaptations"]["ink-finetune"]["finetune"] = {"steps": 60, "checkpoint_every": 5}

    change(project, longer)
    killed(project, "stages.finetune", "ink-finetune", at=20)
    output = run(project, "dvc", "repro", "finetune@ink-finetune")
    assert "going on from step" in output
    [[status, steps]] = runs_with(project, "params.`training.steps` = '60'")
    assert status == "FINISHED"
    assert sorted(steps) == list(range(1, 61))


def test_a_killed_pretraining_goes_on_by_name(project, first):
    def small(values):
        values["pretrain"]["unet"] = {
            "block_out_channels": [8, 16],
            "attention": [False, True],
            "attention_head_dim": 8,
            "norm_num_groups": 4,
        }
        values["pretrain"]["training"] |= {"steps": 31, "batch_size": 4, "checkpoint_every": 5}
        values["pretrain"]["training"]["preview_every"] = 0

    change(project, small)
    killed(project, "stages.pretrain", "pretrain", at=10)
    output = run(project, sys.executable, "-m", "stages.pretrain", "pretrain")
    assert "going on from step" in output
    [[status, steps]] = runs_with(project, "params.`training.steps` = '31'")
    assert status == "FINISHED"
    assert sorted(steps) == list(range(1, 32))
    assert "Source model of the demo" in (project / "models/sources/noto/README.md").read_text()


def test_a_bad_parameter_is_one_clean_line(project, first):
    change(project, lambda v: v["finetune"].update(batch_size=2))
    output = run(project, "dvc", "repro", "finetune@ink-domainstudio", check=False)
    assert "error: " in output
    assert "finetune.batch_size: must be at least 3" in output
    assert "Traceback" not in output
