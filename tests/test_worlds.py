"""Every family: the reference solution passes; doing nothing, touching every file or a constant answer
fails."""

import random
import re

import pytest

from echo_min.terminal import open_terminal
from echo_min.worlds.registry import WORLDS, load_world
from echo_min.worlds.tool import TOOL_WORLDS


def grade(task, *commands):
    with open_terminal(task) as terminal:
        for command in commands:
            terminal.run(command)
        return terminal.verify()


@pytest.fixture(params=WORLDS)
def world(request):
    return load_world(request.param)


def some(world, n=8):
    return random.Random(0).sample(world.train + world.held_out, n)


def test_train_and_held_out_tasks_are_disjoint_and_reproducible(world):
    names = [t.name for t in world.train + world.held_out]
    assert len(set(names)) == len(names)
    assert len(world.held_out) >= 200
    train, held_out = ({f"{t.instruction} {t.files}" for t in ts} for ts in (world.train, world.held_out))
    assert not train & held_out


def test_the_reference_solution_passes(world):
    assert all(grade(task, task.solution) == 1.0 for task in some(world, 16))


@pytest.mark.parametrize(
    "commands",
    [
        [],
        ["for f in *; do touch $f; done"],
        ["for f in *; do echo done > $f; done"],
        ["for f in *; do echo align -a > $f; done"],
        ["rm -rf ./*"],
        ["for f in *; do rm $f; ln -s /etc/passwd $f; done"],
        ["for f in *; do rm $f; mkfifo $f; done"],
        ["for f in *; do rm $f; mkdir $f; done"],
        ["exit 0"],
    ],
    ids=lambda commands: commands[0][:30] if commands else "nothing",
)
def test_agents_that_know_nothing_fail(world, commands):
    assert all(grade(task, *commands) == 0.0 for task in some(world, 4))


def test_the_right_answer_in_every_file_fails(world):
    for task in some(world, 4):
        everywhere = 'cat * > /tmp/all; for f in *; do cp /tmp/all "$f"; done'
        assert grade(task, task.solution, everywhere) == 0.0


def test_another_tasks_solution_fails(world):
    first, second = some(world, 2)
    assert grade(first, second.solution) == 0.0


def test_the_expert_passes(world):
    for task in some(world, 4):
        commands = world.expert(task, random.Random(0))
        with open_terminal(task) as terminal:
            outputs = [terminal.run(c) for c in commands if c != "done"]
            assert outputs[-1].exit_code == 0
            assert terminal.verify() == 1.0


def test_what_a_wrong_call_prints():
    def wrong(name, which=0):
        task = [t for t in load_world(name).train if " -a " not in t.solution][which]
        with open_terminal(task) as terminal:
            _, verb, *words, file = task.solution.split()
            return terminal.run(f"tk {verb} {' '.join(['-a', 'bold'][: len(words)])} {file}").text, task

    for name in ("tool", "tool-linked", "hard"):
        text, task = wrong(name)
        assert text == f"usage: {task.solution.rsplit(' ', 1)[0]} FILE\n"
    text, task = wrong("tool-lying")
    assert text.startswith("usage: tk ") and text != f"usage: {task.solution.rsplit(' ', 1)[0]} FILE\n"
    first, second = wrong("tool-ambient")[0], wrong("tool-ambient", 1)[0]
    assert first.startswith("load: ") and first != second


def test_weak_demonstrations_are_weak(world):
    rng = random.Random(0)
    rewards = []
    for _ in range(64):
        task, commands = world.weak(rng)
        rewards.append(grade(task, *[c for c in commands if c != "done"]))
    assert 0 < sum(rewards) / len(rewards) < 0.55  # of the tool worlds under 0.1


def test_an_unknown_world_names_those_that_exist():
    with pytest.raises(ValueError, match="world:tool"):
        load_world("moon")


def test_a_file_that_holds_more_than_the_word_fails():
    for task in load_world("file").train[:40]:
        kind, word = task.instruction.split()
        if kind == "copy":
            assert grade(task, task.solution, f"printf '{word}\\n' >out") == 1.0
            for more in ("\\0", "\\0anything", "x", " x"):
                assert grade(task, task.solution, f"printf '{word}\\n{more}' >out") == 0.0


@pytest.mark.parametrize("name", TOOL_WORLDS)
def test_the_facts_are_not_in_plain_sight(name):
    task = load_world(name).train[0]
    verb, *words, file = task.solution.split()[1:]
    with open_terminal(task) as terminal:
        lines = terminal.run("cat /opt/tools/tk").text.splitlines()
        lines = [line for line in lines if verb in line]
        for shell in ("sh -x", "bash -x"):
            lines += terminal.run(f"{shell} /opt/tools/tk {verb} -? {file}").text.splitlines()
        assert not any(word in re.findall(r"[-\w]+", line) for word in words for line in lines), lines
        assert terminal.run(task.solution).text == f"ok {file}\n"
