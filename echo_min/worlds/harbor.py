"""Reads tasks in Harbor's format (that of Terminal-Bench 2): a folder a task.

    instruction.md            the prompt
    task.toml                 limits, and what the container is like
    environment/Dockerfile    its image, unless task.toml names one
    tests/test.sh             the verifier; the agent never sees this folder
    solution/solve.sh         optional: an oracle's
"""

import functools
import math
import random
import re
import shlex
import tomllib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from echo_min.tasks import Limits, Task, World

COMMAND_SECONDS = 120.0  # one command; the format only limits all of them together
PROCESSES = 1024
LOOK_AROUND = ["pwd", "ls -la", "head -n 20 *", "git log --oneline", "ps"]


@dataclass(frozen=True)
class Environment:
    """The container that a Harbor task asks for; only the Docker backend has it."""

    folder: Path  # the task's: environment/, tests/ and solution/ lie in it
    image: str = ""  # pulled; if empty, environment/ is built
    build_seconds: float = 600.0
    cpus: float = 1.0
    network: bool = False
    workdir: str = ""  # if empty, the image's
    env: dict[str, str] = field(default_factory=dict)
    verifier_env: dict[str, str] = field(default_factory=dict)


def _are_variables(value) -> bool:
    """Not ${NAME}, which the format takes from the host."""
    named = isinstance(value, dict) and all(re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) for name in value)
    return named and all(isinstance(text, str) and not re.search(r"\0|\$\{", text) for text in value.values())


def _mib(size) -> int:
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([KMGT])i?B?", str(size))
    return math.ceil(float(match[1]) * 1024.0 ** ("KMGT".index(match[2]) - 1)) if match else 0


NUMBER = "a number above 0", lambda v: type(v) in (int, float) and 1e-3 <= v <= 1e9
LINE = "a line of text", lambda v: isinstance(v, str) and v.isprintable()
FLAG = "true or false", lambda v: isinstance(v, bool)
SIZE = 'a size like "2G"', lambda v: 0 < _mib(v) <= 1e9
VARIABLES = "names and texts without ${}", _are_variables
VERSION = "1.0 to 1.4", lambda v: v in ("1.0", "1.1", "1.2", "1.3", "1.4")
MODE = '"public" or "no-network"', lambda v: v in ("public", "no-network")
SHARED = '"shared", the only mode supported', lambda v: v == "shared"
LINUX = '"linux"', lambda v: v == "linux"
NOTHING = "nothing: it is not supported", lambda v: not v
NO_TABLE = "no such table: it is not supported", lambda v: False
CHECKED = {  # how what is read of a task.toml, or could change the grade, is checked; the rest is ignored
    "": {"version": VERSION, "schema_version": VERSION, "steps": NOTHING},
    "agent": {"timeout_sec": NUMBER, "user": NOTHING, "network_mode": NOTHING},
    "verifier": {
        "timeout_sec": NUMBER, "env": VARIABLES, "environment_mode": SHARED, "environment": NO_TABLE,
        "user": NOTHING, "network_mode": NOTHING, "collect": NOTHING,
    },
    "environment": {
        "build_timeout_sec": NUMBER, "docker_image": LINE, "workdir": LINE, "env": VARIABLES, "cpus": NUMBER,
        "memory_mb": NUMBER, "memory": SIZE, "storage_mb": NUMBER, "storage": SIZE, "network_mode": MODE,
        "allow_internet": FLAG, "os": LINUX, "gpus": NOTHING, "tpu": NOTHING, "mcp_servers": NOTHING,
        "skills_dir": NOTHING, "healthcheck": NOTHING,
    },
    "solution": {"env": VARIABLES},
}  # fmt: skip


def _tables(path: Path) -> dict[str, dict]:
    """A task.toml's tables of CHECKED. Raises ValueError that names the file and the key."""
    try:
        settings = tomllib.loads(path.read_bytes().decode())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    tables = {name: settings.get(name, {}) if name else settings for name in CHECKED}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(f"{path}: {name}: expected a table [{name}], got {table!r:.80}")
        for key, (expected, holds) in CHECKED[name].items():
            if key in table and not holds(table[key]):
                place = f"[{name}] {key}" if name else key
                raise ValueError(f"{path}: {place}: expected {expected}, got {table[key]!r:.80}")
    return tables


@functools.cache  # once a task, though a set may be read twice
def _say(line: str) -> None:
    print(line, flush=True)


def harbor_tasks(folder: Path, allow_network: bool = False, strict: bool = False) -> list[Task]:
    """The tasks of a set, by name: in FOLDER/*/, FOLDER/tasks/*/ or FOLDER/*/*/; or FOLDER itself is one.

    What harbor_task refuses is left out with a word; if `strict`, its ValueError is raised, as for no tasks.
    """
    patterns = "task.toml", "*/task.toml", "tasks/*/task.toml", "*/*/task.toml"
    files = next((found for p in patterns if (found := sorted(folder.glob(p)))), [])
    if not files:
        raise ValueError(f"{folder}: no task.toml in it, in {', '.join(patterns[1:])} either")
    tasks = []
    for file in files:
        try:
            tasks.append(harbor_task(file.parent, allow_network))
        except ValueError as error:
            if strict:
                raise
            _say(f"skipped {file.parent.resolve().name}: {error}")
    if not tasks:
        raise ValueError(f"{folder}: none of its {len(files)} tasks can be played")
    if twice := sorted(name for name, n in Counter(task.name for task in tasks).items() if n > 1):
        raise ValueError(f"{folder}: more than one task is called {', '.join(twice)}")
    return tasks


def harbor_task(folder: Path, allow_network: bool = False) -> Task:
    """allow_network: it gets one if it asks. ValueError names file and key of what is refused."""
    tables, prompt = _tables(folder / "task.toml"), folder / "instruction.md"
    _, agent, verifier, environment, solution = tables.values()
    image = environment.get("docker_image", "")
    for file in (prompt, folder / "tests/test.sh", *([] if image else [folder / "environment/Dockerfile"])):
        if not file.is_file():
            raise ValueError(f"{file}: missing, or not a file")
    if found := next(folder.glob("environment/docker-compose.y*ml"), None):
        raise ValueError(f"{found}: tasks of several containers are not supported")
    try:
        instruction = prompt.read_bytes().decode()
    except ValueError as error:
        raise ValueError(f"{prompt}: {error}") from None
    agent_seconds = float(agent.get("timeout_sec", 1e9))
    given = [f"{name}={shlex.quote(text)}" for name, text in solution.get("env", {}).items()]
    mode = "public" if environment.get("allow_internet", True) else "no-network"
    return Task(
        name=folder.resolve().name, instruction=instruction, verify="/tests/test.sh",
        solution=" ".join([*given, "/solution/solve.sh"]) if (folder / "solution/solve.sh").is_file() else "",
        limits=Limits(
            command_seconds=min(COMMAND_SECONDS, agent_seconds), agent_seconds=agent_seconds,
            verifier_seconds=float(verifier.get("timeout_sec", 600.0)), processes=PROCESSES,
            memory_mb=math.ceil(environment.get("memory_mb") or _mib(environment.get("memory", "2G"))),
            work_mb=math.ceil(environment.get("storage_mb") or _mib(environment.get("storage", "10G"))),
        ),
        environment=Environment(
            folder=folder.resolve(), image=image,
            build_seconds=float(environment.get("build_timeout_sec", 600.0)),
            cpus=float(environment.get("cpus", 1.0)), workdir=environment.get("workdir", ""),
            network=allow_network and environment.get("network_mode", mode) == "public",
            env=environment.get("env", {}), verifier_env=verifier.get("env", {}),
        ),
    )  # fmt: skip


def harbor_world(folder: Path, allow_network: bool = False) -> World:
    """Every fifth task is held out, at least one. An expert for unknown tasks there is not: agents look."""
    tasks = harbor_tasks(folder, allow_network)
    if len(tasks) < 2:
        raise ValueError(f"{folder}: one task cannot be both trained on and held out")

    def look(_, rng: random.Random) -> list[str]:
        return [*rng.sample(LOOK_AROUND, 2), "done"]

    train = [task for i, task in enumerate(tasks) if i % 5]
    return World(train, tasks[::5], weak=lambda rng: (rng.choice(train), look(None, rng)), expert=look)
