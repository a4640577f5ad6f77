"""Several processes that make one run, with gloo on a CPU: `torchrun --nproc-per-node 2 train.py`."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = """--arms echo --steps 3 --base_demonstrations 60 --base_steps 30 --tasks world:tool
    --tasks_per_step 3 --group_size 3 --eval_every 3 --eval_tasks 3 --micro_batch_tokens 200
    --device cpu --max_turns 2""".split()
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
pytestmark = pytest.mark.slow


def begin(folder, launcher, *flags):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *flags]
    options = {"cwd": folder, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, text=True, **options)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the run `one`, of one process, and `two`, of two."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, launcher in (("one", []), ("two", TORCHRUN)):
        child = begin(folder, launcher, "--name", name, *SMALL)
        said, _ = child.communicate(timeout=500)
        assert child.returncode == 0, said
        assert said.count("After 3 steps") == 1
    return folder / "runs"


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_lines(one, two, **wider):
    """Of metrics.jsonl, to six digits but for what is named in `wider`: relative tolerance."""
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            tolerance = {"rel": wider.get(key, 2e-6), "abs": 1e-6}
            close = pytest.approx(a[key], **tolerance) if type(a[key]) is float else a[key]
            assert b[key] == close or key.endswith("seconds"), key


def test_two_processes_make_the_run_of_one(runs):
    told = [next((runs / name / "transcripts").iterdir()).read_text() for name in ("one", "two")]
    assert told[0] == told[1]
    one, two = (lines(runs / name) for name in ("one", "two"))
    assert len(one) == 5
    same_lines(one, two)


def at_work(runs, name):
    """A copy of `two` that two processes go on with. -> launcher, its ranks"""
    shutil.copytree(runs / "two", runs / name)
    before = len(lines(runs / name))
    child = begin(runs.parent, TORCHRUN, "--resume", f"runs/{name}", "--steps", "500")
    while len(lines(runs / name)) < before + 2:
        assert child.poll() is None, child.stdout.read()
        time.sleep(0.2)
    ranks = subprocess.run(["pgrep", "-P", str(child.pid)], capture_output=True, text=True).stdout.split()
    return child, [int(pid) for pid in ranks]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_all(runs, victim):
    all_end(*at_work(runs, f"killed_{victim}"), victim)


def all_end(child, pids, victim):
    """When one of two processes is killed, so within seconds, with at most one message of ours."""
    assert len(pids) == 2
    os.kill(pids[victim], signal.SIGKILL)
    started = time.monotonic()
    said, _ = child.communicate(timeout=60)
    assert child.returncode and time.monotonic() - started < 10
    assert not any(Path("/proc", str(pid)).exists() for pid in pids)
    assert len(re.findall("^train.py: ", said, re.MULTILINE)) <= 1
    assert "SIGKILL" in said and said.count("Traceback") <= 1  # torchrun's


def test_ctrl_c_saves(runs):
    child, _ = at_work(runs, "stopped")
    child.send_signal(signal.SIGINT)
    said, _ = child.communicate(timeout=60)
    assert len(re.findall(r"^train.py: ended after step \d+, as you asked", said, re.MULTILINE)) == 1, said
    step = int(re.search(r"ended after step (\d+)", said)[1])
    assert (runs / "stopped" / "echo" / f"step-{step:06d}" / "optimizer.pt").is_file()
    assert max(line["step"] for line in lines(runs / "stopped")) == step
