"""The file world: find a file by a word that it holds, then copy, rename or remove it.

Which file holds the word is new in every task and stands only in what `grep` prints, so no fact can go into
the weights: a policy must learn to look and to read. Nothing here favours ECHO.
"""

import random

from echo_min.tasks import Task, World
from echo_min.worlds.tool import FILES

WORDS = """
amber bronze coral denim ebony fawn ginger hazel indigo jade khaki lilac mauve navy olive plum rust sepia teal
umber
""".split()
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


def file_task(kind: str, files: dict[str, str], file: str) -> Task:
    """files: name -> the word in it."""
    word = files[file]
    others = "".join(f"same {name} {files[name]} || exit 1\n" for name in files if name != file)
    return Task(
        name="-".join(["file", kind, *(x for pair in sorted(files.items()) for x in pair), word]),
        instruction=f"{kind} {word}",
        files={name: f"{text}\n".encode() for name, text in files.items()},
        verify=SAME + others + VERIFY[kind].format(file=file, word=word),
        solution=COMMANDS[kind].format(file=f"$(grep -l {word} *)"),
    )


def file_world(seed: int) -> World:
    def draw(rng: random.Random) -> tuple[Task, str, str, str]:
        files = dict(zip(rng.sample(FILES, 4), rng.sample(WORDS, 4), strict=True))
        kind, file = rng.choice(list(COMMANDS)), rng.choice(list(files))
        return file_task(kind, files, file), kind, files[file], file

    rng = random.Random(f"file world {seed}")
    tasks = {task.name: task for task, *_ in (draw(rng) for _ in range(900))}

    def weak(rng: random.Random) -> tuple[Task, list[str]]:
        """Looks, mostly in the right way, then takes the right file or, as often, any file at all."""
        task, kind, word, found = draw(rng)
        look = rng.choice([f"grep -l {word} *", f"grep -l {word} *", f"cat {rng.choice(FILES)}"])
        file = rng.choice([found, rng.choice(FILES)]) if look.startswith("grep") else rng.choice(FILES)
        return task, [look, COMMANDS[kind].format(file=file), "done"]

    def expert(task: Task, rng: random.Random) -> list[str]:
        kind, word = task.instruction.split()
        file = next(name for name, text in task.files.items() if text.decode().strip() == word)
        return [f"grep -l {word} *", COMMANDS[kind].format(file=file), "done"]

    held_out, train = list(tasks.values())[:200], list(tasks.values())[200:]
    return World(train=train, held_out=held_out, weak=weak, expert=expert, telling=tuple(FILES))
