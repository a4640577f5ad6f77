"""How the work in a container is graded: by the task's own test, there or in a container of its own.

As in Harbor, agent and verifier may share a container: then a process that the agent leaves behind can write
the reward, and a `python` that it has replaced is the verifier's too. In a container of its own the verifier
sees the artifacts alone that the task declares.
"""

import json
import tarfile
import tempfile
from dataclasses import replace
from fnmatch import fnmatchcase
from posixpath import dirname, join

import docker

from echo_min.terminal import TerminalDied
from echo_min.terminals import docker_engine
from echo_min.worlds.harbor import Verifier

SECONDS = 60.0  # of a script of ours
KEPT_BYTES = 64 * 1024  # of what a verifier prints
TOOLS = "PATH=/usr/bin:/bin:/usr/sbin:/sbin; "
CLEAR = TOOLS + "rm -rf -- {} /logs/verifier && mkdir -p /logs/verifier && chmod 777 /logs/verifier"
# The name of the verifier's file, then what is in it, if it is one.
REWARD = """exec 2>/dev/null; cd /logs/verifier && for file in reward.json reward.txt; do
    [[ -e $file || -L $file ]] && echo $file && [[ -f $file && ! -L $file ]] && exec head -c 65536 $file
done"""


def grade(container) -> float:
    """The reward of who worked in this docker.Container. Raises TerminalDied, or docker_engine.ERRORS."""
    task = container.task
    if not task.environment:
        container.execute("chmod -R a+rX /work", SECONDS)  # root without capabilities reads no more
        code, said = container.execute(task.verify, task.limits.verifier_seconds, user="root")
        if code not in (0, 1):
            raise OSError(f"exited with {code}, not 0 or 1: {said}")
        return 1.0 - code
    verifier = task.environment.verifier
    if not verifier.container:
        if verifier.network != task.environment.network:
            docker_engine.set_network(container.engine, container.id, verifier.network)
        return _test(container, verifier)
    with tempfile.TemporaryFile() as artifacts:
        with tarfile.open(fileobj=artifacts, mode="w") as kept:
            for path, left_out in verifier.artifacts:
                _take(container, path, left_out, kept)
        container.close()  # what the agent left running ends here
        artifacts.seek(0)
        own = replace(task, environment=verifier.container)
        with type(container)(own, 0, container.at_once) as apart, apart.guard(f"the verifier of {task.name}"):
            apart.engine.put_archive(apart.id, "/", artifacts)
            try:
                return _test(apart, verifier)
            finally:
                container.verifier_output = apart.verifier_output


def _test(container, verifier: Verifier) -> float:
    """Run test.sh, which the verifier's image has or else gets, and read the reward that it leaves."""
    task, has_tests = container.task, verifier.has_tests
    code, said = container.execute(CLEAR.format("" if has_tests else "/tests"), SECONDS, user="root")
    if code != 0:
        raise OSError(f"cannot clear /tests and /logs/verifier: {said}")
    if has_tests:
        container.execute(TOOLS + "chmod a+rx /tests /tests/test.sh", SECONDS, user="root")
    else:
        container.copy_in(task.environment.folder / "tests", "/tests")
    try:
        options = {"keep": KEPT_BYTES, "user": verifier.user, "environment": verifier.env}
        code, said = container.execute(task.verify, task.limits.verifier_seconds, **options)
    finally:
        container.verifier_output = container.printed
    _, left = container.execute(TOOLS + REWARD, SECONDS, keep=2 * KEPT_BYTES, user="root")
    name, _, text = left.partition("\n")
    if not text:
        found = f"an empty or unreadable {name}" if name else "no reward in /logs/verifier"
        raise OSError(f"left {found}; it exited with {code}: {said[-500:]}")
    try:
        return _reward(name, text)
    except (ValueError, OverflowError, RecursionError):  # nothing broke: the task grades nobody
        left = f"{text!r:.80} in {name}, not one number in [0, 1]; it exited with {code}: {said[-500:]}"
        raise TerminalDied(f"the verifier of {task.name} left {left}") from None


def _reward(name: str, text: str) -> float:
    """What a reward file says. Raises ValueError, OverflowError or RecursionError if not one in [0, 1]."""
    value = json.loads(text) if name == "reward.json" else float(text)
    if isinstance(value, dict):
        value = next(iter(value.values())) if len(value) == 1 else value.get("reward")
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise ValueError
    return float(value)


def _take(container, path: str, left_out: tuple[str, ...], kept: tarfile.TarFile) -> None:
    """Add an artifact, if there is one, to `kept`: files, folders, and links that stay within it. Any other
    link could show the verifier its own files as the agent's."""
    with tempfile.TemporaryFile() as file:
        try:
            for chunk in container.engine.get_archive(container.id, path)[0]:
                file.write(chunk)
                container.check_storage(file.tell() > 2**20 * (container.storage_mb + 1))
        except docker.errors.NotFound:
            if not container.engine.containers(filters={"id": container.id}):
                raise
            return
        file.seek(0)
        dropped = set()
        with tarfile.open(fileobj=file, mode="r:") as found:
            while (entry := found.next()) is not None:
                found.members.clear()  # there may be millions
                kept.members.clear()
                inside = entry.name.split("/")[1:]
                if not _stays(entry, inside, dropped) or _matches(inside, left_out):
                    dropped.add(entry.name)
                    continue
                content = found.extractfile(entry) if entry.isreg() else None
                entry.name, entry.mode = join(dirname(path), entry.name), entry.mode & 0o1777
                entry.pax_headers = {}  # no capabilities
                if entry.islnk():
                    entry.linkname = join(dirname(path), entry.linkname)
                kept.addfile(entry, content)


def _stays(entry: tarfile.TarInfo, inside: list[str], dropped: set[str]) -> bool:
    """Whether it is a file, a folder, or a link to something within the same artifact."""
    if entry.islnk():
        return entry.linkname not in dropped
    if not entry.issym():
        return entry.isreg() or entry.isdir()
    steps = entry.linkname.split("/")
    up = next((i for i, step in enumerate(steps) if step != ".."), len(steps))
    # a step up behind a name would start from wherever that name leads
    return steps[0] != "" and up < len(inside) and ".." not in steps[up:]


def _matches(inside: list[str], left_out: tuple[str, ...]) -> bool:
    """As tar's --exclude: a pattern for a name, or for several in a row, anywhere in the path."""
    parts = {"/".join(inside[start:end]) for end in range(1, len(inside) + 1) for start in range(end)}
    return any(fnmatchcase(part, pattern) for part in parts for pattern in left_out)
