"""The `python` of `tests.warm` is to whoever starts it what the ordinary one is."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from tests import warm
from tests.project import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TELL = """
import os, sys
from tests.faults.cases import __name__ as imported
own = [name for name in before if name.partition(".")[0] in ("domainstudio", "stages", "flows", "tests")]
print(sys.argv, os.getcwd(), os.environ["TOLD"], sys.stdin.read(), imported, own)
print("said", file=sys.stderr)
sys.exit(3)
"""
FAMILY = """
import signal, subprocess, sys, time
child = subprocess.Popen(["sleep", "100"])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print(child.pid, flush=True)
time.sleep(100)
"""


def start(python, code, **options):
    return subprocess.Popen([python, "-c", code, "an argument"], text=True, stdout=subprocess.PIPE, **options)


@pytest.mark.parametrize("python", [warm.python, lambda: sys.executable], ids=["warm", "ordinary"])
def test_a_process_has_its_folder_variables_and_streams_and_its_status_comes_back(python, tmp_path):
    variables = {**os.environ, "TOLD": "yes", "PYTHONPATH": str(ROOT)}
    options = {"cwd": tmp_path, "env": variables, "stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start(python(), f"import sys; before = set(sys.modules)\n{TELL}", **options)
    out, err = process.communicate("asked")
    assert out == f"['-c', 'an argument'] {tmp_path} yes asked tests.faults.cases []\n"
    assert (err, process.returncode) == ("said\n", 3)


def test_signals_reach_it_and_none_of_its_group_outlives_a_killed_one():
    for number, status in (signal.SIGTERM, 7), (signal.SIGKILL, -signal.SIGKILL):
        with start(warm.python(), FAMILY) as process:
            child = psutil.Process(int(process.stdout.readline()))
            family = [child, child.parent()]
            process.send_signal(number)
            assert process.wait() == status
        if number == signal.SIGTERM:
            child.kill()
        _, left = psutil.wait_procs(family, timeout=60)
        assert not left
    with start(warm.python(), "import os; os.kill(os.getpid(), 9)") as dying:
        assert dying.wait() == -signal.SIGKILL
