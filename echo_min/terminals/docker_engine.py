"""The Docker engine that DOCKER_HOST names (else the local one): its client, what dead runs left there, the
images of tasks, and how bytes get in and out of a container."""

import contextlib
import functools
import hashlib
import io
import os
import re
import socket
import sys
import tarfile
import threading
import time
from datetime import datetime
from pathlib import Path

import docker
import urllib3

from echo_min.config import RunEnded
from echo_min.tasks import Task

BASE = os.environ.get("ECHO_MIN_BASE_IMAGE", "")  # instead of a public one, where no registry is reached
DEFAULT = "debian:bookworm"  # for generated tasks
LABEL = "echo_min.run"
LEFT_ALONE = 77  # exit code of a relay whose connection ended
LIFE_SECONDS = 12 * 3600  # of a container, at most
PULL_SECONDS = 1800.0
SEND_SECONDS = 60.0
ERRORS = docker.errors.DockerException, urllib3.exceptions.HTTPError, tarfile.TarError, OSError, EOFError
_few_at_a_time = threading.BoundedSemaphore(4)  # images
_locks: dict[str, threading.Lock] = {}
_known: dict[str, str] = {}  # image -> why it cannot be made, or nothing


class EngineUnavailable(RunEnded):
    """No Docker engine answers. The message says what to do."""


@functools.cache
def connect() -> docker.APIClient:
    """One client for all threads. The first call removes what dead runs left. Raises EngineUnavailable."""
    try:
        client = docker.from_env(max_pool_size=64).api
        _sweep(client)
    except ERRORS as error:
        where = os.environ.get("DOCKER_HOST", "the local socket")
        lacks = f"no Docker engine answers at {where}: {error}"
        raise EngineUnavailable(f"{lacks}; start dockerd, or set DOCKER_HOST") from error
    return client


def this_run(pid: int | str = "self") -> str:
    """Names a process: host, pid, and when it started, in ticks. Of one that is no more: the host alone."""
    with contextlib.suppress(OSError):
        pid, _, rest = Path(f"/proc/{pid}/stat").read_text().partition(" (")
        return f"{socket.gethostname()} {pid} {rest.rpartition(')')[2].split()[19]}"
    return socket.gethostname()


def _sweep(client: docker.APIClient) -> None:
    """Remove the containers of runs of this host that are no more, and those of any run beyond their time."""
    for container in client.containers(all=True, filters={"label": LABEL}):
        run = container["Labels"][LABEL]
        dead = run.split()[0] == socket.gethostname() and run != this_run(run.split()[1])
        if dead or time.time() - container["Created"] > LIFE_SECONDS:
            with contextlib.suppress(docker.errors.APIError):  # it may be going by itself
                client.remove_container(container["Id"], force=True, v=True)


@functools.cache
def network(client: docker.APIClient) -> str:
    """A network whose containers reach the world, but not each other."""
    if "echo_min" not in [found["Name"] for found in client.networks()]:
        apart = {"com.docker.network.bridge.enable_icc": "false"}
        client.create_network("echo_min", driver="bridge", options=apart, check_duplicate=True)
    return "echo_min"


def set_network(client: docker.APIClient, container: str, wanted: bool) -> None:
    for name in client.inspect_container(container)["NetworkSettings"]["Networks"]:
        client.disconnect_container_from_network(container, name)
    if wanted:
        client.connect_container_to_network(container, network(client))


@functools.cache
def share(client: docker.APIClient, at_once: int) -> tuple[int, int, int]:
    """cpus, MiB of memory, MiB of storage where a task names none; half of the memory is for all together."""
    engine = client.info()
    usual = {"CPUS": engine["NCPU"], "MEMORY_MB": engine["MemTotal"] // 2**21 // at_once, "STORAGE_MB": 10240}
    for name in usual:
        text = os.environ.get(f"ECHO_MIN_{name}", str(usual[name]))
        if not re.fullmatch(r"[1-9]\d{0,8}", text, re.ASCII):
            raise EngineUnavailable(f"ECHO_MIN_{name}: expected a whole number above 0, got {text!r}")
        usual[name] = int(text)
    gets = ", ".join(f"{value} {name} (ECHO_MIN_{name})" for name, value in usual.items())
    print(f"a task that names none gets {gets}", file=sys.stderr, flush=True)
    return tuple(usual.values())


def is_well(client: docker.APIClient, container: str, error: Exception, attached: bool) -> bool:
    """Whether what failed is inside the container: it runs, and no connection failed; or it ended, by the
    engine's events neither by a command to the engine, nor with the connection, nor by the host."""
    refused = isinstance(error, docker.errors.APIError) and error.is_client_error()
    refused = refused and error.status_code != 404  # the engine forgot a command, as after a long pause
    try:
        for _ in range(20):
            if not client.containers(filters={"id": container, "status": "running"}):
                break
            if refused or type(error) in (OSError, TimeoutError):
                return attached
            time.sleep(0.1)  # it may be ending
        until = 1 + int(datetime.fromisoformat(client.info()["SystemTime"]).timestamp())
        found = client.events(since=0, until=until, filters={"container": container}, decode=True)
        events = [(event["Action"], event["Actor"]["Attributes"]) for event in found]
    except ERRORS:
        return False
    told = any(action == "kill" and said["signal"] != "23" for action, said in events)  # 23: our SIGURG
    codes = [int(said["exitCode"]) for action, said in events if action == "die"]
    host = 137 in codes and "oom" not in dict(events)  # SIGKILL reaches it from outside only
    return bool(codes) and not (told or host or LEFT_ALONE in codes)


def image_of(client: docker.APIClient, task: Task) -> str:
    """The name of the task's image, which is then on the engine. Raises one of ERRORS that says why not."""
    environment = task.environment
    name = environment.image if environment else BASE or DEFAULT
    name = name or f"echo_min:{_digest(environment.folder / environment.build)}"
    with _locks.setdefault(name, threading.Lock()):
        if name not in _known:
            try:
                client.inspect_image(name)
                _known[name] = ""
            except docker.errors.ImageNotFound:
                with _few_at_a_time:
                    _known[name] = _make(client, task, name)
    if failure := _known[name]:
        raise OSError(f"no image {name}: {' '.join(failure.split())}")
    return name


def _make(client: docker.APIClient, task: Task, name: str) -> str:
    """Build or pull an image. -> why it could not be made, or nothing. OSError: the engine failed."""
    build, started = name.startswith("echo_min:"), time.monotonic()
    seconds = task.environment.build_seconds if build else PULL_SECONDS
    said, outcome = "", f"not done after {seconds:g} s"
    what = f"{task.name}: {'building' if build else 'pulling'} {name}"
    print(f"{what} ...", file=sys.stderr, flush=True)

    def work() -> None:
        nonlocal said, outcome
        try:
            if build:
                environment, base = task.environment, {"BASE": BASE} if BASE else {}
                folder = str(environment.folder / environment.build)
                options = {"rm": True, "forcerm": True, "timeout": seconds, "buildargs": base}
                lines = client.build(folder, tag=name, decode=True, **options)
            else:
                lines = client.pull(name, stream=True, decode=True)
            for line in lines:
                said += line.get("stream", "")
                if "error" in line or time.monotonic() - started > seconds:
                    outcome = line.get("error", outcome)
                    return  # leaving the loop ends the build
            outcome = ""
        except ERRORS as error:
            outcome = error

    thread = threading.Thread(target=work, daemon=True)  # a pull that stalls has no time limit of its own
    thread.start()
    thread.join(seconds + 1)
    if isinstance(outcome, Exception):  # not remembered: the engine may be back
        raise OSError(f"no image {name}: {outcome}") from outcome
    if outcome:
        return f"{outcome}: {said[-500:]}"
    print(f"{what}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return ""


def _digest(folder: Path) -> str:
    """Of all that goes into the image, so that a task which changes gets a new one."""
    digest = hashlib.sha256(BASE.encode())
    for path in sorted(folder.rglob("*")):
        link, plain = path.is_symlink(), path.is_file()
        content = os.readlink(path).encode() if link else path.read_bytes() if plain else b""
        digest.update(f"{path.relative_to(folder)}\0{path.lstat().st_mode}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:24]


class Stream:
    """Stdin and output of a container or a command; output comes in frames: 8 bytes (4: a length), data."""

    def __init__(self, raw):
        self._raw, self._socket, self._come = raw, getattr(raw, "_sock", raw), b""

    def send(self, data: bytes) -> None:
        self._socket.settimeout(SEND_SECONDS)
        self._socket.sendall(data)

    def receive(self, seconds: float) -> bytes:
        """The frames that have come, perhaps none. Raises EOFError at the output's end."""
        self._socket.settimeout(seconds)
        try:
            data = self._socket.recv(1 << 16)
        except TimeoutError:
            return b""
        if not data:
            raise EOFError("the connection is closed")
        self._come, output = self._come + data, b""
        while len(self._come) >= (end := 8 + int.from_bytes(self._come[4:8], "big")):
            output, self._come = output + self._come[8:end], self._come[end:]
        return output

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.close()
            self._raw.close()


def archive(entries: list[tuple[str, bytes | None, int, int]]) -> bytes:
    """A tar of (path, content or None for a folder, owner, permissions)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, content, owner, mode in entries:
            entry = tarfile.TarInfo(path)
            entry.uid, entry.gid, entry.mode, entry.size = owner, owner, mode, len(content or b"")
            entry.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            tar.addfile(entry, io.BytesIO(content or b""))
    return buffer.getvalue()


def archive_of(folder: Path, target: str) -> bytes:
    """A tar of the folder as `target`, owned by root, for all to read (and run, if it is a shell script)."""

    def owned_by_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        open_to_all = 0o555 if entry.isdir() or entry.name.endswith(".sh") else 0o444
        return entry.replace(uid=0, gid=0, uname="", gname="", mode=entry.mode | open_to_all)

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(folder, target.strip("/"), filter=owned_by_root)
    return buffer.getvalue()
