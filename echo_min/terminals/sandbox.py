"""A terminal for one episode: bash shut in by bubblewrap, without root or a container engine.

The agent shares /work and the loopback network with the verifier, nothing else: in its own pid namespace it
can neither see, signal nor trace the supervisor, nor reach the pipe of the verdict. What the relay says is
hearsay. A verifier that RUNS the agent's files gives them its own powers, unless it shuts them in as well:
`setsid unshare -U --map-current-user -pf --mount-proc bash FILE`.

README.md says what is bounded. Processes are counted for each sandbox since Linux 5.14, before that for all.
"""

import os
import re
import shlex
import threading
import time
from pathlib import Path

from echo_min.tasks import Task
from echo_min.terminal import GRACE_SECONDS, BrokenByAgent, Terminal, TerminalDied
from echo_min.terminals.bubblewrap import HELP, PIPE_BYTES, START_SECONDS, Box, SandboxUnavailable, kept_box

INLINE_BYTES = 2048  # bash reads its orders byte by byte
_few_at_a_time = threading.BoundedSemaphore(8)  # to start takes some twenty open files, to run seven


class Sandbox(Terminal):
    def __init__(self, task: Task, output_chars: int, at_once: int = 1):
        super().__init__(task, output_chars, at_once)
        layout = _layout(task.files)
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
        box.send(box.orders, layout + b"start\0")
        said = box.answer(box.verdicts, START_SECONDS) or b""
        if said == b"0" and box.answer(box.status, START_SECONDS, self._collect) == b"ready":
            return None
        box.close()
        if re.fullmatch(rb"[1-9]\d{0,2}", said):
            raise ValueError(f"task {self.task.name}: its files exceed work_mb, or their names clash")
        return said

    def _command(self, data: bytes, seconds: float) -> str:
        deadline, box = time.monotonic() + seconds, self._alive()
        self._send(box.requests, data)
        answer = box.answer(box.status, seconds, self._collect)
        while answer is None and time.monotonic() < deadline + GRACE_SECONDS:
            # Repeated: bash may have been just before `wait`. Acknowledged: none may hit the next command.
            self._send(box.orders, b"late\0")
            if box.answer(box.verdicts, GRACE_SECONDS, self._collect) != b"sent":
                break
            answer = box.answer(box.status, 0.1, self._collect)
        if not re.fullmatch(rb"late|\d{1,3}", answer or b""):
            self._die("the sandbox " + ("does not answer" if answer is None else f"broke down: {answer!r}"))
        self._collect()
        return answer.decode()

    def verify(self) -> float:
        """1.0 or 0.0, as the task's verifier says. Raises TerminalDied when it says neither."""
        seconds, verifier, box = self.task.limits.verifier_seconds, self.task.verify.encode(), self._alive()
        self._send(box.orders, b"verify %d\0" % len(verifier) + verifier)
        answer = box.answer(box.verdicts, seconds, self._collect)
        if answer not in (b"0", b"1"):
            said = f"exited with {answer.decode()}" if answer else "did not answer"
            late = answer is None and box.process.poll() is None
            reason = f"the verifier of {self.task.name} {said}; it must exit with 0 or 1 within {seconds} s"
            self._die(reason, well=late)
        return 1.0 if answer == b"0" else 0.0

    def copy_in(self, folder: Path, target: str) -> None:
        if not Path(target).is_relative_to("/work") or ".." in Path(target).parts:
            raise ValueError(f"a sandbox takes files below /work alone, not in {target!r}")
        box, inside = self._alive(), Path(target).relative_to("/work")
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {str(inside / path.relative_to(folder)): path.read_bytes() for path in paths}
        box.send(box.orders, _layout(files))
        if box.answer(box.verdicts, START_SECONDS, self._collect) != b"0":
            self._die(f"{folder} could not be copied to {target}: it exceeds work_mb, or names clash")

    def close(self) -> None:
        box, self._box = self._box, None
        if box:
            box.keep()

    def _alive(self) -> Box:
        if self._box is None:
            raise TerminalDied("the sandbox is closed")
        return self._box

    def _die(self, reason: str, well: bool = False):
        """well: the supervisor is at work. Out of the agent's reach, it also shows that by an answer."""
        box, self._box = self._box, None
        well = well or (box.send(box.orders, b"files 0\0") and box.answer(box.verdicts, 1.0) == b"0")
        box.close()
        raise (BrokenByAgent if well else TerminalDied)(reason)

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


def _layout(files: dict[str, bytes]) -> bytes:
    """The order to lay out files of the work folder: a bash script, then what it reads.

    Small files stand in the script, so that it forks for folders and large ones alone: as costly as the rest.
    """
    folders = {f"/work/{folder}" for name in files if (folder := os.path.dirname(name))}
    lines, read = [f"mkdir -p -- {shlex.join(sorted(folders))}"] if folders else [], b""
    for name, content in files.items():
        if len(content) <= INLINE_BYTES:
            octal = "".join(chr(b) if chr(b).isalnum() and b < 128 else f"\\0{b:03o}" for b in content)
            source = f"printf %b '{octal}'"
        else:
            source, read = f"head -c {len(content)}", read + content
        lines.append(f"{source} > {shlex.quote(f'/work/{name}')}")
    script = " && ".join(lines).encode()
    return b"files %d\0" % len(script) + script + read
