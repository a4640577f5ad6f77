"""figures/EXERCISES.md: every change and every command of it works as printed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from echo_min import report

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "figures" / "EXERCISES.md").read_text()


def exercises() -> list[tuple[str, str, list[str], list[str], list[str]]]:
    """(title, file or "", lines taken out, lines put in, words of the command), in the order of the page."""
    found = []
    for section in PAGE.split("\n## "):
        title, _, text = section.partition("\n")
        code = re.findall(r"^    (.*)$", text, re.MULTILINE)
        out, new = ([line[1:] for line in code if line.startswith(sign)] for sign in "-+")
        (command,) = [line for line in code if line.startswith("python ")]
        file = re.findall(r"In `(\S+)`", text) if out else [""]
        found.append((title, file[0], out, new, command.split()[1:]))
    return found


def changed(text: str, out: list[str], new: list[str]) -> str:
    assert text.count("\n".join(out)) == 1, f"to be taken out, but not there once: {out}"
    return text.replace("\n".join(out), "\n".join(new))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the code, in which the exercises leave their runs for those that come later."""
    copy = tmp_path_factory.mktemp("exercises") / "echo_min"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "data", "png"))
    return copy


def test_the_page_has_six_and_their_changes_fit():
    assert len(exercises()) == 7
    for title, file, out, new, _ in exercises():
        if file:
            assert changed((ROOT / file).read_text(), out, new), title


@pytest.mark.slow
@pytest.mark.parametrize("title, file, out, new, command", exercises(), ids=[e[0] for e in exercises()])
def test_as_printed(folder, title, file, out, new, command):
    path = folder / file
    if file:
        before = path.read_text()
        path.write_text(changed(before, out, new))
    try:
        options = {"cwd": folder, "env": os.environ | {"PYTHONPATH": str(folder), "TQDM_DISABLE": "1"}}
        subprocess.run([sys.executable, *command], **options, check=True, timeout=900)
    finally:
        if file:
            path.write_text(before)
    name = command[command.index("--name") + 1]
    lines = [line for line in report.read(folder / "runs" / name / "metrics.jsonl") if "pass_rate" in line]
    assert {line["step"] for line in lines} == {0, 25, 50, 75, 80}
