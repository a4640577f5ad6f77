"""What every terminal promises, at its limits, in the sandbox."""

from dataclasses import replace

import pytest

from echo_min.limits import Limits
from echo_min.tasks import Task
from echo_min.terminal import BACKENDS, COMMAND_BYTES, GRACE_SECONDS, Output, open_terminal

TASK = Task("t", "", "[[ -f done ]] || exit 1", "", {"a": b"one\n"})


def output(command, timeout=None, chars=50_000, task=TASK):
    with open_terminal(task, output_chars=chars) as terminal:
        return terminal.run(command, timeout)


def test_what_a_command_printed_and_how_it_ended():
    assert output("cat a; echo two >&2; exit 7") == Output("one\ntwo\n", 7, False, False)
    assert output("true") == Output("", 0, False, False)


def test_a_command_that_no_shell_could_be_given():
    refused = Output("bash: the command holds a NUL byte or is too long\n", 126, False, False)
    fits = "true #" + "x" * (COMMAND_BYTES - 1 - len("true #"))
    assert output(fits) == Output("", 0, False, False)
    assert output(fits + "x") == refused == output("echo a\0b") == output("\0")
    half = "true #" + "é" * (COMMAND_BYTES // 2)  # bytes are counted, not characters
    assert output(half) == refused
    assert output("echo '\ud800'").text == "?\n"  # it has no bytes


@pytest.mark.parametrize("chars", [1, 3, 4, 160])
def test_exactly_as_many_characters_as_may_be_shown(chars):
    def printed(n, byte="x"):
        return output(f"printf '%.0s{byte}' $(seq {n})", chars=chars)

    for byte in ("x", "🙂"):
        assert printed(chars, byte) == Output(byte * chars, 0, False, False)
        assert printed(chars + 1, byte) == Output(byte * chars, 0, False, True)
        assert printed(50 * chars + 100, byte) == Output(byte * chars, 0, False, True)


def test_time_limits():
    task = replace(TASK, limits=Limits(command_seconds=0.3))
    with open_terminal(task) as terminal:
        assert terminal.run("echo early; sleep 60") == Output("early\n", 124, True, False)
        assert terminal.run("sleep 0.6; echo late", 30) == Output("late\n", 0, False, False)
        assert terminal.run("sleep 60", 0.2) == Output("", 124, True, False)
        assert terminal.run("echo next", 5).text == "next\n"
        assert terminal.run("exit 124", 5) == Output("", 124, False, False)
    assert GRACE_SECONDS > 1  # a crowded machine is not a dead terminal


def test_a_terminal_says_whether_the_task_is_done():
    with open_terminal(TASK) as terminal:
        assert terminal.verify() == 0.0
    with open_terminal(TASK) as terminal:
        terminal.run("touch done")
        assert terminal.verify() == 1.0


@pytest.mark.parametrize("name", ["", "/etc/x", "../x", "a/../../x", "a\0b"])
@pytest.mark.parametrize("kind", ["files", "tools"])
def test_files_that_would_lie_elsewhere_are_refused(name, kind):
    with pytest.raises(ValueError, match=r"task t: file .* must have a path below the work folder"):
        open_terminal(replace(TASK, **{kind: {name: b""}}))


def test_which_backends_there_are():
    assert list(BACKENDS) == ["sandbox", "docker"]
    with pytest.raises(ValueError, match="backend: 'podman' does not exist; there is sandbox, docker"):
        open_terminal(TASK, "podman")
    with pytest.raises(ValueError, match="task t asks for a container of its own: --backend docker"):
        open_terminal(replace(TASK, environment=object()))


def test_a_tasks_limits_unless_it_says_others():
    assert Limits() == Limits(5.0, 60.0, 5.0, 256, 16, 32)
    assert Task("t", "", "", "") == Task("t", "", "", "", {}, {}, Limits(), None)
