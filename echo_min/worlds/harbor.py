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
import shlex
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from posixpath import normpath

from echo_min.limits import Limits
from echo_min.tasks import Task, World
from echo_min.worlds.task_toml import HEALTH, mebibytes, tables_of

COMMAND_SECONDS = 120.0  # one command; the format only limits all of them together
PROCESSES = 1024
LOOK_AROUND = ["pwd", "ls -la", "head -n 20 *", "git log --oneline", "ps"]


@dataclass(frozen=True)
class Healthcheck:
    """Must pass in a container before anything else runs there. Times in seconds."""

    command: str
    interval_sec: float = 5.0
    timeout_sec: float = 30.0
    start_period_sec: float = 0.0  # in which failures do not count
    start_interval_sec: float = 5.0
    retries: int = 3  # so many failures in a row are final


@dataclass(frozen=True)
class Verifier:
    """How the agent's work is graded, by /tests/test.sh: in the agent's container, or in one of its own."""

    user: str = ""  # if empty, the image's
    env: dict[str, str] = field(default_factory=dict)
    network: bool = False
    container: "Environment | None" = None  # of its own
    has_tests: bool = False  # its own image holds them; else tests/ is copied in
    artifacts: tuple[tuple[str, tuple[str, ...]], ...] = ()  # path, what is left out: all that it sees then


@dataclass(frozen=True)
class Environment:
    """The container that a Harbor task asks for; only the Docker backend has it."""

    folder: Path  # the task's: environment/, tests/ and solution/ lie in it
    image: str = ""  # pulled; if empty, `build` is built
    build: str = "environment"  # a folder below `folder`
    build_seconds: float = 600.0
    cpus: float = 0.0  # these three: 0 if the task names none (docker_engine.share)
    memory_mb: int = 0
    storage_mb: int = 0
    network: bool = False
    kept_offline: bool = False  # asks for a network and gets none
    workdir: str = ""  # if empty, the image's
    env: dict[str, str] = field(default_factory=dict)
    user: str = ""  # of the agent; if empty, the image's
    healthcheck: Healthcheck | None = None
    verifier: Verifier = Verifier()


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
    if offline := sum(task.environment.kept_offline for task in tasks):
        _say(f"{folder}: {offline} of {len(tasks)} tasks ask for a network and get none: --allow_network")
    if not tasks:
        raise ValueError(f"{folder}: none of its {len(files)} tasks can be played")
    if twice := sorted(name for name, n in Counter(task.name for task in tasks).items() if n > 1):
        raise ValueError(f"{folder}: more than one task is called {', '.join(twice)}")
    return tasks


def harbor_task(folder: Path, allow_network: bool = False) -> Task:
    """allow_network: it gets one if it asks. ValueError names file and key of what is refused."""
    tables, prompt = tables_of(folder / "task.toml"), folder / "instruction.md"
    agent, verifier, solution = (tables.get(name, {}) for name in ("agent", "verifier", "solution"))
    environment, solve = _environment(folder, tables, allow_network), folder / "solution/solve.sh"
    own, has_tests = environment.verifier.container, environment.verifier.has_tests
    needed = [prompt, *([] if has_tests else [folder / "tests/test.sh"])]
    needed += [folder / e.build / "Dockerfile" for e in (environment, own) if e and not e.image]
    for file in needed:
        if not file.is_file():
            raise ValueError(f"{file}: missing, or not a file")
    if found := next(folder.glob("*/docker-compose.y*ml"), None):
        raise ValueError(f"{found}: tasks of several containers are not supported")
    try:
        instruction = prompt.read_bytes().decode()
    except ValueError as error:
        raise ValueError(f"{prompt}: {error}") from None
    agent_seconds = float(agent.get("timeout_sec", 1e9))
    given = [f"{name}={shlex.quote(text)}" for name, text in solution.get("env", {}).items()]
    return Task(
        name=folder.resolve().name, instruction=instruction, verify="/tests/test.sh", environment=environment,
        solution=" ".join([*given, "/solution/solve.sh"]) if solve.is_file() else "",
        limits=Limits(
            command_seconds=min(COMMAND_SECONDS, agent_seconds), agent_seconds=agent_seconds,
            verifier_seconds=float(verifier.get("timeout_sec", 600.0)), processes=PROCESSES,
        ),
    )  # fmt: skip


def _environment(folder: Path, tables: dict[str, dict], allow_network: bool) -> Environment:
    """The agent's container, and how it is verified: in a container of the verifier's own if the task says so
    or describes one, of an image that holds the tests, or else of the agent's, to which they are added."""
    agent, verifier = _container(folder, tables, "environment", "agent"), tables.get("verifier", {})
    described = "verifier.environment" in tables
    mode = verifier.get("environment_mode", "separate" if described else "shared")
    asks, own, has_tests = agent.network, None, False
    if mode == "separate":
        own = _container(folder, tables, "verifier.environment" if described else "environment", "verifier")
        has_tests = (described and bool(own.image)) or (folder / "tests/Dockerfile").is_file()
        if not (described and own.image):
            own = replace(own, build="tests", image="") if has_tests else replace(own, image=agent.image)
        asks, own = own.network, replace(own, network=own.network and allow_network)
    elif "network_mode" in verifier:
        asks = verifier["network_mode"] == "public"
    found = [a if isinstance(a, dict) else {"source": a} for a in tables[""].get("artifacts", [])]
    artifacts = [(normpath(a["source"]), tuple(a.get("exclude", []))) for a in found]
    graded = Verifier(
        user=str(verifier.get("user", "")), env=verifier.get("env", {}), network=asks and allow_network,
        container=own, has_tests=has_tests, artifacts=(*artifacts, ("/logs/artifacts", ())),
    )  # fmt: skip
    offline = (agent.network or asks) and not allow_network
    return replace(agent, verifier=graded, network=agent.network and allow_network, kept_offline=offline)


def _container(folder: Path, tables: dict[str, dict], name: str, who: str) -> Environment:
    """What the table `name` says of the container in which `who` works; network: whether it asks for one."""
    table, worker, health = (tables.get(key, {}) for key in (name, who, f"{name}.healthcheck"))
    usual = "public" if table.get("allow_internet", True) else "no-network"
    return Environment(
        folder=folder.resolve(), image=table.get("docker_image", ""),
        build_seconds=float(table.get("build_timeout_sec", 600.0)), cpus=float(table.get("cpus", 0.0)),
        memory_mb=math.ceil(table.get("memory_mb") or mebibytes(table.get("memory", ""))),
        storage_mb=math.ceil(table.get("storage_mb") or mebibytes(table.get("storage", ""))),
        network=worker.get("network_mode", table.get("network_mode", usual)) == "public",
        workdir=table.get("workdir", ""), env=table.get("env", {}),
        user=str(worker.get("user", "")) if who == "agent" else "",
        healthcheck=Healthcheck(**{key: health[key] for key in HEALTH if key in health}) if health else None,
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
