"""A terminal for one episode: a container on the Docker engine that DOCKER_HOST names (else the local one).

    host -- attach: stdin, stdout --> relay (bash, pid 1, out of reach of signals): the agent's commands
         -- exec, as the image's user --> the verifier, when the agent has finished

The container ends with the connection that it was started on, with the relay's own clock, or by `close`. How
the work in it is graded: grading.py. A generated task's agent is a plain user without capabilities.
"""

import contextlib
import re
import secrets
import threading
import time
from dataclasses import replace
from pathlib import Path

from echo_min.tasks import Task
from echo_min.terminal import GRACE_SECONDS, BrokenByAgent, Terminal, TerminalDied
from echo_min.terminals import docker_engine, grading
from echo_min.terminals.bubblewrap import RELAY, USERS
from echo_min.terminals.docker_engine import ERRORS, Stream
from echo_min.worlds.harbor import Environment, Healthcheck

START_SECONDS = 60.0  # until it answers
QUICK_SECONDS = 0.1  # a command that takes no longer is not looked at for what it writes
LOOK_SECONDS = 0.25  # at work, between questions whether it holds too much
GENERATED = Environment(Path(), workdir="/work", env={"HOME": "/work", "PATH": "/opt/tools:/usr/bin:/bin"})
# Ahead of the relay. Its clock: a read from a pipe that nobody writes to, then a signal of its own. That ends
# a `wait` but not a `read`, which gets an empty command. (A time limit on it makes bash mortal to TERM.)
PRELUDE = """exec 2>&1; export LC_ALL=C; trap exit RTMIN+9
(($$ == 1)) || {{ echo "the image's ENTRYPOINT does not exec its command"; exit; }}
exec {{never}}<> <(:)
{{ read -r -t {life} -N 1 -u $never; kill -RTMIN+9 $$; printf '\\0' >/proc/$$/fd/0
}} </dev/null &>/dev/null & exec {{never}}>&-
mark={mark} processes={processes} limits='-c 0'
"""
# Where the agent can't read it, as it could a process's arguments. Nor does anything come before it is sent:
# what an engine says together with its headers is lost in the client's buffer. And `ps` stays short.
BY_STDIN = 'IFS= read -r -d "" script; exec </dev/null 2>&1; eval "$script"'
START = f'read -r -d "" relay; eval "$relay"; exit {docker_engine.LEFT_ALONE}'
# Of an agent that is not the image's user. A number without a name is its group's as well, and has no home.
AS_USER = """exec 2>&1; groups=--clear-groups group=$0 home=/
if name=$(id -nu -- "$0"); then groups=--init-groups group=$(id -g -- "$0"); eval "home=~$name"
elif [[ $0 != +([0-9]) ]]; then exit; fi
HOME=$home exec setpriv --reuid "$0" --regid "$group" $groups bash -c "$1\""""
_few_at_a_time = threading.BoundedSemaphore(8)  # to start; as many may run as there are threads


class Container(Terminal):
    def __init__(self, task: Task, output_chars: int, at_once: int = 1):
        super().__init__(task, output_chars, at_once)
        self.id = self._stream = None
        self.engine, self._mark, self._unread = docker_engine.connect(), secrets.token_hex(16), b""
        self._answer = re.compile(self._mark.encode() + rb"(ready|late|\d{1,3})\n")
        self._look, self._full, self.printed = threading.Event(), False, ""  # by the last script of ours
        settings = {"life": docker_engine.LIFE_SECONDS, "processes": task.limits.processes}
        script = PRELUDE.format(mark=self._mark, **settings) + RELAY + "\0"
        with self.guard("cannot start its container", by_agent=False):
            self.image = docker_engine.image_of(self.engine, task)
            with _few_at_a_time:
                self._create()
                attached = {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
                self._stream = Stream(self.engine.attach_socket(self.id, attached))
                self.engine.start(self.id)
                self._stream.send(script.encode())
                ready = False
                with contextlib.suppress(EOFError):
                    ready = self._reply(START_SECONDS) == "ready"
            if not ready:
                raise TimeoutError(f"no answer: {(self._text + self._unread)[:500].decode(errors='replace')}")
            if task.environment and task.environment.healthcheck:
                self._await_health(task.environment.healthcheck)
        threading.Thread(target=self._watch, daemon=True).start()

    def _create(self) -> None:
        """A container that is not started yet, with the task's files in it."""
        task, generated = self.task, not self.task.environment
        sizes = {"cpus": 1.0, "memory_mb": task.limits.memory_mb, "storage_mb": task.limits.work_mb}
        asked = task.environment or replace(GENERATED, **sizes)
        named = asked.cpus, asked.memory_mb, asked.storage_mb
        usual = named if all(named) else docker_engine.share(self.engine, self.at_once)
        cpus, memory_mb, self.storage_mb = (n or u for n, u in zip(named, usual, strict=True))
        limits = self.engine.create_host_config(
            mem_limit=memory_mb * 2**20, memswap_limit=memory_mb * 2**20, auto_remove=True,
            cpu_quota=int(1e5 * min(cpus, 1024)),  # us of 100 ms; may be more than there are
            pids_limit=task.limits.processes + 16,  # room for the verifier to start
            network_mode=docker_engine.network(self.engine) if asked.network else "none",
            cap_drop=["ALL"] if generated else ["NET_RAW"],  # raw frames reach neighbours
            security_opt=["no-new-privileges:true"], log_config={"type": "none"},  # a log fills the disk
        )  # fmt: skip
        self.id = self.engine.create_container(
            self.image, ["bash", "-c", *([AS_USER, asked.user, START] if asked.user else [START])],
            user="1000:1000" if generated else None, hostname="sandbox",
            environment=asked.env, working_dir=asked.workdir or None, use_config_proxy=False,
            stdin_open=True,  # and, not detached, closed when the host's connection is
            labels={docker_engine.LABEL: docker_engine.this_run()}, host_config=limits,
        )["Id"]  # fmt: skip
        if generated:
            folders = {str(folder) for name in task.files for folder in Path("work", name).parents[:-1]}
            files = [(name, None, 1000, 0o755) for name in sorted({"work", *folders})]
            files += [(f"work/{name}", content, 1000, 0o644) for name, content in task.files.items()]
            files += [(f"opt/tools/{name}", content, 0, 0o555) for name, content in task.tools.items()]
            files += [(f"etc/{name}", content, 0, 0o444) for name, content in USERS.items()]
            self.engine.put_archive(self.id, "/", docker_engine.archive(files))

    def _command(self, data: bytes, seconds: float) -> str:
        if self.id is None:
            raise TerminalDied("the container is closed")
        started, reply = time.monotonic(), None
        with self.guard("its container failed"):
            self._stream.send(data)
            while (left := started + seconds - time.monotonic()) > 0:
                if (reply := self._reply(min(left, LOOK_SECONDS))) is not None:
                    break
                self._look_aside()
            grace = time.monotonic() + GRACE_SECONDS
            while reply is None and time.monotonic() < grace:
                # Repeated: bash may have been just before `wait`. It returns when the signal is delivered.
                self.engine.kill(self.id, "SIGURG")
                reply = self._reply(0.2)
            if reply in (None, "ready"):  # an agent that is root can forge answers
                raise TimeoutError("its relay does not answer")
            if time.monotonic() - started > QUICK_SECONDS:
                self._look_aside()
        return reply

    def copy_in(self, folder: Path, target: str) -> None:
        with self.guard(f"cannot copy {folder} into its container"):
            self.engine.put_archive(self.id, "/", docker_engine.archive_of(folder, target))

    def verify(self) -> float:
        with self.guard(f"the verifier of {self.task.name}"):
            self.check_storage(self._full or self._is_full())
            return grading.grade(self)

    def close(self) -> None:
        (gone, self.id), (stream, self._stream) = (self.id, None), (self._stream, None)
        self._look.set()  # ends the watch
        if stream:
            stream.close()
        if gone:
            with contextlib.suppress(*ERRORS):  # gone already, or the engine is; the next run sweeps
                self.engine.remove_container(gone, force=True, v=True)

    @contextlib.contextmanager
    def guard(self, what: str, by_agent: bool = True):
        """The engine's failures, as the contract has them; a terminal that failed is closed."""
        try:
            yield
        except ERRORS as error:
            well = by_agent and docker_engine.is_well(self.engine, self.id, error, self._stream is not None)
            died = BrokenByAgent if well else TerminalDied
            self.close()
            raise died(f"task {self.task.name}: {what}: {error}") from error
        except BaseException:
            self.close()
            raise

    def _reply(self, seconds: float) -> str | None:
        """What the relay says; None if it says nothing in time. What comes before that is the output."""
        deadline = time.monotonic() + seconds
        while not (found := self._answer.search(self._unread)):
            rest = max(0, len(self._unread) - len(self._mark) - 8)  # an answer may have come in part
            self._keep(self._unread[:rest])
            self._unread = self._unread[rest:]
            if (left := deadline - time.monotonic()) <= 0:
                return None
            self._unread += self._stream.receive(left)
        self._keep(self._unread[: found.start()])
        self._unread = self._unread[found.end() :]
        return found[1].decode()

    def _is_full(self) -> bool:
        sizes = [c.get("SizeRw", 0) for c in self.engine.containers(filters={"id": self.id}, size=True)]
        return any(size < 0 or size > self.storage_mb * 2**20 for size in sizes)  # below 0: not counted

    def _watch(self) -> None:
        """Counts aside what the container holds: of many files that takes longer than a command."""
        while self._look.wait():
            self._look.clear()
            if self.id is None:
                return
            started = time.monotonic()
            with contextlib.suppress(*ERRORS):  # an engine that fails shows elsewhere
                self._full = self._full or self._is_full()
            time.sleep(LOOK_SECONDS + min(time.monotonic() - started, 1.0))

    def _look_aside(self) -> None:
        self._look.set()
        self.check_storage(self._full)

    def check_storage(self, full: bool) -> None:
        if full:
            raise OSError(f"it holds more than {self.storage_mb} MiB")

    def _await_health(self, check: Healthcheck) -> None:
        started, failures = time.monotonic(), 0
        while failures < check.retries:
            try:
                code, said = self.execute(check.command, check.timeout_sec)
            except TimeoutError as error:
                code, said = -1, str(error)
            if code == 0:
                return
            early = time.monotonic() - started < check.start_period_sec
            failures += not early
            time.sleep(check.start_interval_sec if early else check.interval_sec)
        raise OSError(f"its healthcheck failed {failures} times: {said}")

    def execute(self, script: str, seconds: float, keep: int = 500, **options) -> tuple[int, str]:
        """Run a script of ours. -> exit code, the last bytes of its output. Raises one of ERRORS."""
        said, self.printed, deadline = b"", "", time.monotonic() + seconds
        command = ["bash", "--norc", "--noprofile", "-c", BY_STDIN]
        made = self.engine.exec_create(self.id, command, stdin=True, **options)
        with contextlib.closing(Stream(self.engine.exec_start(made, socket=True))) as stream:
            stream.send(script.encode() + b"\0")
            with contextlib.suppress(EOFError):
                while (left := deadline - time.monotonic()) > 0:
                    if not (data := stream.receive(min(left, LOOK_SECONDS))):
                        self._look_aside()
                    said = (said + data)[-keep:]
        self.printed = said.decode(errors="replace").strip()
        while (code := self.engine.exec_inspect(made)["ExitCode"]) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"limited to {seconds:g} s, it did not end: {self.printed[-500:]}")
            time.sleep(0.01)
        return code, self.printed
