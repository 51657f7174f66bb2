"""Training on nodes that vanish: states mirrored to a real S3 server, and what happens when that fails."""

from __future__ import annotations

import logging
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load, load_file

from domainstudio.data.image_set import ImageRecord, ImageSet
from domainstudio.errors import UNAVAILABLE_STATUS, ConfigError
from domainstudio.storage import candidates, checkpoint, mirror
from domainstudio.storage import s3 as transfers
from domainstudio.storage.mirror import VARIABLE, mirrored
from tests import warm
from tests.integration.conftest import S3Server, free_port
from tests.integration.mlflow_parts import environment, rows, use_local_store
from tests.integration.s3_parts import Proxy, proxy_of, remove_credentials, wait_until
from tests.integration.test_training import trainer
from tests.models import tiny_denoiser, tiny_images
from tests.project import params

NAME = "ink-domainstudio"
STEPS, EVERY = 48, 8


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A network that can fail, before an S3 server where the states go; and little patience."""
    monkeypatch.setattr(mirror, "POLL", 0.02)
    with proxy_of(s3, monkeypatch) as proxy:
        yield proxy


@pytest.fixture
def place(s3: S3Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """A prefix of this test's own, below which the states of all runs go."""
    place = f"mirror/{request.node.name}"
    monkeypatch.setenv(VARIABLE, f"s3://{s3.bucket}/{place}/")
    yield place
    wait_until(lambda: "s3-mirror" not in [thread.name for thread in threading.enumerate()])


def manifests(s3: S3Server, prefix: str) -> list[str]:
    """Return the paths of the manifests below a prefix."""
    return [key for key in s3.keys(prefix) if key.endswith("/MANIFEST.json")]


def whole(s3: S3Server, prefix: str) -> list[str]:
    """Return the names of a run's states on S3."""
    return [key.partition("/")[0] for key in manifests(s3, prefix)]


def save(folder: Path, step: int, size: int = 8) -> torch.Tensor:
    weights = torch.full((size,), float(step))
    checkpoint.save(folder, step, {"network": {"weights": weights}})
    return weights


def save_and_wait(s3: S3Server, place: str, folder: Path, *steps: int) -> None:
    def is_copied() -> bool:
        return f"step-{step:07d}" in whole(s3, f"{place}/{folder.name}")

    for step in steps:
        save(folder, step)
        wait_until(is_copied)


def latest(folder: Path) -> tuple[int, float] | None:
    found = checkpoint.latest(folder)
    return None if found is None else (found[0], found[1]["network"]["weights"][0].item())


def fetched(folder: Path) -> tuple[int, float] | None:
    """Return the state that a training in a folder goes on from."""
    with mirrored(folder):
        return latest(folder)


# A killed run goes on elsewhere.


def make_project(root: Path) -> Path:
    """Write what stage `finetune` reads: a tiny source model, six images, the parameters."""
    values = params()
    values["finetune"] |= {"steps": STEPS, "checkpoint_every": EVERY, "preview_every": 16}
    root.mkdir()
    (root / "params.yaml").write_text(yaml.safe_dump(values))
    tiny_denoiser(0).save(root / "models/sources/noto")
    images = tiny_images()
    records = tuple(ImageRecord(f"{i}.png", f"{i:064}", 8, 8, f"images/{i}.png") for i in range(len(images)))
    ImageSet(images, records, "images").save(root / "data/targets/ink/shots")
    return root


def popen(cwd: Path, *arguments: str, env: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start Python in a process of its own."""
    command, pipe = [warm.python(), *arguments], subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=env, text=True, stdout=pipe, stderr=subprocess.STDOUT)


def run_finetune(root: Path, status: int = 0, without: Collection[str] = ()) -> str:
    """Run the stage in a process of its own, as alike as the killed one's; return what it printed."""
    env = {name: value for name, value in environment().items() if name not in without}
    process = popen(root, "-m", "stages.finetune", NAME, env=env)
    printed: str = process.communicate()[0]
    assert process.returncode == status, printed
    return printed


SLOW = """
import sys, time
from domainstudio.training.trainer import Trainer
from stages import finetune

def take_step(trainer, take=Trainer.take_step):
    time.sleep(trainer.step >= 16)  # to be killed before the end
    return take(trainer)

Trainer.take_step = take_step
finetune.main()
"""


def last_step(database):
    ((step,),) = rows(database, "select max(step) from metrics")
    return step


@pytest.mark.timeout(900)
def test_a_killed_run_goes_on_in_another_folder(s3, place, tmp_path, monkeypatch):
    undisturbed = make_project(tmp_path / "undisturbed")
    here, there = (shutil.copytree(undisturbed, tmp_path / name) for name in ("here", "there"))
    (tmp_path / "store").mkdir()
    database = use_local_store(tmp_path / "store", monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    process = popen(here, "-c", SLOW, NAME, env=environment())
    try:
        wait_until(lambda: process.poll() is not None or len(manifests(s3, place)) == 2, 600)
        wait_until(lambda: process.poll() is not None or last_step(database) > 8, 60)
    finally:
        process.send_signal(signal.SIGKILL)
        said = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, said
    (run,) = {key.partition("/")[0] for key in s3.keys(place)}
    older, newer = whole(s3, f"{place}/{run}")
    # As if the last copy had not been finished: MLflow knows more steps than the state.
    s3.delete(f"{place}/{run}/{newer}/MANIFEST.json")
    assert 0 < int(older[5:]) < last_step(database) < STEPS

    assert f"{older}: fetched from s3://{s3.bucket}/{place}/{run}" in run_finetune(there)
    assert rows(database, "select name, status from runs") == [(NAME, "FINISHED")]
    steps = rows(database, "select key, count(*), count(distinct step), max(step) from metrics group by key")
    assert {row[1:] for row in steps} == {(STEPS, STEPS, STEPS)}

    run_finetune(undisturbed, without={VARIABLE, "MLFLOW_TRACKING_URI"})
    network = f"models/adapted/{NAME}/unet/diffusion_pytorch_model.safetensors"
    one, other = load_file(undisturbed / network), load_file(there / network)
    assert all(torch.equal(one[name], other[name]) for name in one)
    previews = [sorted(p.name for p in d.glob("training/*/previews/*")) for d in (undisturbed, there)]
    assert previews[0] == previews[1] and len(previews[0]) == STEPS // 16
    assert max(whole(s3, f"{place}/{run}")) == f"step-{STEPS:07d}"


# What is in the bucket.


def test_states_are_copied_whole_and_two_are_kept(s3, place, tmp_path):
    folder, prefix = tmp_path / "run", f"{place}/run"
    preview = folder / "previews/step-000002.png"
    with mirrored(folder):
        save_and_wait(s3, place, folder, 1, 2, 3)
        preview.parent.mkdir()
        preview.write_bytes(b"drawn")
        (folder / "previews/step-000009.png").write_bytes(b"not written wholly")
        candidate = candidates.save(folder, 3, {"weight": torch.ones(2)})
        save(folder, 4)
    files = ("MANIFEST.json", "state.json", "state.safetensors")
    states = [f"step-000000{step}/{file}" for step in (3, 4) for file in files]
    kept = ["candidates/step-0000003.safetensors", "previews/step-000002.png"]
    assert s3.keys(prefix) == [*kept, *states]
    assert fetched(tmp_path / "elsewhere/run") == (4, 4.0)
    assert (tmp_path / "elsewhere/run/previews/step-000002.png").read_bytes() == b"drawn"
    assert (tmp_path / "elsewhere/run" / kept[0]).read_bytes() == candidate.read_bytes()
    left = {path.name for path in (tmp_path / "elsewhere/run").iterdir()}
    assert left == {"candidates", "previews", "step-0000004"}


def test_the_newer_state_wins(s3, place, tmp_path):
    folder, other = tmp_path / "run", tmp_path / "other/run"
    with mirrored(folder):
        save(folder, 2)
    save(other, 1)
    assert fetched(other) == (2, 2.0)
    save(other, 3)
    assert fetched(other) == (3, 3.0)
    assert whole(s3, f"{place}/run") == ["step-0000002", "step-0000003"]  # caught up
    (other / "step-0000003/state.safetensors").write_bytes(b"damaged here")
    assert fetched(other) == (3, 3.0)


@pytest.mark.parametrize("damage", ["content", "missing", "manifest", "size"])
def test_a_damaged_state_is_passed_over(s3, place, tmp_path, caplog, damage):
    folder, prefix = tmp_path / "run", f"{place}/run"
    with mirrored(folder):
        save_and_wait(s3, place, folder, 1, 2)
    key = f"{prefix}/step-0000002/state.safetensors"
    if damage == "missing":
        s3.delete(key)
    else:
        size = len(s3.get(key)) - (damage == "size")
        s3.put(f"{prefix}/step-0000002/MANIFEST.json" if damage == "manifest" else key, b"x" * size)
    s3.put(f"{prefix}/step-0000003/state.json", b"{}")  # a state that was never finished is no state
    assert not caplog.records
    other = tmp_path / "other/run"
    with mirrored(other):
        assert latest(other) == (1, 1.0)
        (warning,) = caplog.messages
        assert "step-0000002 cannot be used" in warning and "going back to the state before" in warning
        caplog.clear()
        save(other, 2)
    assert not caplog.records
    assert fetched(tmp_path / "third/run") == (2, 2.0)
    assert whole(s3, prefix) == ["step-0000001", "step-0000002"]


def test_a_manifest_writes_nothing_outside_of_the_folder(s3, place, tmp_path):
    folder, prefix = tmp_path / "run", f"{place}/run"
    preview = folder / "previews/step-000001.png"
    preview.parent.mkdir(parents=True)
    preview.write_bytes(b"drawn")
    with mirrored(folder):
        save(folder, 1)
    key = f"{prefix}/step-0000001/MANIFEST.json"
    text = s3.get(key).decode()
    assert "previews/step-000001.png" in text
    s3.put(f"{prefix}/previews/c:outside", b"drawn")
    for outside in ("previews/c:outside", "previews/../../../outside"):  # the server refuses a key like that
        changed = text.replace("previews/step-000001.png", outside)
        s3.put(key, changed.encode())
        shutil.rmtree(tmp_path / "deep", ignore_errors=True)
        assert fetched(tmp_path / "deep/er/run") == (1, 1.0)
        assert not list(tmp_path.rglob("*outside"))


# A bucket that is away.


def test_training_goes_on_without_the_server_and_states_catch_up(s3, proxy, place, tmp_path, caplog):
    folder, prefix = tmp_path / "run", f"{place}/run"
    with mirrored(folder):
        training = trainer(folder, steps=16)
        step = training.take_step

        def eventful() -> dict[str, float]:
            if training.step == 4:
                wait_until(lambda: whole(s3, prefix))
                proxy.shut()
            elif training.step == 8:
                wait_until(lambda: caplog.records)
            elif training.step == 14:
                time.sleep(3)  # by now more than one attempt has failed
                proxy.listen()
            return step()

        training.take_step = eventful
        assert len(training.train()) == 16
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "training goes on" in record.message and "cannot be reached" in record.message
    assert max(whole(s3, prefix)) == "step-0000016"


def test_a_training_without_a_state_waits_for_the_server(s3, proxy, place, tmp_path, monkeypatch):
    root = make_project(tmp_path / "project")
    use_local_store(root, monkeypatch)
    proxy.shut()
    said = run_finetune(root, UNAVAILABLE_STATUS)
    assert f"error: s3://{s3.bucket}/{place}/" in said and "cannot be reached" in said
    assert not list(root.glob(".checkpoints/*/*"))


def test_a_busy_server_damages_no_state(s3, proxy, place, tmp_path, caplog):
    with mirrored(tmp_path / "run"):
        save_and_wait(s3, place, tmp_path / "run", 1, 2)
    newest = f"GET /{s3.bucket}/{place}/run/step-0000002/state.safetensors"
    proxy.refused = (newest, 503, "SlowDown")
    other = tmp_path / "other/run"
    with pytest.raises(transfers.UnreachableError, match="SlowDown"), mirrored(other):
        pytest.fail("it began anew")
    assert latest(other) is None and not caplog.records
    save(other, 1)
    assert fetched(other) == (1, 1.0)  # which is not as good, but a state
    (warning,) = caplog.messages
    assert "training goes on" in warning and "SlowDown" in warning
    proxy.refused = None
    assert fetched(other) == (2, 2.0)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("down", "the server cannot be reached"),
        ("no credentials", "no S3 credentials. Set AWS_ACCESS_KEY_ID"),
        ("wrong secret", "Correct AWS_SECRET_ACCESS_KEY"),
        ("no bucket", "credentials are AWS_"),
    ],
)
def test_a_bucket_that_cannot_be_used_costs_one_warning(
    s3, proxy, place, tmp_path, monkeypatch, caplog, capsys, fault, said
):
    monkeypatch.setattr(transfers, "ATTEMPTS", 1)
    folder, secret = tmp_path / "run", "s3cr3t-of-this-test"
    if fault == "down":
        proxy.shut()
        save(folder, 0)  # without any state it would not begin
    elif fault == "no credentials":
        remove_credentials(monkeypatch)
    elif fault == "wrong secret":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    else:
        monkeypatch.setenv(VARIABLE, f"s3://key:{secret}@bucket/prefix")
    with mirrored(folder):
        for step in (1, 2, 3):
            save(folder, step)
            time.sleep(0.3)
    (warning,) = caplog.messages
    assert said in warning and VARIABLE in warning
    shown = caplog.text + "".join(capsys.readouterr())
    assert secret not in shown and s3.environment["AWS_SECRET_ACCESS_KEY"] not in shown
    assert len(proxy.requests) <= 5  # at the start, for each state, and at the end
    assert latest(folder) == (3, 3.0)
    assert whole(s3, f"{place}/run") == []


def test_a_server_that_hangs_holds_up_the_end_for_a_bounded_time(
    s3, proxy, place, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(mirror, "WAIT", 3.0)
    folder = tmp_path / "run"
    with mirrored(folder):
        proxy.flowing.clear()
        save(folder, 1)
        started = time.monotonic()
    assert 2.5 < time.monotonic() - started < 8
    (warning,) = caplog.messages
    assert "the last one was not copied within 3 s" in warning
    proxy.flowing.set()  # before `place` waits for the thread


def test_training_never_waits_and_only_the_newest_state_follows(s3, proxy, place, tmp_path):
    folder, size = tmp_path / "run", 3 * 2**20
    with mirrored(folder):
        save(folder, 1, size)
        wait_until(lambda: proxy.count("POST"))  # 12 MiB, so in parts
        proxy.flowing.clear()
        for step in (2, 3, 4):  # the first is dropped while it is on its way
            save(folder, step, size)
        assert not (folder / "step-0000001").exists()
        proxy.flowing.set()
    assert whole(s3, f"{place}/run") == ["step-0000001", "step-0000004"]
    written = [request for request in proxy.requests if request.startswith(("POST", "PUT"))]
    assert not any("step-0000002" in request or "step-0000003" in request for request in written)
    for step in (1, 4):
        assert "MANIFEST" in [request for request in written if f"step-000000{step}" in request][-1]
    first = load(s3.get(f"{place}/run/step-0000001/state.safetensors"))
    assert torch.equal(first["/network/weights"], torch.full((size,), 1.0))


def test_a_fetch_that_broke_off_goes_on(s3, proxy, place, tmp_path, monkeypatch):
    monkeypatch.setattr(transfers, "PART", 2**20)
    monkeypatch.setattr(transfers, "PARALLEL", 2)
    with mirrored(tmp_path / "run"):
        save_and_wait(s3, place, tmp_path / "run", 1)
        weights = save(tmp_path / "run", 2, 2 * 2**20)
    other = tmp_path / "other/run"
    proxy.forget()
    proxy.cut_after = 5 * 2**20
    with pytest.raises(transfers.UnreachableError, match="cannot be reached"), mirrored(other):
        pytest.fail("it began anew")
    proxy.cut_after = None
    proxy.listen()
    proxy.forget()
    with mirrored(other):
        assert proxy.received < 6 * 2**20  # of 8
        found = checkpoint.latest(other)
    assert found is not None and torch.equal(found[1]["network"]["weights"], weights)


# Nobody asked for it, or not like this; several processes.


def test_nothing_is_done_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    code = (
        "import sys; from pathlib import Path; from domainstudio.storage.mirror import mirrored\n"
        "with mirrored(Path('run')): pass\n"
        "assert not {'boto3', 'botocore', 'mlflow', 'accelerate', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), cwd=tmp_path, check=True)
    assert not list(tmp_path.iterdir())


def test_another_address_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "https://user:password@host/bucket")
    message = r"must be s3://bucket/prefix, got https://\*\*\*@host/"
    with pytest.raises(ConfigError, match=message), mirrored(tmp_path):
        pass


PROCESSES = """
import os, sys, threading
from pathlib import Path
rank = os.environ["RANK"]
if rank == "1":
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
from domainstudio.storage import checkpoint
from domainstudio.storage.mirror import mirrored
folder = Path(sys.argv[1])
with mirrored(folder):
    step, _ = checkpoint.latest(folder)
    print(f"rank {rank} at step {step}", "s3-mirror" in [thread.name for thread in threading.enumerate()])
    if rank == "0":
        checkpoint.save(folder, 2, {})
"""


def test_of_several_processes_one_talks_to_s3(s3, place, tmp_path):
    with mirrored(tmp_path / "run"):
        save(tmp_path / "run", 1)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common["CUDA_VISIBLE_DEVICES"] = ""
    other = str(tmp_path / "other/run")
    processes = [
        popen(tmp_path, "-c", PROCESSES, other, env=environment(**common, RANK=rank, LOCAL_RANK=rank))
        for rank in "01"
    ]
    said = [process.communicate(timeout=200)[0] for process in processes]
    assert "rank 0 at step 1 True" in said[0], said
    assert said[1] == "rank 1 at step 1 False\n"  # without credentials it would warn
    assert [process.returncode for process in processes] == [0, 0]
    assert whole(s3, f"{place}/run") == ["step-0000001", "step-0000002"]
