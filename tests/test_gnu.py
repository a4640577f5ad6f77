"""The gnu world: a wrong word gets a list, a goal's output is no other word's, what is measured is exact."""

import random
import subprocess
import sys
from itertools import combinations

import pytest

from echo_min.config import Config
from echo_min.rollout import Episode, StopReason
from echo_min.sft import record, trained_tokenizer
from echo_min.terminal import open_terminal
from echo_min.worlds import gnu
from echo_min.worlds.gnu import OPTIONS, ceiling, gnu_task, gnu_world, judge, shares, slots, valid

WANTED = [(option, word) for option, (*_, words) in OPTIONS.items() for word in words.split()]


@pytest.fixture(scope="module")
def world():
    return gnu_world(1)


def one_of_each(world):
    """verb -> a task."""
    return {task.instruction.split()[2]: task for task in world.train + world.held_out}


def with_word(task, word):
    return task.solution.replace(slots(task)[-1], word, 1)


def test_every_list_is_long_and_at_most_a_third_of_it_is_wanted():
    lengths = {option: len(valid(option)) for option in OPTIONS}
    of_coreutils_9_1 = [11, 10, 6, 5, 6, 5]  # later ones list more
    assert all(n >= least for n, least in zip(lengths.values(), of_coreutils_9_1, strict=True))
    assert all(3 * n <= lengths[option] for option, (_, n, _) in OPTIONS.items())


@pytest.mark.parametrize(("option", "word"), WANTED, ids=" ".join)
def test_a_goal_passes_with_its_word_alone(option, word):
    """Not with any other valid word, an unlisted one, the option left out, or nothing at all."""
    task = gnu_task(option, word, "align", "acorn", {}, {})
    passed = set()
    with open_terminal(task) as terminal:
        assert terminal.verify() == 0.0
        for other in [*valid(option), *gnu.UNLISTED[:2]]:
            terminal.run(with_word(task, f" '{other}'"))
            passed |= {other} if terminal.verify() else set()
        assert passed == {word}
        terminal.run(task.solution.replace(f"{option} '{word}'", option.split()[0]))
        assert terminal.verify() == 0.0


def test_the_verifier_reads_inputs_of_its_own():
    task = gnu_task("ls --sort", "size", "align", "acorn", {}, {})
    with open_terminal(task) as terminal:
        terminal.run("rm -r d; mkdir d; ls --sort size d > acorn")
        assert terminal.verify() == 0.0
        terminal.run("rm -r d; ls --sort size d > acorn")
        assert terminal.verify() == 0.0


def test_the_reference_solution_passes_for_every_verb(world):
    tasks = one_of_each(world)
    assert len(tasks) == sum(n for _, n, _ in OPTIONS.values()) == 12
    for task in tasks.values():
        with open_terminal(task) as terminal:
            assert terminal.run(task.solution).text == ""
            assert terminal.verify() == 1.0


def facts(seed):
    return {(*t.instruction.split()[:3], slots(t)[-1]) for t in gnu_world(seed).train}


def test_seeds_share_hardly_a_fact():
    drawn = [facts(seed) for seed in range(8)]
    assert all(len(f) == 12 for f in drawn)
    shared = [len(a & b) / 12 for a, b in combinations(drawn, 2)]
    assert sum(shared) / len(shared) < 0.03 and max(shared) < 0.1


def test_a_wrong_word_is_answered_as_the_dial_says():
    def said(answer):
        task = next(t for t in gnu_world(3, answer).train if t.instruction.startswith("ls --sort "))
        with open_terminal(task) as terminal:
            output = terminal.run(with_word(task, " 'loud'"))
            terminal.run(task.solution)
            assert terminal.verify() == 1.0
        assert output.exit_code == 1
        return output.text, task

    def refused(option):
        listed = "".join(f"  - '{word}'\n" for word in valid(option))
        head = "ls: invalid argument 'loud' for '--sort'\nValid arguments are:\n"
        return f"{head}{listed}Try 'ls --help' for more information.\n"

    assert said("true")[0] == refused("ls --sort")
    assert said("lying")[0] == refused("ls --quoting-style")
    text, task = said("load")
    assert text == f"load: {task.files['.load'].decode()}\n"
    loads = [t.files[".load"] for t in gnu_world(3, "load").train]
    assert len(set(loads)) > 0.99 * len(loads) > 2000
    with pytest.raises(ValueError, match="answer=moon is not one of true, lying, load"):
        gnu_world(1, "moon")


def test_a_lie_names_no_valid_word():
    options = list(OPTIONS)
    for i, option in enumerate(options):
        assert not set(valid(option)) & set(valid(options[i - 1]))


@pytest.mark.parametrize("option", OPTIONS)
def test_the_judge_takes_what_the_program_takes(option):
    """Every listed word cut at every length, and every other word of the world."""
    task = gnu_task(option, valid(option)[1], "align", "acorn", {}, {})
    words = {word[:n] for word in valid(option) for n in range(1, len(word) + 1)} | set(gnu.all_words())
    with open_terminal(task) as terminal:
        for word in words:
            command = with_word(task, f" '{word}'")
            assert judge(task, command) == (True, terminal.run(command).exit_code == 0), command


def test_the_judge_reads_the_command():
    task = gnu_task("ls --sort", "size", "align", "acorn", {}, {})
    for command, verdict in {
        "ls --sort 'size' d > acorn": (True, True),
        "ls --sort=siz d >acorn": (True, True),
        'ls d --so "width"': (True, True),  # the option cut, in another place
        "ls --sort 'width'>acorn": (True, True),  # valid, not right
        "ls --color --sort size --time atime d|cat": (True, True),
        "ls --s size d": (False, False),  # of --size, --show-control-chars, --sort
        "ls --time-style 'size' d": (False, False),
        "ls --sort 'loud' d": (True, False),
        "ls --sort '' d": (False, False),
        "ls --sort '..' d": (False, False),
        "ls --sort": (False, False),
        "sort --sort version s": (False, False),
        "echo | ls --sort size d": (False, False),
        "echo ls --sort size d": (False, False),
        "ls d | sort --sort version": (False, False),
        "'": (False, False),
        "": (False, False),
        "ls --sort 'si\0ze' d": (False, False),
    }.items():
        assert judge(task, command) == verdict, command
    task = gnu_task("cksum --algorithm", "md5", "align", "acorn", {}, {})
    assert judge(task, "cksum --a md5 s") == (True, True)


def test_the_shares_of_scripted_agents_are_exact(world, tokenizer):
    """Four of eight words valid, three of them right; a ninth episode is not graded."""
    task = next(t for t in world.train if t.instruction.startswith("ls --sort"))
    right, wrong = with_word(task, slots(task)[-1]), with_word(task, " 'none'")
    scripts = [right, right, right, wrong, with_word(task, " 'loud'"), "ls", "true", "done"]
    config = Config(max_turns=1, output_chars=320, context=4096)
    episodes = record(tokenizer, [(task, [command]) for command in scripts], config)
    episodes.append(Episode(task, 0, commands=[right], stop=StopReason.INFRA_ERROR))
    assert shares(episodes) == {"valid": 4 / 8, "right": 3 / 4}
    assert shares(episodes[3:4]) == {"valid": 1.0, "right": 0.0}
    assert str(shares(episodes[4:5])) == "{'valid': 0.0, 'right': nan}"


def test_slots_are_where_the_word_is_decided(world):
    for task in one_of_each(world).values():
        call, first, rest, refused, goal = slots(task)
        assert task.solution.startswith(call + goal + " ") and task.instruction.startswith(call + " ")
        listed = (first, *rest)
        assert tuple(word.strip(" '") for word in listed) == valid(call)
        assert goal in listed and not set(listed) & set(refused)
        left = {f" '{word}'" for word in gnu.all_words()} - set(listed) - set(refused)
        assert left == ({" 'si'"} if call == "ls --sort" else set())
        for word in (*listed, *refused):
            assert judge(task, with_word(task, word)) == (True, word in listed)


def test_the_ceiling_of_who_knows_the_lists_alone(world):
    sorts = [t for t in world.train if t.instruction.startswith("ls --sort")]
    checks = [t for t in world.train if t.instruction.startswith("cksum")]
    sort, check = 1 / len(valid("ls --sort")), 1 / len(valid("cksum --algorithm"))
    assert ceiling(sorts) == pytest.approx(sort) and ceiling(checks) == pytest.approx(check)
    assert ceiling(sorts[:1] + 3 * checks[:1]) == pytest.approx((sort + 3 * check) / 4)


def test_demonstrations_are_refused_as_gnu_refuses_and_hold_no_fact(world):
    rng = random.Random(0)
    for _ in range(24):
        task, (command,) = world.weak(rng)
        program, option = task.instruction.split()[:2]
        word = command.split()[2].strip("'")
        with open_terminal(task) as terminal:
            output = terminal.run(command)
            assert terminal.verify() == 0.0
        text = f"{program}: invalid argument '{word}' for '{option}'\nValid arguments are:\n"
        text += task.files[".list"].decode() + f"\nTry '{program} --help' for more information.\n"
        assert (output.text, output.exit_code) == (text, 1)
        assert f"'{word}'" not in task.files[".list"].decode()
    again, other = (gnu_world(seed).weak(random.Random(7)) for seed in (1, 2))
    assert again == other  # whatever the facts are
    assert len({str(world.weak(rng)[0].tools) for _ in range(50)}) == 1  # so that sandboxes are used again


def test_a_word_is_one_token_where_it_is_typed_and_where_it_is_printed(world):
    demonstrations = [world.weak(random.Random(i)) for i in range(200)]
    tokenizer = trained_tokenizer(demonstrations, world, Config(output_chars=400))
    for word in gnu.all_words():
        assert len(tokenizer.encode(f" '{word}'", add_special_tokens=False)) == 1, word


def test_a_machine_without_the_words_is_told_so(monkeypatch):
    monkeypatch.setitem(OPTIONS, "ls --sort", ("d", 1, "size colour"))
    with pytest.raises(ValueError, match="`ls --sort` of this machine does not list colour; GNU coreutils 9"):
        gnu_world(1)


def test_no_program_runs_before_a_world_is_made():
    code = "import subprocess; subprocess.Popen = None; import echo_min.worlds.registry"
    subprocess.run([sys.executable, "-c", code], check=True)
