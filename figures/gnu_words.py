"""What a policy knows of the words in world gnu: which are valid, as the terminal tells; which is right."""

import re

from echo_min.tasks import Task
from echo_min.worlds.gnu import all_words, refusal, valid


def option_of(task: Task) -> str:
    return " ".join(task.instruction.split()[:2])


def judge(task: Task, command: str) -> tuple[bool, bool]:
    """-> whether it calls the task's program with the task's option; whether it does so with a valid word.

    Both may be cut as far as the program itself accepts. Of a pipeline the first program counts.
    """
    program, option = option_of(task).split()
    arguments = re.match(rf"\s*{program}(\s[^|;&]*)", command)
    given = r"(?<=\s)(--[\w-]+)(?=(?:=|\s+)(['\"]?)([\w-]+)\2(?:[\s>]|$))"
    for cut, _, word in re.findall(given, arguments[1], re.ASCII) if arguments else []:
        if option.startswith(cut) and f" for '{option}'\n" in refusal(program, cut, "?"):
            return True, not refusal(program, option, word)
    return False, False


def shares(episodes: list) -> dict[str, float]:
    """valid: share of episodes whose last command has a valid word. right: of those, what passed.

    episodes: rollout.py's; those that no loss reads do not count, one at least does. right of none: nan.
    """
    episodes = [e for e in episodes if e.valid]
    rewards = [e.reward for e in episodes if e.commands and judge(e.task, e.commands[-1])[1]]
    right = sum(rewards) / len(rewards) if rewards else float("nan")
    return {"valid": len(rewards) / len(episodes), "right": right}


def slots(task: Task) -> tuple[str, str, tuple[str, ...], tuple[str, ...], str]:
    """-> a right call up to its word, first word listed, the others listed, all that are refused, the goal.

    Words come as they are typed, quoted and after a space: call + word begins a command. The goal is in the
    list. In neither group: what the program takes as a listed word cut short (si for size).
    """
    option = option_of(task)
    first, *rest = (f" '{word}'" for word in valid(option))
    refused = tuple(f" '{word}'" for word in all_words() if refusal(*option.split(), word))
    return option, first, tuple(rest), refused, re.search(" '.+?'", task.solution)[0]


def ceiling(tasks: list[Task]) -> float:
    """The pass rate of who knows the lists and nothing else."""
    return sum(1 / len(valid(option_of(task))) for task in tasks) / len(tasks)
