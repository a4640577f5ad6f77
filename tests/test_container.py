"""Terminals in containers, on a real Docker engine: the sandbox's own tests, what only containers have, and
what happens when the engine, a container, a verifier or this program fails."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import docker
import pytest
from base_image import NAME, make_base_image
from hostile import ANY, ATTACKS, survive
from test_hostile import host  # noqa: F401
from test_sandbox import (  # noqa: F401, tests that hold for every backend
    COMMANDS,
    LIMITS,
    make_task,
    terminal,
    test_background_service_is_reachable_later,
    test_bad_file_name,
    test_command_that_cannot_be_passed_on,
    test_endless_output_ends_and_leaves_nothing_behind,
    test_files_and_tools,
    test_fork_bomb,
    test_fresh_bash_but_files_stay,
    test_interrupt_never_reaches_the_next_command,
    test_long_command,
    test_long_output_is_cut,
    test_no_verdict_is_no_reward,
    test_private_files_are_graded,
    test_stuck_command_times_out,
    test_syntax_error_or_open_end_is_an_output,
    test_the_verifiers_words_are_out_of_sight,
    test_timeout_kills_what_the_command_started_and_nothing_else,
    test_verdict_after_success,
    test_verdict_is_the_verifiers,
)

from echo_min.config import Config
from echo_min.rollout import Episode, StopReason, rollout
from echo_min.sft import Script
from echo_min.terminal import TerminalDied, open_terminal
from echo_min.terminals import docker_engine
from echo_min.worlds.harbor import Environment, harbor_task, harbor_tasks
from eval import scripted

REPO = Path(__file__).parent.parent
EXAMPLES = REPO / "examples/tasks"
CONFIG = Config(backend="docker", context=4000, max_action_tokens=100, output_chars=500, terminals=4)


@pytest.fixture(scope="module", autouse=True)
def base_image():
    """The engine that answers, with an image to build on. Without one: a failure in CI, else a skip."""
    try:
        client = docker.from_env().api
        client.ping()
    except docker.errors.DockerException as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no Docker engine answers: {error}")
    if not client.images(NAME):
        make_base_image()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(docker_engine, "BASE", NAME)
        patch.setenv("ECHO_MIN_BASE_IMAGE", NAME)  # of the programs that tests start
        yield


@pytest.fixture
def open_here():
    return partial(open_terminal, backend="docker")


def containers(**filters):
    return docker.from_env().api.containers(all=True, filters={"label": docker_engine.LABEL, **filters})


def wait_until(holds, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


def harbor(folder, test="echo 1 > /logs/verifier/reward.txt", environment="", **limits):
    """A task whose image is the base image itself; its agent is root."""
    (folder / "tests").mkdir(parents=True, exist_ok=True)
    (folder / "tests/test.sh").write_text(test)
    (folder / "instruction.md").write_text("do it")
    (folder / "task.toml").write_text(
        f'version = "1.0"\n[environment]\ndocker_image = "{NAME}"\n{environment}'
    )
    task = harbor_task(folder)
    asked = task.environment
    sizes = {"cpus": asked.cpus or 1.0, "memory_mb": limits.pop("memory_mb", asked.memory_mb or 2048)}
    sizes["storage_mb"] = limits.pop("storage_mb", asked.storage_mb or 10240)
    task = replace(task, environment=replace(asked, **sizes))
    return replace(task, limits=replace(task.limits, **{"command_seconds": 5.0, **limits}))


SHARED = "root", "memory", "namespaces", "mounts", "network", "interfaces", "host processes"


def test_commands_and_limits(terminal):  # noqa: F811
    """The sandbox's tables in one container, as to start one takes a while."""
    for command, text, code in COMMANDS.values():
        output = terminal.run(command)
        assert (output.text, output.exit_code, output.timed_out) == (text, code, False), command
    for name in SHARED:
        command, expected = LIMITS[name]
        assert terminal.run(command).text.splitlines()[-1] == expected, name


def test_a_container_is_confined(open_here, tmp_path):
    with open_here(harbor(tmp_path, environment="cpus = 0.5\nmemory_mb = 300")) as terminal:  # noqa: F811
        inspected = docker.from_env().api.inspect_container(terminal.id)
        host = inspected["HostConfig"]
        assert (host["Privileged"], host["NetworkMode"], host["Binds"], inspected["Mounts"]) == (
            False, "none", None, [],
        )  # fmt: skip
        assert host["Memory"] == host["MemorySwap"] == 300 * 2**20 and host["CpuQuota"] == 50_000
        assert host["PidsLimit"] and "no-new-privileges:true" in host["SecurityOpt"]
        assert inspected["Config"]["Labels"][docker_engine.LABEL] == docker_engine.this_run()
        looks = f"""id -u; grep NoNewPrivs /proc/self/status
            ls -d {REPO} /var/run/docker.sock /dev/sda /dev/vda
            mount -t tmpfs none /tmp; echo 1 > /proc/sys/kernel/panic; mknod /dev/x b 254 0 && cat /dev/x
            echo > /dev/tcp/1.1.1.1/53; chroot /proc/1/root true && dmesg | head -n 1"""
        text = terminal.run(looks).text
        assert text.startswith("0\nNoNewPrivs:\t1\n") and text.count("No such file") == 4, text
        for refused in ("permission denied", "Read-only", "Operation not permitted", "unreachable"):
            assert refused in text, text


def test_more_processors_than_there_are(open_here, tmp_path):
    with open_here(harbor(tmp_path, environment="cpus = 1e9")) as terminal:  # noqa: F811
        assert terminal.run("echo hi").text == "hi\n"


def test_a_command_whose_time_is_over_before_it_begins(open_here):
    with open_here(make_task()) as terminal:  # noqa: F811
        assert terminal.run("sleep 60", timeout=1e-9).timed_out
        assert terminal.run("echo next").text == "next\n"


def test_episodes_see_nothing_of_each_other(open_here, tmp_path):
    with open_here(harbor(tmp_path)) as one, open_here(harbor(tmp_path)) as other:
        one.run("echo secret | tee /tmp/secret /dev/shm/secret /secret; sleep 1234 & echo > /dev/tcp/::1/80")
        look = "ls /tmp /dev/shm /; ps -e -o args; cat /tmp/secret /secret; hostname"
        seen = other.run(look).text
        assert "secret\n" not in seen.replace("'/tmp/secret'", "") and "1234" not in seen


def test_a_network_takes_the_task_and_the_flag(tmp_path):
    asks, offline = tmp_path / "asks", tmp_path / "offline"
    harbor(asks, environment="allow_internet = true")
    harbor(offline, environment='network_mode = "no-network"')
    assert [harbor_task(f, True).environment.network for f in (asks, offline)] == [True, False]
    assert not harbor_task(asks).environment.network
    with open_terminal(harbor_task(asks, True), "docker") as terminal:  # noqa: F811
        assert "eth0" in terminal.run("ls /sys/class/net").text
        address = terminal.run("hostname -I").text.strip()
        terminal.run("python3 -m http.server 8000 >/dev/null 2>&1 & sleep 1")
        with open_terminal(harbor_task(asks, True), "docker") as neighbour:
            reach = f"echo > /dev/tcp/{address}/8000 && echo reached"
            assert "reached" in terminal.run(reach).text and address
            assert "reached" not in neighbour.run(reach, timeout=2).text
            raw = "python3 -c 'from socket import *; socket(AF_PACKET, SOCK_RAW)'"  # raw frames would pass
            assert "PermissionError" in neighbour.run(raw).text


def test_memory_and_processes_end_within_their_limits(open_here, tmp_path):
    task = harbor(tmp_path, environment="memory_mb = 128", processes=200)
    with open_here(task) as terminal:  # noqa: F811
        eaten = terminal.run("head -c 1G /dev/zero | tail")
        assert eaten.exit_code != 0 and not eaten.timed_out
        terminal.run("bomb() { bomb | bomb & }; bomb; sleep 60", timeout=1)
        outputs = [terminal.run("echo next").text for _ in range(3)]
        assert outputs[-1] == "next\n"
        assert terminal.verify() == 1.0


def test_a_full_disk_ends_the_episode(open_here, tmp_path):
    with open_here(harbor(tmp_path, storage_mb=64)) as terminal:  # noqa: F811
        started = time.monotonic()
        with pytest.raises(TerminalDied, match="more than 64 MiB"):
            terminal.run("while head -c 20M /dev/zero >> big; do sleep 0.2; done", timeout=60)
        assert time.monotonic() - started < 20


@pytest.mark.parametrize("command, verify", [
    ("for i in 1 2 3 4; do head -c 30M /dev/zero >> big; sleep 0.05; done", ":"),
    ("(for i in {1..9}; do head -c 20M /dev/zero >> big; sleep 0.5; done) & echo", "sleep 9"),
    ("d=$(printf a%.0s {1..200}); for i in {1..45}; do mkdir $d; cd $d; done; sleep 0.2", ":"),
])  # fmt: skip
def test_a_full_disk_is_seen_everywhere(open_here, tmp_path, command, verify):
    task = harbor(tmp_path, verify, storage_mb=64)
    with open_here(task) as terminal, pytest.raises(TerminalDied, match="more than 64 MiB"):  # noqa: F811
        terminal.run(command)
        terminal.verify()


def test_ended_from_outside_is_an_error_of_the_infrastructure(tokenizer, open_here, tmp_path):
    terminal = open_here(make_task())  # noqa: F811
    docker.from_env().api.remove_container(terminal.id, force=True)
    with pytest.raises(TerminalDied):
        terminal.run("echo")
    with pytest.raises(TerminalDied, match="closed"):
        terminal.run("echo")

    task, before = harbor(tmp_path), {c["Id"] for c in containers()}

    def remove_soon():
        wait_until(lambda: any(c["Id"] not in before for c in containers(status="running")))
        for container in containers():
            if container["Id"] not in before:
                docker.from_env().api.remove_container(container["Id"], force=True)

    thread = threading.Thread(target=remove_soon)
    thread.start()
    (episode,) = rollout(Script(tokenizer, [["sleep 30"]]), tokenizer, [Episode(task, 0)], CONFIG)
    thread.join()
    assert (episode.stop, episode.valid) == (StopReason.INFRA_ERROR, False)
    assert episode.reward != episode.reward


LEFT = "echo 1 > /logs/verifier/reward.txt"
BROKEN = {  # what the agent does, the verifier
    "storage": ("head -c 100M /dev/zero > big; sleep 0.2", LEFT),
    "shell": ("rm /bin/bash", LEFT),
    "folder": ("rm -rf /logs; echo x > /logs; mkdir /tests; mount --bind / /tests", "[[ -e /x ]]"),
    "relay robbed": ("cat /proc/1/fd/0 >/dev/null & sleep 1", LEFT),
    "relay ended": ("kill -RTMIN+9 1; sleep 9", LEFT),
    "verifier hangs": ("touch /hang", f"[[ -e /hang ]] && sleep 60; {LEFT}"),
    "no reward": ("touch /no", f"[[ -e /no ]] || {LEFT}"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_the_agent_broke_is_graded_0_and_trained(tokenizer, tmp_path, name):
    command, verifier = BROKEN[name]
    task = harbor(tmp_path, verifier, storage_mb=64, verifier_seconds=3.0, command_seconds=3.0)
    for _ in range(2):  # a crowded engine now and then drops its connection: its own fault, so once more
        (episode,) = rollout(Script(tokenizer, [[command, "true"]]), tokenizer, [Episode(task, 0)], CONFIG)
        if episode.stop is not StopReason.INFRA_ERROR:
            break
    assert (episode.stop, episode.reward, episode.valid) == (StopReason.BROKE_TERMINAL, 0.0, True), episode
    assert task.name in episode.error


@pytest.mark.parametrize("verifier", ["sleep 60", "exit"])
def test_before_a_command_nothing_is_the_agents_fault(tokenizer, tmp_path, verifier):
    task = harbor(tmp_path, verifier, verifier_seconds=1.0)
    (episode,) = rollout(Script(tokenizer, [[]]), tokenizer, [Episode(task, 0)], CONFIG)
    assert (episode.stop, episode.valid) == (StopReason.INFRA_ERROR, False)


@pytest.mark.parametrize("how", ["kill", "disconnect"])
def test_what_the_host_broke_is_not_the_agents_fault(open_here, tmp_path, how):
    terminal = open_here(harbor(tmp_path))  # noqa: F811
    terminal.run("true")
    if how == "disconnect":
        terminal._stream._socket.shutdown(socket.SHUT_RDWR)
    else:
        getattr(docker.from_env().api, how)(terminal.id)
    with pytest.raises(TerminalDied) as died:
        terminal.run("sleep 1", timeout=3)
    assert type(died.value) is TerminalDied


REWARDS = {
    "a number": ("echo 0.5 > $F.txt", 0.5),
    "one": ("printf 1 > $F.txt; exit 1", 1.0),  # the file counts, not the exit code
    "json": ("""echo '{"reward": 1, "style": 0}' > $F.json; echo 0 > $F.txt""", 1.0),
    "json with another name": ("""echo '{"score": 0.25}' > $F.json""", 0.25),
    "json of a number alone": ("echo 0.75 > $F.json", 0.75),
    "none": (":", "left no reward"),
    "empty": (": > $F.txt", "an empty or unreadable reward.txt"),
    "words": ("echo passed > $F.txt", "left 'passed' in reward.txt"),
    "nan": ("echo nan > $F.txt", "left 'nan'"),
    "json of nan": ("echo NaN > $F.json", "left 'NaN'"),
    "above": ("echo 1.5 > $F.txt", r"left '1.5' in reward.txt, not one number in \[0, 1\]"),
    "below": ("""echo '{"reward": -1}' > $F.json""", "not one number"),
    "json of true": ("echo true > $F.json", "not one number"),
    "malformed json beside a number": ("echo '{' > $F.json; echo 1 > $F.txt", "not one number"),
    "json without a reward": ("""echo '{"a": 1, "b": 1}' > $F.json""", "not one number"),
    "json of nothing": ("echo '{}' > $F.json", "not one number"),
    "json of a huge number": ("""echo '{"reward": 1'$(printf %0400d)'}' > $F.json""", "not one number"),
    "json of a text": ("""echo '{"reward": "1"}' > $F.json""", "not one number"),
    "a folder": ("mkdir $F.txt", "an empty or unreadable"),
    "a folder of a large file": ("mkdir $F.json; truncate -s 1G $F.json/x", "an empty or unreadable"),
    "a link": ("echo 1 > /tmp/x; ln -s /tmp/x $F.txt", "an empty or unreadable"),
    "large": ("head -c 100000 /dev/zero | tr '\\0' 1 > $F.txt", "not one number"),
    "late": ("sleep 60", "limited to 2 s"),
    "dies": ("kill -9 $$", "left no reward"),
}


@pytest.mark.parametrize("name", REWARDS)
def test_reward_file(open_here, tmp_path, name):
    script, expected = REWARDS[name]
    task = harbor(tmp_path, f"F=/logs/verifier/reward; {script}", verifier_seconds=2.0)
    with open_here(task) as terminal:  # noqa: F811
        # what an agent leaves where the verdict belongs does not count
        terminal.run("mkdir -p /logs/verifier; echo 1 | tee /logs/verifier/reward.{txt,json}")
        if isinstance(expected, float):
            assert terminal.verify() == expected
        else:
            with pytest.raises(TerminalDied, match=expected) as died:
                terminal.verify()
            assert task.name in str(died.value)
            grades_nobody = isinstance(expected, str) and "left '" in str(died.value)
            assert (type(died.value) is TerminalDied) == grades_nobody


def test_the_verifiers_first_line_counts(open_here, tmp_path):
    test = "#!/bin/bash -e\necho 0 > /logs/verifier/reward.txt\nfalse\necho 1 > /logs/verifier/reward.txt\n"
    with open_here(harbor(tmp_path, test)) as terminal:  # noqa: F811
        assert terminal.verify() == 0.0


def test_the_verifier_gets_its_files_environment_and_folder(open_here, tmp_path):
    test = """[[ $PWD == /srv && $A == b && $E == f && ! $LC_ALL && -x /tests/deep/run &&
        $(stat -c %a /tests/data) == 644 &&
        $(sha256sum < /tests/data) == $(printf '\\000\\377\\n' | sha256sum) && -e done ]] || exit
        echo 1 > /logs/verifier/reward.txt"""
    environment = 'workdir = "/srv"\nenv = {E = "f"}\n[verifier]\nenv = {A = "b"}'
    task = harbor(tmp_path, test, environment)
    (tmp_path / "tests/data").write_bytes(b"\0\xff\n")
    (tmp_path / "tests/data").chmod(0o600)
    (tmp_path / "tests/deep").mkdir()
    (tmp_path / "tests/deep/run").touch(0o755)
    with open_here(task) as terminal:  # noqa: F811
        assert terminal.run("ls -d /tests /solution; echo $E$A").text.splitlines()[-1] == "f"
        terminal.run("touch done; ln -s /etc /tests; mkdir -p /logs; ln -s /etc /logs/verifier")
        assert terminal.verify() == 1.0


def test_an_agent_out_of_time_is_graded(tokenizer, tmp_path):
    task = harbor(tmp_path, agent_seconds=0.3)
    (episode,) = rollout(Script(tokenizer, [["sleep 0.5", "true"]]), tokenizer, [Episode(task, 0)], CONFIG)
    assert (episode.stop, episode.reward, episode.valid) == (StopReason.AGENT_TIMEOUT, 1.0, False)


@pytest.mark.parametrize("agent, reward", [("oracle", 1.0), ("noop", 0.0)])
def test_sample_tasks(agent, reward):
    tasks = harbor_tasks(EXAMPLES)
    assert len(tasks) >= 10
    with ThreadPoolExecutor(4) as pool:
        ended = list(pool.map(lambda task: scripted(agent, task, CONFIG), tasks))
    assert [(e.task.name, e.reward) for e, _ in ended] == [(t.name, reward) for t in tasks], ended


CHEATS = {
    "access-report": "mkdir report; awk '{print $4, $6}' access.log | head -n 5 > report/slowest.txt",
    "broken-build": "mkdir build; wc -w chapters/* > build/index.txt",
    "broken-pipeline": "echo 'printf \"9 wind\\n5 the\\n2 and\\n\"' > top.sh",
    "failing-test": "echo > test_intervals.py",
    "key-value-service": "exec 3<>/dev/tcp/127.0.0.1/7000; echo set left right >&3; cat /srv/service.py",
    "parse-log": "awk '{print $1, $10}' access.log > answer.txt",
    "permissions": "chmod -R 750 site",
    "python-traceback": "echo 'print(\"Adams 2.00\\nWeber 12.75\\nskipped 5\")' > totals.py",
    "recover-from-git": "echo > notes.txt",
    "start-service": "cp -r public www; sed -i 's/no/yes/' server.conf; python3 server.py & sleep 0.5",
}


def test_sample_tasks_are_not_passed_by_cheating():
    def cheat(task):
        with open_terminal(task, "docker") as terminal:  # noqa: F811
            terminal.run(f"{CHEATS[task.name]}; mkdir -p /logs/verifier /tests; echo exit > /tests/test.sh")
            terminal.run("echo 1 | tee /logs/verifier/reward.{txt,json}")
            return terminal.verify()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(cheat, harbor_tasks(EXAMPLES))) == [0.0] * len(CHEATS)


def test_an_image_is_made_once(tmp_path, capfd):
    (tmp_path / "environment").mkdir()
    marker = f"{time.monotonic_ns()}"
    dockerfile = tmp_path / "environment/Dockerfile"
    dockerfile.write_text(f"# new\nARG BASE\nFROM $BASE\nRUN echo {marker} > /made\n")
    task = replace(harbor(tmp_path), environment=Environment(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: open_terminal(task, "docker"), range(4)))
    assert [t.run("cat /made").text for t in opened] == [f"{marker}\n"] * 4
    for one in opened:
        one.close()
    assert capfd.readouterr().err.count("building") == 2  # begun and done
    dockerfile.write_text("ARG BASE\nFROM $BASE\nRUN echo oh no; exit 3\n")
    with pytest.raises(TerminalDied, match=r"no image .*returned a non-zero code: 3.* oh no"):
        open_terminal(task, "docker")


def test_an_image_without_bash_or_registry_is_named(tmp_path, monkeypatch):
    task = harbor(tmp_path)

    def of(image):
        return replace(task, environment=replace(task.environment, image=image))

    with pytest.raises(TerminalDied, match=r"task .*: no image 127\.0\.0\.1:1/none:1"):
        open_terminal(of("127.0.0.1:1/none:1"), "docker")
    monkeypatch.setattr(docker_engine, "PULL_SECONDS", 2.0)
    silent = socket.create_server(("127.0.0.1", 0))  # a registry that takes the call and says nothing
    with silent, pytest.raises(TerminalDied, match=r"no image .*: not done after 2 s"):
        open_terminal(of(f"127.0.0.1:{silent.getsockname()[1]}/none:1"), "docker")
    for lines, said in (
        ("FROM scratch\nCOPY instruction.md /", "bash"),
        (f'FROM {NAME}\nENTRYPOINT ["sh", "-c", "\\"$@\\"; exit", "x"]', "ENTRYPOINT does not exec"),
    ):
        (tmp_path / "Dockerfile").write_text(lines)
        (image,) = re.findall(r"built (\w+)", str(list(docker.from_env().api.build(str(tmp_path)))))
        with pytest.raises(TerminalDied, match=said):
            open_terminal(of(image), "docker")


ON_DISK = "full work folder", "full /tmp", "sparse file"  # not refused here; see test_a_full_disk


@pytest.mark.slow
def test_hostile_commands(host):  # noqa: F811
    attacks = [(name, command, ANY if name in ON_DISK else must) for name, command, must in ATTACKS]
    found = [(name, survive(host, (name, *rest), "docker")) for name, *rest in attacks]
    problems = [f"{name}: {problem}" for name, problem in found if problem]
    assert problems == []


CHILD = """
import sys, threading, time
from echo_min.terminal import open_terminal
from echo_min.tasks import Task
idle, busy = (open_terminal(Task("t", "", "true", ""), "docker") for _ in range(2))
threading.Thread(target=lambda: busy.run("sleep 600", 600)).start()
time.sleep(0.2)
print("at work", flush=True)
time.sleep(600)
"""


def test_a_killed_run_leaves_no_container():
    child = subprocess.Popen([sys.executable, "-c", CHILD], cwd=REPO, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"at work\n"

    def its():
        return [c for c in containers() if c["Labels"][docker_engine.LABEL].split()[1] == str(child.pid)]

    assert len(its()) == 2
    client, mine = docker_engine.connect(), open_terminal(make_task(), "docker")
    docker_engine._sweep(client)
    assert len(its()) == 2  # of a run that lives
    child.kill()
    child.wait()
    assert wait_until(lambda: len(its()) == 1)  # the idle one goes by itself, as its connection ends
    docker_engine._sweep(client)
    assert wait_until(lambda: not its())
    assert mine.run("echo on").text == "on\n"
    mine.close()


@pytest.mark.slow
def test_an_evaluation_killed_at_ten_moments_leaves_nothing_and_goes_on(tmp_path):
    def start(out):
        flags = ["--agent", "oracle", "--tasks", EXAMPLES, "--backend", "docker", "--out", out]
        command = [sys.executable, REPO / "eval.py", *map(str, flags)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def kept(out):
        lines = (out / "trials.jsonl").read_text().splitlines() if (out / "trials.jsonl").exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    started = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    whole, out = time.monotonic() - started, tmp_path / "out"
    for moment in range(10):
        before = kept(out)
        child = start(out if moment % 2 else tmp_path / f"{moment}")
        time.sleep(whole * (0.2 + 0.08 * moment))
        child.kill()
        child.wait()
        docker_engine._sweep(docker_engine.connect())  # as the next run does
        of_child = f" {child.pid} "
        assert wait_until(lambda its=of_child: not any(its in str(c["Labels"]) for c in containers()))
        assert kept(out)[: len(before)] == before
    assert start(out).wait() == 0
    assert {t["task"]: t["reward"] for t in kept(out)} == {t.name: 1.0 for t in harbor_tasks(EXAMPLES)}


@pytest.mark.parametrize("command", [None, "trap '' TERM HUP INT URG; setsid sleep 60 & sleep 60"])
def test_a_container_ends_by_its_own_clock(monkeypatch, command):
    monkeypatch.setattr(docker_engine, "LIFE_SECONDS", 2)
    terminal = open_terminal(make_task(), "docker")  # noqa: F811
    id = terminal.id
    if command:
        with pytest.raises(TerminalDied):
            terminal.run(command, timeout=15)
    assert wait_until(lambda: not containers(id=id))
    terminal.close()


class EngineSocket:
    """A socket that leads to the engine, until it is stopped: connections break, nobody listens."""

    def __init__(self, folder):
        where = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
        if not where.startswith("unix://"):
            pytest.skip("the engine is not on a socket file")
        self.path, self.engine, self.open = str(folder / "engine"), where.removeprefix("unix://"), []

    def start(self):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(64)
        threading.Thread(target=self.accept, args=(self.listener,), daemon=True).start()

    def stop(self):
        os.unlink(self.path)
        for connection in (self.listener, *self.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self.open = []

    def accept(self, listener):
        with contextlib.suppress(OSError):
            while True:
                near, far = listener.accept()[0], socket.socket(socket.AF_UNIX)
                far.connect(self.engine)
                self.open += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self.pump, args=pair, daemon=True).start()

    def pump(self, source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@pytest.fixture
def engine_socket(tmp_path, monkeypatch):
    """The program under test reaches the engine through this one."""
    one = EngineSocket(tmp_path)
    one.start()
    client = docker.APIClient(base_url=f"unix://{one.path}", version="auto", timeout=10)
    monkeypatch.setattr(docker_engine, "connect", lambda: client)
    yield one
    with contextlib.suppress(OSError):
        one.stop()


def test_an_engine_that_goes_away_and_comes_back(tokenizer, engine_socket):
    terminal = open_terminal(make_task(), "docker")  # noqa: F811
    assert terminal.run("echo hi").text == "hi\n"
    threading.Timer(0.5, engine_socket.stop).start()
    with pytest.raises(TerminalDied, match="connection"):
        terminal.run("sleep 30", timeout=30)
    (episode,) = rollout(Script(tokenizer, [["true"]]), tokenizer, [Episode(make_task(), 0)], CONFIG)
    assert episode.stop is StopReason.INFRA_ERROR
    engine_socket.start()
    (episode,) = rollout(Script(tokenizer, [["touch done"]]), tokenizer, [Episode(make_task(), 0)], CONFIG)
    assert (episode.stop, episode.reward) == (StopReason.DONE, 1.0)


def test_no_engine_says_what_to_do(monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    docker_engine.connect.cache_clear()
    with pytest.raises(docker_engine.EngineUnavailable, match=r"nowhere/docker\.sock.*set DOCKER_HOST"):
        open_terminal(make_task(), "docker")


def test_many_at_once():
    with ThreadPoolExecutor(16) as pool:
        opened = list(pool.map(lambda _: open_terminal(make_task(), "docker"), range(16)))
        commands = [f"echo {i} > file; cat file; exit {i}" for i in range(16)]
        outputs = list(pool.map(lambda one, command: one.run(command), opened, commands))
        assert [(o.text, o.exit_code) for o in outputs] == [(f"{i}\n", i) for i in range(16)]
        list(pool.map(lambda one: one.run("touch done"), opened[::2]))
        assert list(pool.map(lambda one: one.verify(), opened)) == [1.0, 0.0] * 8
        ids = {one.id for one in opened}
        list(pool.map(lambda one: one.close(), opened))
    assert not ids & {c["Id"] for c in containers()}
