"""A terminal for one episode: a container on the Docker engine that DOCKER_HOST names (else the local one).

    host -- attach: stdin, stdout --> relay (bash, pid 1, out of reach of signals): the agent's commands
         -- exec, as the image's user --> the verifier, when the agent has finished

The container ends with the connection that it was started on, with the relay's own clock, or by `close`. A
Harbor task's agent may be root in the container that its verifier shares, as in Harbor: a `python` it has
replaced is the verifier's too. A generated task's agent is a plain user without capabilities.
"""

import contextlib
import json
import re
import secrets
import threading
import time
from datetime import datetime
from pathlib import Path

import docker

from echo_min.tasks import Task
from echo_min.terminal import GRACE_SECONDS, BrokenByAgent, Terminal, TerminalDied
from echo_min.terminals import docker_engine
from echo_min.terminals.bubblewrap import PIPE_BYTES, RELAY, USERS
from echo_min.terminals.docker_engine import ERRORS, Stream
from echo_min.worlds.harbor import Environment

START_SECONDS = 60.0  # until it answers
DISK_SECONDS = 2.0  # between looks at how much a command has written
QUICK_SECONDS = 0.1  # a command that takes no longer is not looked at
GENERATED = Environment(Path(), workdir="/work", env={"HOME": "/work", "PATH": "/opt/tools:/usr/bin:/bin"})
CLEAR = """PATH=/usr/bin:/bin:/usr/sbin:/sbin
rm -rf -- /tests /logs/verifier && mkdir -p /logs/verifier && chmod 777 /logs/verifier"""
# The name of the verifier's file, then what is in it, if it is one.
REWARD = """PATH=/usr/bin:/bin:/usr/sbin:/sbin; exec 2>/dev/null
cd /logs/verifier && for file in reward.json reward.txt; do
    [[ -e $file || -L $file ]] && echo $file && [[ -f $file && ! -L $file ]] && exec head -c 65536 $file
done"""
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
# what an engine says together with its headers is lost in the client's buffer.
BY_STDIN = 'IFS= read -r -d "" script; exec </dev/null; eval "$script"'
LEFT_ALONE = 77  # exit code of a relay whose connection ended
START = f'read -r -d "" relay; eval "$relay"; exit {LEFT_ALONE}'  # by stdin, so that `ps` stays short
_few_at_a_time = threading.BoundedSemaphore(8)  # to start; as many may run as there are threads


class Container(Terminal):
    def __init__(self, task: Task, output_chars: int):
        super().__init__(task, output_chars)
        self._id = self._stream = None
        self._engine, self._mark, self._unread = docker_engine.connect(), secrets.token_hex(16), b""
        self._answer = re.compile(self._mark.encode() + rb"(ready|late|\d{1,3})\n")
        settings = {"life": docker_engine.LIFE_SECONDS, "processes": task.limits.processes}
        script = PRELUDE.format(mark=self._mark, **settings) + RELAY + "\0"
        with self._guard("cannot start its container"):
            image = docker_engine.image_of(self._engine, task)
            with _few_at_a_time:
                self._create(image)
                attached = {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
                self._stream = Stream(self._engine.attach_socket(self._id, attached))
                self._engine.start(self._id)
                self._stream.send(script.encode())
                with contextlib.suppress(EOFError):
                    if self._reply(START_SECONDS) == "ready":
                        return
            raise TimeoutError(f"no answer: {(self._text + self._unread)[:500].decode(errors='replace')}")

    def _create(self, image: str) -> None:
        """A container that is not started yet, with the task's files in it."""
        task, generated = self.task, not self.task.environment
        asked, memory = task.environment or GENERATED, task.limits.memory_mb * 2**20
        limits = self._engine.create_host_config(
            mem_limit=memory, memswap_limit=memory, auto_remove=True, security_opt=["no-new-privileges:true"],
            cpu_quota=int(1e5 * min(asked.cpus, 1024)),  # us of 100 ms; may be more than there are
            pids_limit=task.limits.processes + 16,  # room for the verifier to start
            network_mode=docker_engine.network(self._engine) if asked.network else "none",
            cap_drop=["ALL"] if generated else ["NET_RAW"],  # raw frames reach neighbours
            log_config={"type": "none"},  # else what is printed fills the engine's disk
        )  # fmt: skip
        self._id = self._engine.create_container(
            image, ["bash", "-c", START], user="1000:1000" if generated else None, hostname="sandbox",
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
            self._engine.put_archive(self._id, "/", docker_engine.archive(files))

    def _command(self, data: bytes, seconds: float) -> str:
        if self._id is None:
            raise TerminalDied("the container is closed")
        started, reply = time.monotonic(), None
        with self._guard("its container failed"):
            self._stream.send(data)
            while (left := started + seconds - time.monotonic()) > 0:
                if (reply := self._reply(min(left, DISK_SECONDS))) is not None:
                    break
                self._check_disk()
            grace = time.monotonic() + GRACE_SECONDS
            while reply is None and time.monotonic() < grace:
                # Repeated: bash may have been just before `wait`. It returns when the signal is delivered.
                self._engine.kill(self._id, "SIGURG")
                reply = self._reply(0.2)
            if reply in (None, "ready"):  # an agent that is root can forge answers
                raise TimeoutError("its relay does not answer")
            if time.monotonic() - started > QUICK_SECONDS:
                self._check_disk()
        return reply

    def copy_in(self, folder: Path, target: str) -> None:
        with self._guard(f"cannot copy {folder} into its container"):
            self._engine.put_archive(self._id, "/", docker_engine.archive_of(folder, target))

    def verify(self) -> float:
        task, seconds = self.task, self.task.limits.verifier_seconds
        with self._guard(f"the verifier of {task.name}"):
            self._check_disk()
            if not task.environment:
                self._exec("chmod -R a+rX /work", START_SECONDS)  # root without capabilities reads no more
                code, said = self._exec(task.verify, seconds, user="root")
                if code not in (0, 1):
                    raise OSError(f"exited with {code}, not 0 or 1: {said}")
                return 1.0 - code
            code, said = self._exec(CLEAR, START_SECONDS, user="root")
            if code != 0:
                raise OSError(f"cannot clear /tests and /logs/verifier: {said}")
            self.copy_in(task.environment.folder / "tests", "/tests")
            code, said = self._exec(task.verify, seconds, environment=task.environment.verifier_env)
            _, left = self._exec(REWARD, START_SECONDS, keep=2 * PIPE_BYTES, user="root")
            name, _, text = left.partition("\n")
            if not text:
                found = f"an empty or unreadable {name}" if name else "no reward in /logs/verifier"
                raise OSError(f"left {found}; it exited with {code}: {said}")
            try:
                return _reward(name, text)
            except (ValueError, OverflowError, RecursionError):  # nothing broke: the task grades nobody
                left = f"{text!r:.80} in {name}, not one number in [0, 1]; it exited with {code}: {said}"
                raise TerminalDied(f"the verifier of {task.name} left {left}") from None

    def close(self) -> None:
        (gone, self._id), (stream, self._stream) = (self._id, None), (self._stream, None)
        if stream:
            stream.close()
        if gone:
            with contextlib.suppress(*ERRORS):  # gone already, or the engine is; the next run sweeps
                self._engine.remove_container(gone, force=True, v=True)

    @contextlib.contextmanager
    def _guard(self, what: str):
        """The engine's failures, as the contract has them; a terminal that failed is closed."""
        try:
            yield
        except ERRORS as error:
            died = BrokenByAgent if self._is_engine_well(error) else TerminalDied
            self.close()
            raise died(f"task {self.task.name}: {what}: {error}") from error
        except BaseException:
            self.close()
            raise

    def _is_engine_well(self, error: Exception) -> bool:
        """Whether what failed is inside the container: it runs, and no connection failed; or it ended, by the
        engine's events neither by a command to the engine, nor with the connection, nor by the host."""
        refused = isinstance(error, docker.errors.APIError) and error.is_client_error()
        refused = refused and error.status_code != 404  # the engine forgot a command, as after a long pause
        try:
            for _ in range(20):
                if not self._engine.containers(filters={"id": self._id, "status": "running"}):
                    break
                if refused or type(error) in (OSError, TimeoutError):
                    return self._stream is not None
                time.sleep(0.1)  # it may be ending
            until = 1 + int(datetime.fromisoformat(self._engine.info()["SystemTime"]).timestamp())
            found = self._engine.events(since=0, until=until, filters={"container": self._id}, decode=True)
            events = [(event["Action"], event["Actor"]["Attributes"]) for event in found]
        except ERRORS:
            return False
        told = any(action == "kill" and said["signal"] != "23" for action, said in events)  # 23: our SIGURG
        codes = [int(said["exitCode"]) for action, said in events if action == "die"]
        host = 137 in codes and "oom" not in dict(events)  # SIGKILL reaches it from outside only
        return bool(codes) and not (told or host or LEFT_ALONE in codes)

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

    def _check_disk(self) -> None:
        listed = self._engine.containers(filters={"id": self._id}, size=True)
        size = listed[0].get("SizeRw", 0) if listed else 0
        if size < 0 or size > self.task.limits.work_mb * 2**20:  # below 0: the engine could not count it
            raise OSError(f"it holds more than {self.task.limits.work_mb} MiB")

    def _exec(self, script: str, seconds: float, keep: int = 500, **options) -> tuple[int, str]:
        """Run a script of ours. -> exit code, the last bytes of its output. Raises one of ERRORS."""
        said, deadline = b"", time.monotonic() + seconds
        command = ["bash", "--norc", "--noprofile", "-c", BY_STDIN]
        made = self._engine.exec_create(self._id, command, stdin=True, **options)
        with contextlib.closing(Stream(self._engine.exec_start(made, socket=True))) as stream:
            stream.send(script.encode() + b"\0")
            with contextlib.suppress(EOFError):
                while (left := deadline - time.monotonic()) > 0:
                    if not (data := stream.receive(min(left, DISK_SECONDS))):
                        self._check_disk()
                    said = (said + data)[-keep:]
        while (code := self._engine.exec_inspect(made)["ExitCode"]) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"limited to {seconds:g} s, it did not end")
            time.sleep(0.01)
        return code, said.decode(errors="replace").strip()


def _reward(name: str, text: str) -> float:
    """What a reward file says. Raises ValueError, OverflowError or RecursionError if not one in [0, 1]."""
    value = json.loads(text) if name == "reward.json" else float(text)
    if isinstance(value, dict):
        value = next(iter(value.values())) if len(value) == 1 else value.get("reward")
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise ValueError
    return float(value)
