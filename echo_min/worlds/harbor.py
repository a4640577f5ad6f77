"""Reads tasks in Harbor's format (that of Terminal-Bench 2): a folder a task.

    instruction.md            the prompt
    task.toml                 limits, and what the container is like
    environment/Dockerfile    its image, unless task.toml names one
    tests/test.sh             the verifier; the agent never sees this folder
    solution/solve.sh         optional: an oracle's
"""

import math
import random
import re
import shlex
import tomllib
from collections.abc import Callable
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


def harbor_tasks(folder: Path, allow_network: bool = False) -> list[Task]:
    """The tasks of a set, by name: in FOLDER/*/, FOLDER/tasks/*/ or FOLDER/*/*/; or FOLDER itself is one.

    A task gets a network only if it asks for one and allow_network is true. Raises ValueError that names the
    file and the key.
    """
    patterns = "task.toml", "*/task.toml", "tasks/*/task.toml", "*/*/task.toml"
    files = next((found for p in patterns if (found := sorted(folder.glob(p)))), [])
    if not files:
        raise ValueError(f"{folder}: no task.toml in it, in {', '.join(patterns[1:])} either")
    tasks = [harbor_task(file.parent, allow_network) for file in files]
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{folder}: more than one task is called {', '.join(twice)}")
    return tasks


def harbor_task(folder: Path, allow_network: bool = False) -> Task:
    """Raises ValueError that names the file and the key."""
    path = folder / "task.toml"
    try:
        settings = tomllib.loads(path.read_bytes().decode())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    if "steps" in settings:
        raise ValueError(f"{path}: [[steps]]: tasks of several steps are not supported")
    for key in ("version", "schema_version"):
        if (version := settings.get(key, "1.0")) not in ("1.0", "1.1", "1.2"):
            raise ValueError(f"{path}: {key}: {version!r} is not 1.0, 1.1 or 1.2")
    agent, verifier, env = (_Table(path, settings, key) for key in ("agent", "verifier", "environment"))
    image = env.text("docker_image")
    for name in ("instruction.md", "tests/test.sh", *([] if image else ["environment/Dockerfile"])):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: missing, or not a file")
    try:
        instruction = (folder / "instruction.md").read_bytes().decode()
    except ValueError as error:
        raise ValueError(f"{folder / 'instruction.md'}: {error}") from None
    for name in ("docker-compose.yaml", "docker-compose.yml"):
        if (found := folder / "environment" / name).exists():
            raise ValueError(f"{found}: tasks of several containers are not supported")
    if env.values.get("gpus"):
        raise ValueError(f"{path}: [environment] gpus: containers get no GPU here")
    if verifier.values.get("environment_mode") == "separate":
        raise ValueError(f"{path}: [verifier] environment_mode: only a verifier in the agent's own container")
    agent_seconds = agent.number("timeout_sec", 1e9)
    given = _Table(path, settings, "solution").texts("env")
    solve = " ".join([*(f"{k}={shlex.quote(v)}" for k, v in given.items()), "/solution/solve.sh"])
    return Task(
        name=folder.resolve().name,
        instruction=instruction,
        verify="/tests/test.sh",
        solution=solve if (folder / "solution/solve.sh").is_file() else "",
        limits=Limits(
            command_seconds=min(COMMAND_SECONDS, agent_seconds),
            agent_seconds=agent_seconds,
            verifier_seconds=verifier.number("timeout_sec", 600.0),
            memory_mb=env.size("memory", 2048),
            work_mb=env.size("storage", 10240),
            processes=PROCESSES,
        ),
        environment=Environment(
            folder=folder.resolve(),
            image=image,
            build_seconds=env.number("build_timeout_sec", 600.0),
            cpus=env.number("cpus", 1.0),
            network=env.network() and allow_network,
            workdir=env.text("workdir"),
            env=env.texts("env"),
            verifier_env=verifier.texts("env"),
        ),
    )


class _Table:
    """One table of a task.toml; whatever is read from it is checked."""

    def __init__(self, path: Path, settings: dict, name: str):
        self.path, self.name, self.values = path, name, settings.get(name, {})
        if not isinstance(self.values, dict):
            raise ValueError(f"{path}: {name}: expected a table [{name}], got {self.values!r:.80}")

    def get(self, key: str, default, expected: str, valid: Callable):
        value = self.values.get(key, default)
        if not valid(value):
            raise ValueError(f"{self.path}: [{self.name}] {key}: expected {expected}, got {value!r:.80}")
        return value

    def number(self, key: str, default: float) -> float:
        def valid(value) -> bool:
            return type(value) in (int, float) and (1e-3 <= value <= 1e9 or value == default)

        return float(self.get(key, default, "a number above 0", valid))

    def text(self, key: str) -> str:
        return self.get(key, "", "a line of text", lambda v: isinstance(v, str) and v.isprintable())

    def texts(self, key: str) -> dict[str, str]:
        def valid(value) -> bool:
            return isinstance(value, dict) and all(
                re.fullmatch(r"[A-Za-z_]\w*", k, re.ASCII) and isinstance(v, str) and "\0" not in v
                for k, v in value.items()
            )

        return self.get(key, {}, "a table of names and texts", valid)

    def size(self, key: str, default: int) -> int:
        """MiB, from KEY_mb (a number) or the older KEY ("2G")."""
        if f"{key}_mb" in self.values:
            return math.ceil(self.number(f"{key}_mb", default))

        def mib(value) -> int:
            match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([KMGT])i?B?", str(value))
            return math.ceil(float(match[1]) * 1024.0 ** ("KMGT".index(match[2]) - 1)) if match else 0

        return mib(self.get(key, f"{default}M", 'a size like "2G"', lambda v: 0 < mib(v) <= 1e9))

    def network(self) -> bool:
        modes = None, "public", "no-network"
        mode = self.get("network_mode", None, '"public" or "no-network"', lambda v: v in modes)
        asked = self.get("allow_internet", True, "true or false", lambda v: isinstance(v, bool))
        return asked if mode is None else mode == "public"


def harbor_world(folder: Path, allow_network: bool = False) -> World:
    """A set to train on; every fifth task, at least one, is held out.

    Nobody scripts an expert for tasks unknown: weak and expert agents alike only look around.
    """
    tasks = harbor_tasks(folder, allow_network)
    if len(tasks) < 2:
        raise ValueError(f"{folder}: one task cannot be both trained on and held out")

    def look(task: Task, rng: random.Random) -> list[str]:
        return [*rng.sample(LOOK_AROUND, 2), "done"]

    def weak(rng: random.Random) -> tuple[Task, list[str]]:
        task = rng.choice(train)
        return task, look(task, rng)

    held_out = tasks[::5]
    train = [task for i, task in enumerate(tasks) if i % 5]
    return World(train=train, held_out=held_out, weak=weak, expert=look)
