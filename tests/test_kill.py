"""Runs that are killed: kill -9 at chosen moments, Ctrl-C and SIGTERM once and twice, two runs in one folder.

The runs that are compared are pinned to one CPU: this policy's random commands hold pipes and `&`, whose
parts race each other to print on two.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import train
from echo_min import checkpoint
from tests.test_sandbox import wait_for_count
from tests.test_train import SMALL, assert_same_run, names

ROOT = Path(__file__).parent.parent
RUN = replace(SMALL, steps=40, eval_every=20)
SITES = {  # where the process kills itself: (module, class or "", function, calls until then, at most)
    "sampling": ("echo_min.sampler", "Sampler", "_forward", 60),
    "shell": ("echo_min.terminals.sandbox", "Sandbox", "run", 3),
    "verifier": ("echo_min.terminals.sandbox", "Sandbox", "verify", 12),
    "clearing a sandbox": ("echo_min.terminals.bubblewrap", "Box", "keep", 12),
    "update": ("torch", "Tensor", "backward", 4),
    "optimizer": ("torch.optim", "AdamW", "step", 4),
    "writing a checkpoint": ("os", "", "fsync", 12),
    "publishing a checkpoint": ("os", "", "replace", 4),
    "metrics": ("echo_min.report", "", "log", 4),
    "episode": ("echo_min.rollout", "Seat", "close", 12),
}
CHILD = """
import importlib, json, os, signal, sys
from pathlib import Path
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
import train
from echo_min.config import Config
folder, (module, owner, name), count = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
owner = getattr(importlib.import_module(module), owner) if owner else importlib.import_module(module)
real, calls = getattr(owner, name), 0
def deadly(*args, **kwargs):
    global calls
    calls += 1
    if calls == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(owner, name, deadly)
train.main(Config.load(folder / "config.json"), folder)
"""


def start(folder, site, count, marker):
    command = [sys.executable, "-c", CHILD, str(folder), json.dumps(SITES[site][:3]), str(count)]
    environment = os.environ | {"MARKER": marker, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def mounts():
    """Without those of a container engine, which may be at work beside."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return {line for line in lines if "docker" not in line and "nsfs" not in line}


@pytest.mark.slow
def test_killed_twenty_times_equals_never(tmp_path):
    folder, never, rng = tmp_path / "killed", tmp_path / "never", random.Random(0)
    for path in (folder, never):
        path.mkdir()
        RUN.save(path / "config.json")
    assert start(never, "update", 0, "never").returncode == 0
    before, killed = mounts(), 0
    for i in range(2 * len(SITES)):
        site, marker = list(SITES)[i % len(SITES)], f"killed-{os.getpid()}-{i}"
        done = start(folder, site, rng.randrange(1, SITES[site][3]), marker)
        killed += done.returncode == -signal.SIGKILL
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        assert wait_for_count(marker, 0) == 0, site
        assert mounts() <= before
    assert killed == 2 * len(SITES)
    assert start(folder, "update", 0, "last").returncode == 0
    assert not list(folder.rglob("*.tmp"))
    assert names(folder / "echo") == ["step-000039", "step-000040"]
    assert_same_run(folder, never)


def wait_until(true, seconds=90):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("presses", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm(tmp_path, number, presses):
    config = replace(SMALL, steps=400, save_every=1000 if presses == 1 else 1)
    if presses == 2:  # a step that is not over before the second press
        config = replace(config, tasks_per_step=16, group_size=16)
    config.save(tmp_path / "config.json")
    environment = os.environ | {"MARKER": f"ctrl-{os.getpid()}-{presses}"}
    command = [sys.executable, "train.py", "--resume", str(tmp_path)]
    with open(tmp_path / "stderr", "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=file)
    wait_until(lambda: checkpoint.latest(tmp_path / "echo"))
    process.send_signal(number)
    wait_until(lambda: "ends after this step" in (tmp_path / "stderr").read_text())
    if presses == 2:
        process.send_signal(number)
    process.wait(timeout=60)
    said = (tmp_path / "stderr").read_text()
    assert process.returncode == 1 and "ends after this step" in said and "--resume" in said
    assert "Traceback" not in said and not list(tmp_path.rglob("*.tmp"))
    steps = checkpoint.latest(tmp_path / "echo")[0]
    if presses == 1:  # saved although no checkpoint was due
        assert f"train.py: ended after step {steps}, as you asked; what is saved stays" in said and steps > 0
    else:
        assert "train.py: interrupted; what is saved stays" in said and steps < 400
    assert wait_for_count(environment["MARKER"], 0) == 0


def test_two_runs_in_one_folder(tmp_path):
    with checkpoint.only_writer(tmp_path), pytest.raises(ValueError, match="another process is writing"):
        train.main(SMALL, tmp_path)
    (tmp_path / "base.tmp").mkdir()
    (tmp_path / "config.json.tmp").write_text("{")
    with checkpoint.only_writer(tmp_path):
        assert not list(tmp_path.glob("*.tmp"))
