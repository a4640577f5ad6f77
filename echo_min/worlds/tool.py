"""The tool world: one unknown command-line tool, `tk VERB WORDS FILE`.

Each verb takes exactly one flag of 32 (words=2: one flag of 10 and one mode of 10), a fact that is drawn anew
for every seed and that only the terminal tells: a wrong call prints the right one. The construction favours
ECHO: the answer stands in the observation, and knowing it is all that a task asks for. Dials take that away,
bit by bit: README.md.
"""

import random
from itertools import product

from echo_min.limits import Limits
from echo_min.tasks import Task, World

FLAGS = [f"-{letter}" for letter in "abcdefghijklmnopqrstuvwxyzABCDEF"]
MODES = "bold calm cold dark firm loud mild pale soft warm".split()
CODES = "alpha bravo cobra dingo eagle falcon gecko hyena ibis jackal".split()
FILES = """acorn beach cedar delta ember fjord grove heron islet jetty knoll lagoon maple north oasis pearl
quartz ridge stone tulip""".split()
VERBS = {
    "train": """align blend carve drain empty fetch graft hoist index judge knead label mount notch order
paint quilt raise scan trace unite visit weigh yield zip bake clamp dodge etch fold grind heat infer join
kneel latch mend nudge open press""".split(),
    "linked": """adopt braid climb dance erase float greet hatch iron juggle kick lift mix nail obey patch
quote rinse sort twist""".split(),
    "ambient": """argue boost crawl drift evict flip glaze hunt invent jolt knock learn mark nest offer peel
query roast sweep tidy""".split(),
}
HELD_OUT = 200

HURRIED = Limits(command_seconds=3.0, agent_seconds=5.8)  # where calls hang: time for one that does

# One case a verb: $right is its words. $given is what the call says instead.
TOOL = """#!/bin/sh
case "$1" in
{right}
*) echo "tk: no verb $1"; exit 2 ;;
esac
shown=$right
verb=$1 given=$2; shift 2; while [ $# -gt 1 ]; do given="$given $1"; shift; done
{shown}
if [ "$given" != "$right" ]; then
    {hang}
    case $verb in
    {mute}) read -r load <.load; echo "load: $load" ;;
    *) echo "usage: tk $verb $shown FILE" ;;
    esac
    exit 2
fi
[ -f "$1" ] || {{ echo "tk: no file $1"; exit 1; }}
echo "$verb $right" > "$1" && echo "ok $1"
"""

VERIFY = """[[ -f {file} && ! -L {file} && -f {other} && ! -L {other} && ! -s {other} ]] || exit 1
IFS= read -r -n 80 line < {file} && [[ $line == "{verb} {words}" ]] || exit 1
"""


def cases(variable: str, table: dict[str, str]) -> str:
    return "\n".join(f'"{key}") {variable}="{value}" ;;' for key, value in table.items())


def tool_task(
    facts: dict, shown: str, verb: str, file: str, rng: random.Random, linked=True, hanging=()
) -> Task:  # fmt: skip
    """facts, shown: as `drawn`. linked: whether wrong calls print the usage line, not the machine's load.
    hanging: words that never come back where they are wrong."""
    other, load = rng.choice([f for f in FILES if f != file]), f"{rng.randrange(16**6):06x}"
    mute, words = "|".join(VERBS["ambient"]) if linked else "*", facts[verb]
    pattern = "|".join(f"'{given}'" for given in hanging)
    hang = f'case $given in {pattern}) echo "tk: waiting"; sleep 60 ;; esac' if hanging else ":"
    return Task(
        name=f"tool-{verb}-{file}-{load}", instruction=f"{verb} {file}",
        files={file: b"", other: b"", ".load": f"{load}\n".encode()},
        tools={"tk": TOOL.format(right=cases("right", facts), shown=shown, mute=mute, hang=hang).encode()},
        verify=VERIFY.format(verb=verb, words=words, file=file, other=other),
        solution=f"tk {verb} {words} {file}", limits=HURRIED if hanging else Limits(),
    )  # fmt: skip


def tool_world(
    seed: int, words: int = 1, linked: float = 1.0, tells: int = 1, persist: float = 1.0,
    usage: str = "true", family: str = "train", hangs: float = 0.0,
) -> World:  # fmt: skip
    """words: how many a call needs, 1 or 2. Raises ValueError for a dial that is out of range."""
    ranges = {
        "words": words in (1, 2), "linked": 0 <= linked <= 1, "tells": 1 <= tells <= 16,
        "persist": persist == 1 or (0 <= persist < 1 and (tells, usage) == (1, "true")),
        "usage": usage in ("true", "lying", "code"), "family": family in VERBS,
        "hangs": 0 <= hangs < 1,
    }  # fmt: skip
    if wrong := [dial for dial, valid in ranges.items() if not valid]:
        raise ValueError(f"world:tool has no such value of {', '.join(wrong)}")
    choices = FLAGS if words == 1 else [" ".join(pair) for pair in product(FLAGS[:10], MODES)]
    facts, shown = drawn(f"tool {seed}", choices, usage, tells)
    hanging = random.Random(f"hangs {seed}").sample(choices, round(hangs * len(choices)))
    rng, pairs, train = random.Random(f"tasks {seed}"), list(product(VERBS[family], FILES)), []
    rng.shuffle(pairs)
    held_out = [tool_task(facts, shown, *pair, rng, hanging=hanging) for pair in pairs[:HELD_OUT]]
    # ambient output is new in every task, so that it can't be learned by heart
    for verb, file in pairs[HELD_OUT:] * (10 if family == "ambient" else 1):
        own = facts if rng.random() < persist else facts | {verb: rng.choice(choices)}
        train.append(tool_task(own, shown, verb, file, rng, rng.random() < linked, hanging))
    telling = tuple(dict.fromkeys(word for choice in choices for word in choice.split()))
    return World(train, held_out, *agents(choices), telling=telling)


def drawn(key: str, choices: list[str], usage: str, tells: int = 1) -> tuple[dict[str, str], str]:
    """Draws by the key -> verb -> words; a shell `case` of what usage lines show; empty if it's the truth."""
    rng, shown, by = random.Random(key), {}, "verb"
    facts = {verb: rng.choice(choices) for group in VERBS.values() for verb in group}
    if usage == "lying":
        shown, by = dict(zip(choices, rng.choices(choices, k=len(choices)), strict=True)), "given"
    elif usage == "code":
        shown = {verb: " ".join(rng.sample(CODES, len(words.split()))) for verb, words in facts.items()}
    elif tells > 1:
        for verb, words in facts.items():
            listed = [words, *rng.sample([other for other in choices if other != words], tells - 1)]
            shown[verb] = " or ".join(rng.sample(listed, tells))
    return facts, f'case "${by}" in\n{cases("shown", shown)}\nesac' if shown else ""


def agents(choices: list[str]):
    """-> the weak agent and the expert."""
    others = [drawn(f"another tool {i}", choices, "code" if i % 4 == 0 else "lying") for i in range(16)]

    def weak(rng: random.Random) -> tuple[Task, list[str]]:
        """Random words at a tool of other facts, whose usage line misleads: form, and no fact to keep."""
        facts, shown = rng.choice(others)
        verb, file = rng.choice(list(facts)), rng.choice(FILES)
        task = tool_task(facts, shown, verb, file, rng)
        commands = [f"tk {verb} {words} {file}" for words in rng.sample(choices, 3)]
        if task.solution in commands:
            commands = [*commands[: commands.index(task.solution) + 1], "done"]
        return task, commands

    def expert(task: Task, rng: random.Random) -> list[str]:
        """The right call, every second time after a wrong one."""
        tk, verb, *right, file = task.solution.split()
        wrong = rng.choice([given for given in choices if given != " ".join(right)])
        return [*[f"{tk} {verb} {wrong} {file}"] * rng.randrange(2), task.solution, "done"]

    return weak, expert
