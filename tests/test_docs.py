"""The documents: lines of one screen, links that lead somewhere, and commands that work as printed."""

import ast
import re
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest

from echo_min import cli
from echo_min.config import Config
from echo_min.worlds.registry import load_world

ROOT = Path(__file__).parent.parent
OTHERS = "runs", "build"  # not ours to judge, as are hidden folders
PAGES = [
    page
    for page in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") or part in OTHERS for part in page.relative_to(ROOT).parts)
]
TARGETS = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def commands(text: str) -> list[str]:
    """Every `python ...` and `make ...` of the code blocks, fenced or indented, and of code within a line."""
    found, fenced = [], False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        code = [line] if fenced or line.startswith("    ") else re.findall("`([^`]+)`", line)
        parts = [part.strip() for c in code for part in re.split(r"&&|;|\$\(|\)|\s#", c)]
        parts = [re.sub(r"^(\w+=\S+ +)+", "", part) for part in parts]  # settings of the environment
        found += [part for part in parts if re.match(r"(python|make) ", part)]
    return found


def flags(script: Path) -> set[str]:
    """What its --help lists, read from its source: to run it takes seconds, or packages that are not here."""
    source, found = script.read_text(), {"-h", "--help"}
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument":
            found |= {arg.value for arg in call.args if isinstance(arg, ast.Constant)}
    if "common.main(" in source:
        found |= flags(ROOT / "figures" / "common.py")
    if "cli import eval_args" in source:
        found |= flags(ROOT / "echo_min" / "cli.py")
    if re.search(r"cli import parse_args|cli\.parse_args|cli\.run", source):
        found |= flags(ROOT / "echo_min" / "cli.py") | {f"--{f.name}" for f in fields(Config)}
    return found


def check(command: str) -> None:
    """Raises AssertionError, or what the program itself would raise."""
    program, *words = command.split()
    if program == "make":
        words = [word for word in words if "=" not in word]
        assert set(words) <= TARGETS, f"make has no {' '.join(set(words) - TARGETS)}"
        return
    name, *given = words
    if name == "-c":
        return
    if name == "-m":
        name, *given = given
        if name.split(".")[0] not in ("echo_min", "kernels", "tests"):
            assert find_spec(name), f"no module {name}"
            return
        name = name.replace(".", "/") + ".py"
    script = ROOT / name
    assert script.is_file(), f"no {name}"
    wrong = {word for word in given if word.startswith("-")} - flags(script)
    assert not wrong, f"{name} takes no {' '.join(wrong)}"
    if name in ("train.py", "echo_min/estimate.py") and not {"--resume", "--help"} & set(given):
        cli.parse_args([word for word in given if word != "..."])
    if name == "figures/controls.py" and (control := given[0]) != "NAME" and not control.startswith("-"):
        assert f'"{control}": ' in script.read_text().split("CONTROLS = {")[1], f"no control {control}"
    for world in re.findall(r"world:([a-z]\S*)", command):
        load_world(world, 1)


def test_there_are_pages():
    assert {"README.md", "LOG.md"} <= {page.name for page in PAGES} and "train" in TARGETS


@every_page
def test_lines_fit(page):
    if page.name != "LOG.md":  # a diary
        written = re.sub(r"(?s)<!-- \w+ -->\n.*?<!-- end -->", "", page.read_text())  # tables of the data
        lengths = enumerate(map(len, written.splitlines()), 1)
        assert not [f"line {number}: {length}" for number, length in lengths if length > 120]


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


@every_page
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    assert not [to for to in links if not re.match(r"\w+:", to) and not (page.parent / to).exists()]


@every_page
def test_commands_work_as_printed(page):
    if page.name != "LOG.md":  # what was typed then
        for command in commands(page.read_text()):
            check(command)


@pytest.mark.parametrize(
    "wrong",
    [
        "make nothing",
        "python nothing.py",
        "python -m echo_min.nothing",
        "python train.py --nothing 1",
        "python train.py --arms placebo",
        "python train.py --tasks world:nothing",
        "python eval.py CHECKPOINT --name x",
        "python figures/lambda_sweep.py --preset tiny",
        "python figures/controls.py nothing",
        "python figures/controls.py placebo --k 5",
        "python -m echo_min.estimate --preset tiny --k 5",
    ],
)
def test_a_wrong_command_is_noticed(wrong):
    text = f"As said:\n\n    make setup && A=1 {wrong}   # so\n"
    assert commands(text) == ["make setup", wrong] == commands(f"`make setup`, then `{wrong}`")
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        check(wrong)
