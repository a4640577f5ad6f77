"""The filter world: turn the four lines of `f` into the wanted ones, left in `out`, with a real filter.

Input and wanted output stand in the prompt; no held-out input is trained. The terminal prints what the filter
typed made of the input: whether it was right can be read off that, which one is right can not.
"""

import random
from itertools import pairwise

from echo_min.tasks import Task, World
from echo_min.worlds.tool import HELD_OUT

WORDS = "ash bay cob dew elk fig gum hay ivy jam kit log".split()
FILTERS = {  # command -> what it makes of the lines
    "cat": lambda x: x, "tac": lambda x: x[::-1],
    "sort": sorted, "sort -r": lambda x: sorted(x, reverse=True), "sort -u": lambda x: sorted(set(x)),
    "uniq": lambda x: x[:1] + [b for a, b in pairwise(x) if a != b],
    "head -n1": lambda x: x[:1], "head -n2": lambda x: x[:2], "head -n3": lambda x: x[:3],
    "tail -n1": lambda x: x[-1:], "tail -n2": lambda x: x[-2:], "tail -n3": lambda x: x[-3:],
    "sed 1d": lambda x: x[1:], "sed 2d": lambda x: x[:1] + x[2:], "sed 3d": lambda x: x[:2] + x[3:],
    "sed 1p": lambda x: x[:1] + x, "sed 2p": lambda x: x[:2] + x[1:], "sed 3p": lambda x: x[:3] + x[2:],
    "sed 1,2d": lambda x: x[2:], "sed 2,3d": lambda x: x[:1] + x[3:],
    "sed -n 2p": lambda x: x[1:2], "sed -n 3p": lambda x: x[2:3],
}  # fmt: skip
CALL = "{} f | tee out"
VERIFY = """[[ -f out && ! -L out ]] || exit 1
IFS= read -r -d '' -n 80 text < out; [[ $text == $'{wanted}' ]] || exit 1
"""


def filter_task(lines: list[str], name: str, in_file: list[str]) -> Task:
    """lines: the input, as the prompt has it. in_file: as it lies in `f`."""
    wanted = FILTERS[name](lines)
    return Task(
        name=f"filter-{'-'.join(lines)}-{name.replace(' ', '_')}",
        instruction=f"{' '.join(lines)} : {' '.join(wanted)}",
        files={"f": "".join(f"{line}\n" for line in in_file).encode()},
        verify=VERIFY.format(wanted="".join(f"{line}\\n" for line in wanted)),
        solution=CALL.format(name),
    )


def filter_world(seed: int) -> World:
    def draw(rng: random.Random) -> tuple[list[str], str]:
        """Four words, often one twice in a row, and a filter that changes them, or cat."""
        while True:
            lines, name = rng.choices(WORDS, k=4), rng.choice([*FILTERS])
            if rng.random() < 0.4:
                twice = rng.randrange(3)
                lines[twice + 1] = lines[twice]
            if name == "cat" or FILTERS[name](lines) != lines:
                return lines, name

    def weak(rng: random.Random) -> tuple[Task, list[str]]:
        """Any filter, at a file of other words: form, and nothing of what a filter does to its input."""
        return filter_task(*draw(rng), rng.choices(WORDS, k=4)), [CALL.format(rng.choice([*FILTERS]))]

    def expert(task: Task, rng: random.Random) -> list[str]:
        """The right call, every second time after another one."""
        return [*[CALL.format(rng.choice([*FILTERS]))] * rng.randrange(2), task.solution, "done"]

    rng = random.Random(f"filter world {seed}")
    drawn = {tuple(lines): name for lines, name in (draw(rng) for _ in range(1600))}  # each input once
    tasks = [filter_task([*lines], name, [*lines]) for lines, name in drawn.items()]
    return World(tasks[HELD_OUT:], tasks[:HELD_OUT], weak, expert, telling=tuple(WORDS))
