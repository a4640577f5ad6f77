"""A terminal for one episode: bash shut in by bubblewrap, without root or a container engine.

The agent shares /work and the loopback network with the verifier, nothing else: in its own pid namespace it
can neither see, signal nor trace the supervisor, nor reach the pipe of the verdict. What the relay says is
hearsay. A verifier that RUNS the agent's files gives them its own powers, unless it shuts them in as well:
`setsid unshare -U --map-current-user -pf --mount-proc bash FILE`.

Memory is bounded for each process's address space (memory_mb) and each file system (work_mb): one episode
takes at most processes * memory_mb + 2 * work_mb. Calls that make memory of another kind are refused.
Processes are counted for each sandbox since Linux 5.14, before that for all of them together.
"""

import os
import re
import shlex
import threading
import time
from dataclasses import dataclass

from echo_min.bubblewrap import HELP, PIPE_BYTES, START_SECONDS, Box, SandboxUnavailable, kept_box
from echo_min.tasks import Task

GRACE_SECONDS = 3.0  # beyond a time limit, to kill what is late: milliseconds, but the machine may be crowded
_few_at_a_time = threading.BoundedSemaphore(8)  # to start takes some twenty open files, to run six


@dataclass(frozen=True)
class Output:
    """What a command printed, stdout and stderr as they came, and how it ended. Timed out: exit code 124."""

    text: str
    exit_code: int
    timed_out: bool
    truncated: bool  # text is only the first output_chars characters


class TerminalDied(RuntimeError):
    """The environment itself is gone, or the verifier gave no verdict. Says nothing about the agent."""


def open_terminal(task: Task, backend: str = "sandbox", output_chars: int = 50_000) -> "Terminal":
    """A terminal in a fresh copy of the task's work folder, for a `with` block.

    backend: "sandbox" (bubblewrap) or "docker" (the engine that DOCKER_HOST names). output_chars:
    characters kept of one command's output. Raises ValueError for an unknown backend or a task whose files
    can't be laid out, SandboxUnavailable or EngineUnavailable when no sandbox or no engine can be had here.
    """
    if backend == "docker":
        from echo_min.container import Container  # not before: who uses the sandbox needs no docker package

        return Container(task, output_chars)
    if backend != "sandbox":
        raise ValueError(f"backend: {backend!r} does not exist; there is sandbox, docker")
    if task.environment:
        raise ValueError(f"task {task.name} asks for a container of its own: --backend docker")
    return Sandbox(task, output_chars)


class Terminal:
    """One episode's terminal. Many may run at once in many threads; each serves one thread at a time.

    What each backend has of its own: _command, verify and close.
    """

    def __init__(self, task: Task, output_chars: int):
        """Raises ValueError for a file or tool that would lie elsewhere."""
        self.task, self.output_chars = task, output_chars
        self._text = bytearray()  # of the command at work
        for name in [*task.files, *task.tools]:
            if not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
                raise ValueError(f"task {task.name}: file {name!r} must have a path below the work folder")

    def run(self, command: str, timeout: float | None = None) -> Output:
        """Run it in a fresh bash in the work folder. timeout: seconds; None means the task's command_seconds.

        Its background processes live on, unless it timed out. Raises TerminalDied if the environment is gone,
        or has to go because it holds more than the task's work_mb.
        """
        data = command.encode(errors="replace") + b"\0"
        if data.count(b"\0") > 1 or len(data) > PIPE_BYTES:
            return Output("bash: the command holds a NUL byte or is too long\n", 126, False, False)
        self._text = bytearray()
        said = self._command(data, self.task.limits.command_seconds if timeout is None else timeout)
        text, late = self._text.decode(errors="replace"), said == "late"
        shown = text[: self.output_chars]
        return Output(shown, 124 if late else int(said), late, len(text) > len(shown))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _keep(self, data: bytes) -> None:
        """As much as can be shown, and a little more: a character has up to 4 bytes."""
        self._text += data[: max(0, 4 * self.output_chars + 4 - len(self._text))]


class Sandbox(Terminal):
    def __init__(self, task: Task, output_chars: int):
        super().__init__(task, output_chars)
        layout = _layout(task)
        self._box = kept_box(task.limits, task.tools)
        if self._box is None or self._open(layout) is not None:  # a kept box may have died
            with _few_at_a_time:
                self._box = Box(task.limits, task.tools)
                said = self._open(layout)
            if said is not None:
                said = " ".join((said + self._text).decode(errors="replace").split())
                raise SandboxUnavailable(f"cannot start a sandbox: {said or 'no answer'}; {HELP}")

    def _open(self, layout: bytes) -> bytes | None:
        """Lay out the files and start the relay. -> None, or what was said before the box was closed."""
        box = self._box
        box.send(box.orders, b"open %d\0" % len(layout) + layout)
        said = box.reply(box.verdicts, START_SECONDS) or b""
        if said == b"0" and box.reply(box.status, START_SECONDS, self._collect) == b"ready":
            return None
        box.close()
        if re.fullmatch(rb"[1-9]\d{0,2}", said):
            raise ValueError(f"task {self.task.name}: its files exceed work_mb, or their names clash")
        return said

    def _command(self, data: bytes, seconds: float) -> str:
        deadline, box = time.monotonic() + seconds, self._alive()
        self._send(box.requests, data)
        reply = box.reply(box.status, seconds, self._collect)
        while reply is None and time.monotonic() < deadline + GRACE_SECONDS:
            # Repeated: bash may have been just before `wait`. Acknowledged: none may hit the next command.
            self._send(box.orders, b"late\0")
            if box.reply(box.verdicts, GRACE_SECONDS, self._collect) != b"sent":
                break
            reply = box.reply(box.status, 0.1, self._collect)
        if not re.fullmatch(rb"late|\d{1,3}", reply or b""):
            self._die("the sandbox " + ("does not answer" if reply is None else f"broke down: {reply!r}"))
        self._collect()
        return reply.decode()

    def verify(self) -> float:
        """1.0 or 0.0, as the task's verifier says. Raises TerminalDied when it says neither."""
        seconds, verifier = self.task.limits.verifier_seconds, self.task.verify.encode()
        box = self._alive()
        self._send(box.orders, b"verify %d\0" % len(verifier) + verifier)
        reply = box.reply(box.verdicts, seconds, self._collect)
        if reply not in (b"0", b"1"):
            said = f"exited with {reply.decode()}" if reply else "did not answer"
            self._die(f"the verifier of {self.task.name} {said}; it must exit with 0 or 1 within {seconds} s")
        return 1.0 if reply == b"0" else 0.0

    def close(self) -> None:
        """End every process of the episode; may be called again."""
        box, self._box = self._box, None
        if box:
            box.keep()

    def _alive(self) -> Box:
        if self._box is None:
            raise TerminalDied("the sandbox is closed")
        return self._box

    def _die(self, reason: str):
        box, self._box = self._box, None
        box.close()
        raise TerminalDied(reason)

    def _send(self, end: int, data: bytes) -> None:
        if not self._box.send(end, data):
            self._die("the sandbox does not listen")

    def _collect(self) -> int:
        """Take what is in the output pipe. -> how many bytes"""
        try:
            data = os.read(self._box.output, PIPE_BYTES)
        except BlockingIOError:
            return 0
        self._keep(data)
        return len(data)


def _layout(task: Task) -> bytes:
    """The work folder's files as a bash script of builtins (a fork costs as much as the rest of it)."""
    folders = {f"/work/{folder}" for name in task.files if (folder := os.path.dirname(name))}
    lines = [f"mkdir -p -- {shlex.join(sorted(folders))}"] if folders else []
    for name, content in task.files.items():
        octal = "".join(chr(b) if chr(b).isalnum() and b < 128 else f"\\0{b:03o}" for b in content)
        lines.append(f"printf %b '{octal}' > {shlex.quote(f'/work/{name}')}")
    return " && ".join(lines).encode()
