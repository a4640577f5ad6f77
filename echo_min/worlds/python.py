"""The python world: a short script that calls a function of an unknown module, `kit.VERB('FILE', NAME=1)`.

Each function has one keyword of 24, a fixed fact of this world. A call without a keyword raises a TypeError
that names it; a wrong keyword raises one that does not. So what a failure tells depends on how one fails, and
the name stands there in quotes: another token than the one to write.
"""

import random
from itertools import product
from keyword import iskeyword

from echo_min.tasks import Task, World
from echo_min.worlds.tool import FILES, VERBS, VERIFY

KEYWORDS = """
angle axis base count depth edge frame gain hue index joint key level mass node order phase quota rank scale
tone unit width zone
""".split()
FUNCTION = """
def {verb}(file, *, {keyword}):
    io.open(file, "r+").write("{verb} {keyword}\\n")
    print("ok", file)
"""


def call(verb: str, keyword: str | None, file: str) -> str:
    given = f" , {keyword} = 1" if keyword else ""
    return f"python3 -Sc \"import kit ; kit . {verb} ( '{file}'{given} )\""


def python_task(facts: dict[str, str], verb: str, file: str, other: str) -> Task:
    functions = "import io\n"
    functions += "".join(FUNCTION.format(verb=name, keyword=keyword) for name, keyword in facts.items())
    return Task(
        name=f"python-{verb}-{file}",
        instruction=f"{verb} {file}",
        files={file: b"", other: b"", "kit.py": functions.encode()},
        verify=VERIFY.format(verb=verb, words=facts[verb], file=file, other=other),
        solution=call(verb, facts[verb], file),
    )


def python_world() -> World:
    verbs = [verb for verb in VERBS["train"] if not iskeyword(verb)]

    def another(file: str, rng: random.Random) -> str:
        return rng.choice([f for f in FILES if f != file])

    rng = random.Random("python world")
    facts = {verb: rng.choice(KEYWORDS) for verb in verbs}
    pairs = list(product(verbs, FILES))
    rng.shuffle(pairs)
    tasks = [python_task(facts, verb, file, another(file, rng)) for verb, file in pairs]

    def weak(rng: random.Random) -> tuple[Task, list[str]]:
        """Random keywords, or none, for a module of other facts."""
        facts = {verb: rng.choice(KEYWORDS) for verb in verbs}
        verb, file = rng.choice(verbs), rng.choice(FILES)
        keywords = [rng.choice(KEYWORDS) if rng.random() < 0.6 else None for _ in range(3)]
        task = python_task(facts, verb, file, another(file, rng))
        return task, [call(verb, keyword, file) for keyword in keywords]

    def expert(task: Task, rng: random.Random) -> list[str]:
        """The right call, every second time after one without a keyword."""
        verb, file = task.instruction.split()
        return [*[call(verb, None, file)] * rng.randrange(2), task.solution, "done"]

    return World(tasks[200:], tasks[:200], weak, expert, telling=tuple(f"'{word}'" for word in KEYWORDS))
