"""The filter world: real filters, and `out` alone decides. And the world that the README writes."""

import random
import re
from pathlib import Path

import pytest

from echo_min.terminal import open_terminal
from echo_min.worlds import filter as filters
from echo_min.worlds.filter import CALL, FILTERS, filter_task, filter_world


@pytest.fixture(scope="module")
def world():
    return filter_world(1)


@pytest.mark.parametrize("lines", ["fig ash ash dew", "log log log log", "cob elk bay bay"])
def test_the_filters_are_the_programs_and_the_terminal_prints_what_they_made(lines):
    lines = lines.split()
    for name, made in FILTERS.items():
        with open_terminal(filter_task(lines, name, lines)) as terminal:
            assert terminal.verify() == 0.0
            assert terminal.run(CALL.format(name)).text == "".join(f"{line}\n" for line in made(lines)), name
            assert terminal.verify() == 1.0


def test_any_command_passes_that_leaves_what_is_wanted_and_no_more():
    task = filter_task("fig ash ash dew".split(), "sort", "fig ash ash dew".split())
    for command, reward in {
        "sort -r f | tac > out": 1.0,
        "printf 'ash\\nash\\ndew\\nfig\\n' > out": 1.0,
        "printf 'ash\\nash\\ndew\\nfig' > out": 0.0,
        "sort f > out; echo >> out": 0.0,
        "sort f > out; yes >> out & sleep 0.05; kill $!": 0.0,
        "sort -u f > out": 0.0,
        "sort f > g; ln -s g out": 0.0,
        "mkdir out": 0.0,
        ": > out": 0.0,
    }.items():
        with open_terminal(task) as terminal:
            terminal.run(command)
            assert terminal.verify() == reward, command


def test_held_out_inputs_are_new(world):
    train, held_out = ([t.files["f"] for t in tasks] for tasks in (world.train, world.held_out))
    assert len(train) > 1200 and len(held_out) == 200
    assert len(set(train + held_out)) == len(train + held_out)
    others = {t.files["f"] for t in filter_world(2).held_out}
    assert len(others & set(held_out)) < 20  # drawn by the seed


def test_the_chance_of_a_random_filter():
    assert len(FILTERS) == 22
    for seed in range(3):
        world, chances = filter_world(seed), []
        for task in world.train + world.held_out:
            lines, wanted = (part.split() for part in task.instruction.split(" : "))
            right = [CALL.format(name) for name, made in FILTERS.items() if made(lines) == wanted]
            assert task.solution in right
            chances.append(len(right) / len(FILTERS))
        assert sum(chances) / len(chances) == pytest.approx(0.0755, abs=0.002)


def test_demonstrations_are_of_other_words(world):
    rng = random.Random(0)
    for _ in range(16):
        task, (command,) = world.weak(rng)
        lines = task.instruction.split(" : ")[0].split()
        assert task.files["f"].decode().split() != lines
        with open_terminal(task) as terminal:
            output = terminal.run(command)
            assert output.exit_code == 0
            assert set(output.text.split()) <= set(task.files["f"].decode().split())
    assert filter_world(1).weak(random.Random(3)) == filter_world(2).weak(random.Random(3))
    assert set(world.telling) == set(filters.WORDS)


def test_the_world_in_the_readme_works():
    readme = Path("echo_min/worlds/README.md").read_text()
    (block,) = re.findall(r"```python\n(.+?)```", readme, re.DOTALL)
    assert len(block.splitlines()) <= 25
    names = {}
    exec(block, names)
    world = names["larger_world"](1)
    assert len(world.held_out) >= 200 and not set(world.held_out[0].files) & {"out"}
    assert not {t.name for t in world.train} & {t.name for t in world.held_out}
    rng, rewards = random.Random(0), []
    for task in world.held_out[:4]:
        with open_terminal(task) as terminal:
            assert terminal.verify() == 0.0
            for command in world.expert(task, rng)[:-1]:
                assert terminal.run(command).exit_code == 0
            assert terminal.verify() == 1.0
    for _ in range(16):
        task, commands = world.weak(rng)
        with open_terminal(task) as terminal:
            for command in commands:
                terminal.run(command)
            rewards.append(terminal.verify())
    assert 0 < sum(rewards) < 16
    assert [t.name for t in names["larger_world"](2).train] != [t.name for t in world.train]
