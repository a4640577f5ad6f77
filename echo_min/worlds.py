"""Generated tasks: small families with a real verifier, a reference solution, and two scripted agents.

The weak agent's demonstrations teach a base policy the form of the world and none of its facts. The expert's
trajectories are never trained on; observation CE is measured on them.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from echo_min.tasks import Task


@dataclass(frozen=True)
class World:
    """train and held_out share no task. An agent's script is the commands it types, whatever it sees."""

    train: list[Task]
    held_out: list[Task]
    weak: Callable[[random.Random], tuple[Task, list[str]]]  # a fresh demonstration
    expert: Callable[[Task, random.Random], list[str]]


# ---- the tool world: one unknown command-line tool, `tk VERB FLAG FILE` ----
# Each verb takes exactly one of 32 flags, a fixed fact that only the terminal tells: a wrong flag prints the
# right one. The construction favours ECHO: the answer stands in the observation.

VERBS = """
align blend carve drain empty fetch graft hoist index judge knead label mount notch order paint quilt
raise scan trace unite visit weigh yield zip bake clamp dodge etch fold grind heat infer join kneel
latch mend nudge open press
""".split()
FLAGS = [f"-{letter}" for letter in "abcdefghijklmnopqrstuvwxyzABCDEF"]
FILES = """
acorn beach cedar delta ember fjord grove heron islet jetty knoll lagoon maple north oasis pearl quartz
ridge stone tulip
""".split()

TOOL = """#!/bin/sh
case "$1" in
{cases}
*) echo "tk: no verb $1"; exit 2 ;;
esac
{shown}
[ $# = 3 ] && [ "$2" = "$flag" ] || {{ echo "usage: tk $1 $shown FILE"; exit 2; }}
[ -f "$3" ] || {{ echo "tk: no file $3"; exit 1; }}
echo "$1 $2" > "$3" && echo "ok $3"
"""

VERIFY = """[[ -f {file} && ! -L {file} && -f {other} && ! -L {other} && ! -s {other} ]] || exit 1
IFS= read -r -n 80 line < {file} && [[ $line == "{verb} {flag}" ]] || exit 1
"""


def tool_script(facts: dict[str, str], lies: dict[str, str] | None = None) -> bytes:
    """facts: verb -> its flag. lies: given flag -> the flag that the usage line shows, not the right one."""

    def cases(variable: str, table: dict[str, str]) -> str:
        return "\n".join(f"{key}) {variable}={value} ;;" for key, value in table.items())

    shown = 'case "$2" in\n' + cases("shown", lies) + "\nesac" if lies else "shown=$flag"
    return TOOL.format(cases=cases("flag", facts), shown=shown).encode()


def tool_task(facts: dict[str, str], script: bytes, verb: str, file: str, other: str) -> Task:
    return Task(
        name=f"tool-{verb}-{file}",
        instruction=f"{verb} {file}",
        files={file: b"", other: b""},
        tools={"tk": script},
        verify=VERIFY.format(verb=verb, flag=facts[verb], file=file, other=other),
        solution=f"tk {verb} {facts[verb]} {file}",
    )


def tool_world() -> World:
    rng = random.Random("tool world")
    facts = {verb: rng.choice(FLAGS) for verb in VERBS}
    script = tool_script(facts)
    pairs = [(verb, file) for verb in VERBS for file in FILES]
    rng.shuffle(pairs)
    tasks = [tool_task(facts, script, v, f, rng.choice([x for x in FILES if x != f])) for v, f in pairs]

    def weak(rng: random.Random) -> tuple[Task, list[str]]:
        """Random flags at a tool of its own facts, whose usage line lies: form, and no fact to keep."""
        own = {verb: rng.choice(FLAGS) for verb in VERBS}
        lies = dict(zip(FLAGS, rng.choices(FLAGS, k=len(FLAGS)), strict=True))
        verb, (file, other) = rng.choice(VERBS), rng.sample(FILES, 2)
        task = tool_task(own, tool_script(own, lies), verb, file, other)
        commands = []
        for flag in rng.sample(FLAGS, 3):
            commands.append(f"tk {verb} {flag} {file}")
            if flag == own[verb]:
                return task, [*commands, "done"]
        return task, commands

    def expert(task: Task, rng: random.Random) -> list[str]:
        """One wrong try, whose usage line tells the flag, then the right call."""
        tk, verb, flag, file = task.solution.split()
        wrong = rng.choice([f for f in FLAGS if f != flag])
        return [f"{tk} {verb} {wrong} {file}", task.solution, "done"]

    return World(train=tasks[200:], held_out=tasks[:200], weak=weak, expert=expert)


WORLDS = {"tool": tool_world}


def load_world(name: str) -> World:
    """Raises ValueError for an unknown name."""
    if name not in WORLDS:
        raise ValueError(f"world:{name} does not exist; there is {', '.join(f'world:{n}' for n in WORLDS)}")
    return WORLDS[name]()
