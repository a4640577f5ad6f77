"""The gnu world: options of real programs that take one word of a list, which a wrong word makes GNU print.

The list narrows the choice and never answers it: which of the valid words a verb wants is drawn by the seed,
and only the reward tells. A world wants a third of a list at most: rewards alone do not teach what is valid.
"""

import random
import re
import subprocess
from functools import cache
from itertools import pairwise, product
from shlex import quote

from echo_min.tasks import Task, World
from echo_min.worlds.file import WORDS
from echo_min.worlds.tool import FILES, HELD_OUT, VERBS

INPUTS = {
    "d/a9": "", "d/b.c": "12", "d/a b.txt": "1", "d/a10": "12345", "d/it's": "123", 'd/q"': "123456",
    "d/t\tx": "1234", "s": "10\n9\n1K\n2M\nJAN\nv1.10\nv1.9\n1e1\n", "n": "1501\n-1501\n1450\n-1450\n",
    "k": "1K\n1Ki\n",
}  # fmt: skip
OPTIONS = {  # what follows the word; how many of which words are wanted: each prints what no other one does
    "cksum --algorithm": ("s", 3, "bsd sysv md5 sha1 sha224 sha256 sha384 sha512 blake2b sm3"),
    "ls --quoting-style": ("d", 3, "shell shell-always shell-escape shell-escape-always c-maybe escape"),
    "ls --sort": ("d", 2, "size extension version width"),
    "numfmt --round": ("--to si < n", 1, "up down towards-zero nearest"),
    "sort --sort": ("s", 2, "general-numeric human-numeric month numeric version"),
    "numfmt --from": ("--invalid ignore < k", 1, "auto si iec iec-i"),
}
UNLISTED = "bold brief deep empty green loud plain quick quiet round strict wide".split()  # valid nowhere
ANSWER = r"""#!/bin/bash
{first}
printf "${{0##*/}}: invalid argument '%s' for '%s'\nValid arguments are:\n$list\n" "$2" "$1" >&2
echo "Try '${{0##*/}} --help' for more information." >&2; exit 1
"""
GNU = '/usr/bin/${0##*/} "$@" 2>/dev/null && exit\n'
VERIFY = """[[ -f {name} && ! -L {name} ]] || exit 1
PATH=/usr/bin:/bin file=$PWD/{name}
cd "$(mktemp -d)" && mkdir d {inputs} || exit 2
{right} | cmp -s - "$file" || exit 1
"""  # on inputs of its own: the agent may have changed the task's


@cache
def refusal(program: str, option: str, word: str) -> str:
    """What this machine's program says against a word; empty if it takes it."""
    options = {"env": {"LC_ALL": "C"}, "cwd": "/", "stdin": subprocess.DEVNULL, "errors": "replace"}
    return subprocess.run([program, f"{option}={word}"], capture_output=True, **options).stderr


def valid(option: str) -> tuple[str, ...]:
    """The words that this machine's program lists, in its order. option: as in OPTIONS."""
    return tuple(re.findall(r"^  - '(.+)'$", refusal(*option.split(), "?"), re.MULTILINE))


def all_words() -> list[str]:
    return sorted({word for option in OPTIONS for word in valid(option)} | set(UNLISTED))


def lines(words) -> str:
    return "\n".join(f"  - '{word}'" for word in words)


def programs(answer: str) -> dict[str, bytes]:
    """What stands before GNU's programs. stub: refuses all words with the list in .list; or if GNU does."""
    pairs = pairwise([[*OPTIONS][-1], *OPTIONS])
    cases = "".join(f"'{option}') list={quote(lines(valid(other)))} ;;\n" for other, option in pairs)
    first = {
        "stub": "list=$(<.list)",
        "lying": f'{GNU}case "${{0##*/}} $1" in\n{cases}esac',
        "load": f'{GNU}echo "load: $(<.load)" >&2; exit 1',
    }[answer]
    return {option.split()[0]: ANSWER.format(first=first).encode() for option in OPTIONS}


def gnu_task(option: str, word: str, verb: str, name: str, tools: dict[str, bytes], more: dict) -> Task:
    """more: files beside INPUTS."""
    right = f"{option} '{word}' {OPTIONS[option][0]}"
    inputs = " ".join(f"&& printf %s {quote(text)} > {quote(file)}" for file, text in INPUTS.items())
    return Task(
        name="-".join(["gnu", verb, name, *more.values()]), instruction=f"{option} {verb} {name}",
        files={file: text.encode() for file, text in (INPUTS | more).items()}, tools=tools,
        verify=VERIFY.format(name=name, inputs=inputs, right=right), solution=f"{right} > {name}",
    )  # fmt: skip


def gnu_world(seed: int, answer: str = "true") -> World:
    """answer to a wrong word: true, GNU's own; lying, the words of another option; load, the machine's load.
    Raises ValueError for another, or if this machine's programs do not list the words wanted."""
    if answer not in ("true", "lying", "load"):
        raise ValueError(f"world:gnu: answer={answer} is not one of true, lying, load")
    for option, (*_, wanted) in OPTIONS.items():
        if lacks := ", ".join(sorted(set(wanted.split()) - set(valid(option)))):
            said = f"`{option}` of this machine does not list {lacks}; GNU coreutils 9 does"
            raise ValueError(f"world:gnu: {said}")
    rng = random.Random(f"gnu world {seed}")
    wants = [(o, word) for o, (_, n, wanted) in OPTIONS.items() for word in rng.sample(wanted.split(), n)]
    facts = dict(zip(rng.sample(VERBS["train"], len(wants)), wants, strict=True))
    words, names, stubs = all_words(), FILES + WORDS, programs("stub")
    tools = {} if answer == "true" else programs(answer)
    pairs, tasks = list(product(facts, names)), []
    rng.shuffle(pairs)
    # the load is new in every task, so that it can't be learned by heart
    for verb, name in pairs + pairs[HELD_OUT:] * (9 if answer == "load" else 0):
        load = {".load": f"{rng.randrange(16**6):06x}"} if answer == "load" else {}
        tasks.append(gnu_task(*facts[verb], verb, name, tools, load))

    def weak(rng: random.Random) -> tuple[Task, list[str]]:
        """Any word, at programs that refuse every word with a random list: form, and no fact to keep."""
        word, *listed = rng.sample(words, rng.randint(5, 12))
        option, (*_, wanted) = rng.choice([*OPTIONS.items()])
        right, verb, name = (rng.choice(among) for among in (wanted.split(), VERBS["train"], names))
        task = gnu_task(option, right, verb, name, stubs, {".list": lines(listed)})
        return task, [task.solution.replace(f"'{right}'", f"'{word}'")]

    def expert(task: Task, rng: random.Random) -> list[str]:
        """The right call, every second time after one with a word that is refused."""
        refused = [word for word in words if refusal(*task.instruction.split()[:2], word)]
        wrong = re.sub(" '.+?'", f" '{rng.choice(refused)}'", task.solution, count=1)
        return [*[wrong] * rng.randrange(2), task.solution, "done"]

    telling = tuple(f"'{word}'" for word in words)
    return World(tasks[HELD_OUT:], tasks[:HELD_OUT], weak, expert, telling)
