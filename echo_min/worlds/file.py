"""The file world: find a file by a word that it holds, then copy, rename or remove it.

Which file holds the word is new in every task and stands only in what `grep` prints, so no fact can go into
the weights: a policy must learn to look and to read. Nothing here favours ECHO.
"""

import random
from itertools import chain

from echo_min.tasks import Task, World
from echo_min.worlds.tool import FILES, HELD_OUT

WORDS = """amber bronze coral denim ebony fawn ginger hazel indigo jade khaki lilac mauve navy olive plum rust
sepia teal umber""".split()
COMMANDS = {"copy": "cp {file} out", "rename": "mv {file} out", "remove": "rm {file}"}
VERIFY = {  # after `same FILE WORD`, which is true if the file is plain and holds the word alone
    "copy": "same {file} {word} && same out {word} || exit 1",
    "rename": "[[ ! -e {file} ]] && same out {word} || exit 1",
    "remove": "[[ ! -e {file} && ! -e out ]] || exit 1",
}
SAME = """same() {  # read fails at the end of the file, not at a NUL
    local text=; [[ -f $1 && ! -L $1 ]] || return 1
    ! read -r -d '' -n 80 text < $1 && [[ $text == "$2" ]]
}
"""


def draw(rng: random.Random) -> Task:
    files = dict(zip(rng.sample(FILES, 4), rng.sample(WORDS, 4), strict=True))  # name -> the word in it
    kind, file = rng.choice([*COMMANDS]), rng.choice([*files])
    word = files[file]
    others = "".join(f"same {name} {files[name]} || exit 1\n" for name in files if name != file)
    return Task(
        name="-".join(["file", kind, *chain(*sorted(files.items())), word]),
        instruction=f"{kind} {word}",
        files={name: f"{text}\n".encode() for name, text in files.items()},
        verify=SAME + others + VERIFY[kind].format(file=file, word=word),
        solution=COMMANDS[kind].format(file=f"$(grep -l {word} *)"),
    )


def expert(task: Task, rng: random.Random) -> list[str]:
    kind, word = task.instruction.split()
    file = next(name for name, text in task.files.items() if text.decode().strip() == word)
    return [f"grep -l {word} *", COMMANDS[kind].format(file=file), "done"]


def weak(rng: random.Random) -> tuple[Task, list[str]]:
    """Looks, mostly in the right way, then takes the right file or, as often, any file at all."""
    task = draw(rng)
    grep, right, done = expert(task, rng)
    look = rng.choice([grep, grep, f"cat {rng.choice(FILES)}"])
    other = COMMANDS[task.instruction.split()[0]].format(file=rng.choice(FILES))
    return task, [look, rng.choice([right, other]) if look == grep else other, done]


def file_world(seed: int) -> World:
    rng = random.Random(f"file world {seed}")
    tasks = list({task.name: task for task in (draw(rng) for _ in range(900))}.values())
    return World(tasks[HELD_OUT:], tasks[:HELD_OUT], weak, expert, telling=tuple(FILES))
