"""The code's own measures: how long it is, and how little of it a training run loads."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILE, FUNCTION, COLUMNS, CORE, LIBRARY = 260, 45, 110, 1250, 3900  # at most, lines but for COLUMNS
NOT_OURS = ".venv", ".venv-vllm", "runs", "build", ".git"
FILES = [p for p in sorted(ROOT.rglob("*.py")) if not set(p.relative_to(ROOT).parts) & set(NOT_OURS)]
IN_LIBRARY = [ROOT / "train.py", ROOT / "eval.py", *sorted((ROOT / "echo_min").rglob("*.py"))]
IN_LIBRARY += [ROOT / "kernels" / "segment_logprob.py", ROOT / "kernels" / "logit_rows.py"]


def lines(path):
    return len(path.read_text().splitlines())


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def test_files_are_short():
    assert len(FILES) > 50 and len(IN_LIBRARY) > 25
    long = [p for p in FILES if lines(p) > FILE and p.relative_to(ROOT).parts[0] != "tests"]
    assert not names(long)


def test_functions_are_short():
    long = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            if function and node.end_lineno - node.lineno + 1 > FUNCTION:
                long.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert not long


def test_lines_are_short():
    def width(path):
        return max((len(line.partition("  # noqa")[0]) for line in path.read_text().splitlines()), default=0)

    assert not names(path for path in FILES if width(path) > COLUMNS)


def run(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_training_loads_nothing_that_it_does_not_need():
    loaded = set(run("import sys, train; print(*sys.modules)").split())
    assert {"torch", "echo_min.rollout", "echo_min.sampler"} <= loaded
    apart = {"echo_min.worlds.harbor", "echo_min.estimate", "echo_min.terminals.docker", "eval"}
    apart |= {"docker", "matplotlib", "trl", "liger_kernel", "figures", "vllm", "echo_min.sampler_vllm"}
    assert not {name for name in loaded if name in apart or name.partition(".")[0] in apart}


def test_a_wrong_flag_needs_no_torch():
    assert "torch" not in run("import sys; from echo_min import cli; print(*sys.modules)").split()


@pytest.fixture(scope="module")
def core():
    """What tests/one_step.py prints: file -> lines, and their sum."""
    command = [sys.executable, "tests/one_step.py"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    found = {name: int(count) for count, name in re.findall(r"^ *(\d+)  (\S+)$", out, re.MULTILINE)}
    return found, int(re.search(r"^total (\d+)$", out, re.MULTILINE)[1])


def test_what_a_training_step_enters_can_be_read_in_an_evening(core):
    found, total = core
    assert total == sum(lines(ROOT / name) for name in found) <= CORE
    core = """batch config echo grpo harness limits masking optimizer policy ranks rollout sampler tasks
        terminal""".split()
    assert set(found) == {"train.py", *(f"echo_min/{name}.py" for name in core)}
