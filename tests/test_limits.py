"""What an episode may take: limits that make sense, that the host grants, and that hold against the agent."""

import math
import time
from dataclasses import fields

import pytest

from echo_min.tasks import Limits, Task
from echo_min.terminal import open_terminal


def make_task(limits=None, **given):
    limits = limits or Limits(command_seconds=10, work_mb=16)
    given = {"verify": "exit 1"} | given
    return Task(name="sample", instruction="", solution="", limits=limits, **given)


@pytest.mark.parametrize("field", [field.name for field in fields(Limits)])
@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, "5", None, True])
def test_a_limit_is_a_number_above_0(field, value):
    with pytest.raises(ValueError, match=f"{field}: expected a (whole )?number above 0, got"):
        Limits(**{field: value})


@pytest.mark.parametrize("field", ["memory_mb", "work_mb", "processes"])
def test_some_are_whole_numbers(field):
    with pytest.raises(ValueError, match=f"{field}: expected a whole number above 0, got 16.0"):
        Limits(**{field: 16.0})


@pytest.mark.parametrize("processes", [1, 3])
def test_too_few_processes_for_a_command(processes):
    with pytest.raises(ValueError, match="processes: expected at least 4"):
        Limits(processes=processes)


def test_the_fewest_processes_will_do():
    with open_terminal(make_task(Limits(processes=4), verify="test $(cat x | wc -l) = 1")) as terminal:
        assert terminal.run("echo a | tee x").text == "a\n"
        assert terminal.verify() == 1.0


def test_a_time_limit_of_years():
    with open_terminal(make_task(Limits(command_seconds=1e9, agent_seconds=1e9))) as terminal:
        assert terminal.run("echo a").text == "a\n"


@pytest.mark.parametrize("size", [2000, 3000, 8_000_000])
def test_a_large_file(size, tmp_path):
    content = (bytes(range(256)) * 40_000)[:size]
    (tmp_path / "again").write_bytes(content)
    started = time.monotonic()
    with open_terminal(make_task(files={"a file": content, "d/e": b"x"})) as terminal:
        assert terminal.run("stat -c %s 'a file' d/e; rm 'a file'").text == f"{size}\n1\n"
        terminal.copy_in(tmp_path, "/work/d")
        terminal.run("cp d/again a")
        assert terminal.run("sha1sum <d/again; stat -c %s d/again").text.endswith(f"-\n{size}\n")
    assert time.monotonic() - started < 5


def test_files_that_do_not_fit_are_no_orders():
    with pytest.raises(ValueError, match="files exceed work_mb"):
        open_terminal(make_task(files={"x": b"\0late\0start\0" * 2_000_000}))


@pytest.mark.parametrize("size", [200, 200_000])
def test_a_long_verifier(size):
    verify = f": {'a' * size}\nread -r x && exit 7\n[[ -e done ]] || exit 1"
    with open_terminal(make_task(verify=verify)) as terminal:
        assert terminal.verify() == 0.0
        terminal.run("touch done")
        assert terminal.verify() == 1.0
