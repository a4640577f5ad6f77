"""`make gpu` where there is no GPU: it refuses; and how its parts are run, with parts that are made up."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "figures"))

import gpu  # noqa: E402

ABOUT = {"gpu": "none", "torch": "9"}


def run(tmp_path, parts):
    data = tmp_path / "gpu.jsonl"
    good = gpu.run_all({name: (limit, ["-c", code]) for name, (limit, code) in parts.items()}, data, ABOUT)
    return good, [json.loads(line) for line in data.read_text().splitlines()]


def test_a_failure_of_one_part_ends_no_other(tmp_path, capfd):
    good, lines = run(
        tmp_path,
        {
            "broken": (20, "print('| a | 1 |'); raise SystemExit('it broke')"),
            "lacking": (20, "import no_such_package"),
            "good": (20, "print('seen'); print('| b | 2 |')"),
        },
    )
    assert not good and [line["part"] for line in lines] == ["broken", "lacking", "good"]
    ended = [line["ended"] for line in lines]
    assert ended == ["failed: it broke", "needs the package no_such_package", "ok"]
    assert [line["rows"] for line in lines] == [["| a | 1 |"], [], ["| b | 2 |"]]
    assert all(line["torch"] == "9" and line["seconds"] < 20 for line in lines)
    text = capfd.readouterr().out
    assert "| good | ok |" in text and text.count("| b | 2 |") == 2 and text.count("seen") == 1


def test_a_part_ends_at_its_limit_with_all_that_it_started(tmp_path, capfd):
    code = "import subprocess; print('| a | 1 |', flush=True); subprocess.run(['sleep', '77.125'])"
    started = time.monotonic()
    good, (line, after) = run(tmp_path, {"slow": (5, code), "next": (20, "print('| c | 3 |')")})
    assert not good and time.monotonic() - started < 25
    assert line["ended"] == "ended at its limit of 5 s" and line["rows"] == ["| a | 1 |"]
    assert after["ended"] == "ok"
    assert "77.125" not in subprocess.run(["ps", "ax", "-o", "args"], capture_output=True, text=True).stdout


def test_rows_come_at_once():
    code = "import gpu; gpu.run_part('p', 60, ['-c', 'import time; print(\"| now |\"); time.sleep(50)'])"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "figures")}
    command = [sys.executable, "-u", "-c", code]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    started = time.monotonic()
    assert any(line == "| now |\n" for line in child.stdout)
    assert time.monotonic() - started < 40
    child.terminate()
    child.wait()


def test_without_a_gpu_it_refuses():
    done = subprocess.run([sys.executable, "figures/gpu.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert "needs an NVIDIA GPU" in done.stderr and "driver none" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_an_old_driver_is_named(monkeypatch):
    def old(*_, **__):
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040).\nMore.")

    monkeypatch.setattr("torch.zeros", old)
    monkeypatch.setattr(gpu, "driver", lambda: "550.54")
    assert "too old (found version 12040)" in gpu.refusal() and "driver 550.54" in gpu.refusal()
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "torch" in gpu.refusal()


def test_the_parts_take_ten_minutes_and_are_there():
    assert sum(limit for limit, _ in gpu.PARTS.values()) <= 600
    for _, (first, *rest) in gpu.PARTS.values():
        name = rest[0].replace(".", "/") + ".py" if first == "-m" else first
        assert name == "pytest.py" or (ROOT / name).is_file(), name


@pytest.mark.parametrize("choice, installs", [([], True), (["PY=python3"], False)])
def test_with_a_python_of_its_own_nothing_is_installed(choice, installs):
    command = ["make", "-n", "-B", "gpu", *choice]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert ("pip install" in said) == installs and "figures/gpu.py" in said


@pytest.mark.slow
def test_the_parts_that_are_programs_of_ours_run(monkeypatch, capsys):
    """On a CPU and at a toy size: that they run, not what they measure."""
    for name, value in {"DEVICE": "cpu", "QWEN": "tiny", "ROWS": 2, "PROMPT": 9, "REPLY": 5}.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 10**9)
    gpu.sampler()
    small = {"context": 32, "micro_batch_tokens": 64, "terminals": 2, "dtype": "bfloat16"}
    monkeypatch.setattr("echo_min.presets.PRESETS", {"qwen3_0_6b": small | {"gradient_checkpointing": True}})
    gpu.memory()
    said = capsys.readouterr().out
    assert said.count("| bfloat16, 2 rows |") == 1 and said.count("| tiny, update | 1.000 |") == 2
