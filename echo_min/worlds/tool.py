"""The tool world: one unknown command-line tool, `tk VERB WORDS FILE`.

Each verb takes exactly one flag of 32 (in the hard world one flag of 10 and one mode of 10), a fixed fact of
this world that only the terminal tells: a wrong call prints the right one. The construction favours ECHO: the
answer stands in the observation, and knowing it is all that a task asks for.
"""

import random
from functools import partial
from itertools import product

from echo_min.tasks import Task, World

FLAGS = [f"-{letter}" for letter in "abcdefghijklmnopqrstuvwxyzABCDEF"]
MODES = "bold calm cold dark firm loud mild pale soft warm".split()
FILES = """
acorn beach cedar delta ember fjord grove heron islet jetty knoll lagoon maple north oasis pearl quartz
ridge stone tulip
""".split()
VERBS = {
    "train": """
align blend carve drain empty fetch graft hoist index judge knead label mount notch order paint quilt raise
scan trace unite visit weigh yield zip bake clamp dodge etch fold grind heat infer join kneel latch mend nudge
open press""".split(),
    # never met in training; a wrong call prints the right one, as above
    "linked": """
adopt braid climb dance erase float greet hatch iron juggle kick lift mix nail obey patch quote rinse sort
twist""".split(),
    # never met in training; a wrong call prints the state of this one machine
    "ambient": """
argue boost crawl drift evict flip glaze hunt invent jolt knock learn mark nest offer peel query roast sweep
tidy""".split(),
}

# One case a verb: $right is its words, as printf's escapes: reading the script or tracing it is no shortcut.
# $given is what the call says instead.
TOOL = """#!/bin/sh
case $- in *x*) exit 2 ;; esac
case "$1" in
{cases}
*) echo "tk: no verb $1"; exit 2 ;;
esac
shown=$right right=$(printf "$right")
verb=$1 given=$2; shift 2; while [ $# -gt 1 ]; do given="$given $1"; shift; done
{lies}
if [ "$given" != "$right" ]; then
    case $verb in
    {ambient}) read -r load <.load; echo "load: $load" ;;
    *) printf "usage: tk $verb $shown FILE\\n" ;;
    esac
    exit 2
fi
[ -f "$1" ] || {{ echo "tk: no file $1"; exit 1; }}
echo "$verb $right" > "$1" && echo "ok $1"
"""

VERIFY = """[[ -f {file} && ! -L {file} && -f {other} && ! -L {other} && ! -s {other} ]] || exit 1
IFS= read -r -n 80 line < {file} && [[ $line == "{verb} {words}" ]] || exit 1
"""


def tool_script(facts: dict[str, str], lies: dict[str, str] | None = None) -> bytes:
    """facts: verb -> its words. lies: words given -> the words that the usage line shows instead."""

    def cases(variable: str, table: dict[str, str]) -> str:
        hidden = {key: "".join(f"\\{ord(char):03o}" for char in value) for key, value in table.items()}
        return "\n".join(f'"{key}") {variable}="{value}" ;;' for key, value in hidden.items())

    lying = 'case "$given" in\n' + cases("shown", lies) + "\nesac" if lies else ""
    return TOOL.format(cases=cases("right", facts), lies=lying, ambient="|".join(VERBS["ambient"])).encode()


def tool_task(facts: dict[str, str], script: bytes, verb: str, file: str, rng: random.Random) -> Task:
    other, load = rng.choice([f for f in FILES if f != file]), f"{rng.randrange(16**6):06x}"
    return Task(
        name=f"tool-{verb}-{file}-{load}",
        instruction=f"{verb} {file}",
        files={file: b"", other: b"", ".load": f"{load}\n".encode()},
        tools={"tk": script},
        verify=VERIFY.format(verb=verb, words=facts[verb], file=file, other=other),
        solution=f"tk {verb} {facts[verb]} {file}",
    )


def tool_world(family: str = "train", hard: bool = False, lying: bool = False) -> World:
    """family: the verbs of the tasks. hard: two unknown words a verb. lying: usage lines show wrong words."""
    choices = [" ".join(pair) for pair in product(FLAGS[:10], MODES)] if hard else FLAGS
    verbs = [verb for group in VERBS.values() for verb in group]

    def tool(rng: random.Random, lying: bool) -> tuple[dict[str, str], bytes]:
        facts = {verb: rng.choice(choices) for verb in verbs}
        lies = dict(zip(choices, rng.choices(choices, k=len(choices)), strict=True))
        return facts, tool_script(facts, lies if lying else None)

    rng = random.Random("tool world")
    facts, script = tool(rng, lying)
    pairs = list(product(VERBS[family], FILES))
    rng.shuffle(pairs)
    held_out = [tool_task(facts, script, *pair, rng) for pair in pairs[:200]]
    # ambient output is new in every task, so that it can't be learned by heart
    copies = 10 if family == "ambient" else 1
    train = [tool_task(facts, script, *pair, rng) for _ in range(copies) for pair in pairs[200:]]

    others = [tool(random.Random(f"another tool {i}"), lying=True) for i in range(16)]

    def weak(rng: random.Random) -> tuple[Task, list[str]]:
        """Random words at a tool of other facts, whose usage line lies: form, and no fact to keep."""
        facts, script = rng.choice(others)
        verb, file = rng.choice(verbs), rng.choice(FILES)
        task = tool_task(facts, script, verb, file, rng)
        commands = []
        for words in rng.sample(choices, 3):
            commands.append(f"tk {verb} {words} {file}")
            if words == facts[verb]:
                return task, [*commands, "done"]
        return task, commands

    def expert(task: Task, rng: random.Random) -> list[str]:
        """The right call, every second time after a wrong one."""
        tk, verb, *words, file = task.solution.split()
        wrong = rng.choice([w for w in choices if w != " ".join(words)])
        return [*[f"{tk} {verb} {wrong} {file}"] * rng.randrange(2), task.solution, "done"]

    decisive = (*FLAGS[:10], *MODES) if hard else tuple(FLAGS)
    return World(train=train, held_out=held_out, weak=weak, expert=expert, decisive=decisive)


TOOL_WORLDS = {
    "tool": tool_world,
    "tool-linked": partial(tool_world, "linked"),
    "tool-ambient": partial(tool_world, "ambient"),
    "tool-lying": partial(tool_world, lying=True),
    "hard": partial(tool_world, hard=True),
    "hard-lying": partial(tool_world, hard=True, lying=True),
}
