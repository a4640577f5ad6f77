"""Who grades in containers, and what it may see: users, health, networks by phase, verifiers of their own;
how storage is watched. On a real Docker engine."""

import tarfile
import threading
import time
from dataclasses import replace

import docker
import pytest
from base_image import NAME
from test_container import CONFIG, base_image, containers, wait_until  # noqa: F401

from echo_min.rollout import Episode, StopReason, rollout
from echo_min.sft import Script
from echo_min.terminal import BrokenByAgent, TerminalDied, open_terminal
from echo_min.terminals import docker_engine, grading
from echo_min.worlds.harbor import harbor_task

PASS = "echo 1 > /logs/verifier/reward.txt"
SAME = '[verifier]\nenvironment_mode = "separate"\n'


def written(folder, toml, test=PASS, **files):
    """A task's folder with this task.toml; files: "tests/Dockerfile" and so on."""
    content = {"tests/test.sh": f"#!/bin/bash\n{test}", "instruction.md": "do it", "task.toml": toml} | files
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def image(text=""):
    return f'[environment]\ndocker_image = "{NAME}"\ncpus = 1\nmemory = "1G"\nstorage_mb = 200\n{text}\n'


def played(task, commands, tokenizer):
    (episode,) = rollout(Script(tokenizer, [commands]), tokenizer, [Episode(task, 0)], CONFIG)
    return episode


# ---- users, health, networks ----


WHO = "exec 2>/dev/null; echo $(id -un):$(id -gn):$HOME:$(id -G)"


@pytest.mark.parametrize("agent, verifier, sees", [
    ("", "", ("root:root:/root:0", "root:root:/root:0")),
    ("games", "", ("games:games:/usr/games:60", "root:root:/root:0")),
    ("5", "games", ("games:games:/usr/games:60", "games:games:/usr/games:60")),
    ("4321", "", ("4321:4321:/:4321", "root:root:/root:0")),
])  # fmt: skip
def test_users_of_agent_and_verifier(tmp_path, agent, verifier, sees):
    toml = f'{image()}[agent]\nuser = "{agent}"\n[verifier]\nuser = "{verifier}"'.replace('user = ""', "")
    with open_terminal(harbor_task(written(tmp_path, toml, f"{WHO}; {PASS}")), "docker") as terminal:
        assert terminal.run(WHO).text.strip() == sees[0]
        assert terminal.run("kill -9 1; touch /x; echo").exit_code == 0
        assert ("/x" in terminal.run("ls /x").text.split()) == (agent == "")
        assert terminal.verify() == 1.0
        assert terminal.verifier_output == sees[1]


def test_a_user_that_the_image_lacks_is_named(tmp_path):
    task = harbor_task(written(tmp_path, image() + '[agent]\nuser = "bob"'))
    with pytest.raises(TerminalDied, match="bob") as died:
        open_terminal(task, "docker")
    assert not isinstance(died.value, BrokenByAgent)


def healthy(folder, command, **settings):
    lines = "".join(f"{name} = {value}\n" for name, value in settings.items())
    return harbor_task(written(folder, f"{image()}[environment.healthcheck]\ncommand = '{command}'\n{lines}"))


def test_a_healthcheck_is_repeated_until_it_passes(tmp_path):
    count = "echo >> /n; [[ $(wc -l < /n) == 3 ]]"
    with open_terminal(healthy(tmp_path, count, interval_sec=0), "docker") as terminal:
        assert terminal.run("wc -l < /n").text == "3\n"


def test_failures_while_it_starts_do_not_count(tmp_path):
    later = "[[ -e /at ]] || date +%s > /at; (($(date +%s) > $(cat /at) + 1))"
    task = healthy(tmp_path, later, retries=1, start_period_sec=20, start_interval_sec=0.1)
    open_terminal(task, "docker").close()
    with pytest.raises(TerminalDied, match="healthcheck failed 1 times"):
        open_terminal(healthy(tmp_path, later, retries=1), "docker")


@pytest.mark.parametrize("command, says", [("echo sick; exit 3", "2 times: sick"), ("sleep 60", "not end")])
def test_who_is_not_healthy_is_no_fault_of_the_agents(tmp_path, command, says):
    task = healthy(tmp_path, command, retries=2, interval_sec=0.1, timeout_sec=0.3)
    with pytest.raises(TerminalDied, match=says) as died:
        open_terminal(task, "docker")
    assert not isinstance(died.value, BrokenByAgent)
    mine = docker_engine.this_run()
    assert wait_until(lambda: all(c["Labels"][docker_engine.LABEL] != mine for c in containers()))


@pytest.mark.parametrize("agent, verifier", [("public", "no-network"), ("no-network", "public")])
@pytest.mark.parametrize("mode", ["shared", "separate"])
def test_each_phase_has_its_own_network(tmp_path, agent, verifier, mode):
    toml = f'{image()}[agent]\nnetwork_mode = "{agent}"\n[verifier]\nnetwork_mode = "{verifier}"\n'
    toml += f'environment_mode = "{mode}"'
    task = harbor_task(written(tmp_path, toml, f"ls /sys/class/net; {PASS}"), allow_network=True)
    with open_terminal(task, "docker") as terminal:
        assert ("eth" in terminal.run("ls /sys/class/net").text) == (agent == "public")
        assert terminal.verify() == 1.0
        assert ("eth" in terminal.verifier_output) == (verifier == "public")


def test_what_a_task_does_not_name_is_the_machines(tmp_path, monkeypatch, capfd):
    docker_engine.share.cache_clear()
    task = harbor_task(written(tmp_path, f'environment.docker_image = "{NAME}"'))
    client = docker.from_env().api

    def limits(at_once):
        with open_terminal(task, "docker", at_once=at_once) as terminal:
            found = client.inspect_container(terminal.id)["HostConfig"]
            return found["CpuQuota"] / 1e5, found["Memory"] >> 20, terminal.storage_mb

    engine = client.info()
    assert limits(4) == limits(4) == (engine["NCPU"], engine["MemTotal"] // 2**21 // 4, 10240)
    said = capfd.readouterr().err
    assert said.count("a task that names none gets") == 1 and "10240 STORAGE_MB (ECHO_MIN_STORAGE_MB)" in said
    for name, value in (("CPUS", "1"), ("MEMORY_MB", "300"), ("STORAGE_MB", "64")):
        monkeypatch.setenv(f"ECHO_MIN_{name}", value)
    docker_engine.share.cache_clear()
    assert limits(4) == (1, 300, 64)
    task = harbor_task(written(tmp_path, f'environment = {{docker_image = "{NAME}", memory_mb = 200}}'))
    assert limits(4) == (1, 200, 64)
    monkeypatch.setenv("ECHO_MIN_CPUS", "many")
    docker_engine.share.cache_clear()
    with pytest.raises(docker_engine.EngineUnavailable, match="ECHO_MIN_CPUS: expected a whole number"):
        open_terminal(task, "docker")


# ---- a verifier with a container of its own ----

def test_what_an_agent_lays_beside_the_tests_is_gone(tmp_path):
    task = harbor_task(written(tmp_path, image(), f"ls -A /tests; {PASS}"))
    with open_terminal(task, "docker") as terminal:
        terminal.run("mkdir -p /tests/deep; touch /tests/{.x,helper.sh}")
        assert terminal.verify() == 1.0
    assert terminal.verifier_output == "test.sh"


SHOW = f"""cd /; stat -c %a app/out; find app logs/artifacts -type f | sort | xargs -r head -v; ls -A /tests
{PASS}"""


def test_a_verifier_of_its_own_sees_artifacts_alone(tmp_path):
    toml = 'artifacts = ["/app/out", {source = "/app/log", exclude = ["*.tmp", "deep/b"]}, "/app/none"]\n'
    task = harbor_task(written(tmp_path, toml + image() + SAME, SHOW))
    with open_terminal(task, "docker") as terminal:
        terminal.run("mkdir -p /app/log/deep/c /logs/artifacts /tests; cd /app; echo 1 >out; echo 2 >secret")
        terminal.run("cd /app/log; echo 3 >a; echo 4 >a.tmp; echo 5 >deep/b; echo 6 >deep/c/b")
        terminal.run("echo x >/tests/x; echo 7 >/logs/artifacts/y; chown 33:33 /app/out; chmod 7750 /app/out")
        agents = {"all": True, "filters": {"id": terminal.id}}
        assert terminal.verify() == 1.0 and not terminal.engine.containers(**agents)  # what it left has ended
    bits, _, said = terminal.verifier_output.partition("\n")
    shown = dict(part.split(" <==\n") for part in said.partition("test.sh")[0].split("==> ")[1:])
    shown = {name: text.strip() for name, text in shown.items()}
    want = {"app/log/a": "3", "app/log/deep/c/b": "6", "app/out": "1", "logs/artifacts/y": "7"}
    assert shown == want and said.splitlines()[-1] == "test.sh" and bits == "1750"


LINKS = """mkdir -p /app/out/d/e; cd /app/out; echo in >file; ln file hard; ln -s ../file d/up; ln -s e d/down
ln -s /tests/test.sh absolute; ln -s ../../tests/test.sh above; ln -s d/e/../../../.. around
ln -s d/../file back; ln absolute linked; mkfifo pipe; ln -s .. d/e/top; ln -s e/top/../.. d/over"""


def test_links_that_lead_out_of_an_artifact_stay_behind(tmp_path):
    test = f"cd /app/out; find . -type f,p,l | sort; [[ $(cat hard d/up) == $'in\\nin' ]] && {PASS}"
    task = harbor_task(written(tmp_path, 'artifacts = ["/app/out"]\n' + image() + SAME, test))
    with open_terminal(task, "docker") as terminal:
        assert not terminal.run(LINKS).text
        assert terminal.verify() == 1.0
    assert terminal.verifier_output.split() == ["./d/down", "./d/e/top", "./d/up", "./file", "./hard"]


def test_an_artifact_that_is_a_link_shows_nothing(tmp_path):
    test = f"[[ -e /app/out ]] || {PASS}"
    task = harbor_task(written(tmp_path, 'artifacts = ["/app/out"]\n' + image() + SAME, test))
    with open_terminal(task, "docker") as terminal:
        terminal.run("mkdir /app; ln -s /tests/test.sh /app/out; rm -rf /logs; ln -s /tests /logs")
        assert terminal.verify() == 1.0


def test_an_agent_that_stays_behind_cannot_write_its_own_reward(tmp_path, tokenizer):
    stays = """cat > /x <<'E'
until [[ -e /tests/test.sh ]]; do sleep 0.01; done; sleep 0.2; echo 1 > /logs/verifier/reward.json
E
setsid bash /x &>/dev/null & mkdir -p /logs/artifacts; ln -s /logs/verifier /logs/artifacts/verifier"""
    fails = "echo 0 > /logs/verifier/reward.txt; sleep 2"
    shared = harbor_task(written(tmp_path / "a", image(), fails))
    assert played(shared, [stays], tokenizer).reward == 1.0  # the hole
    own = harbor_task(written(tmp_path / "b", image() + SAME, fails))
    episode = played(own, [stays], tokenizer)
    assert (episode.reward, episode.stop, episode.error) == (0.0, StopReason.DONE, ""), episode


def test_a_verifier_built_of_its_tests(tmp_path):
    dockerfile = "ARG BASE\nFROM $BASE\nCOPY test.sh answer /tests/\nRUN echo built > /by\nWORKDIR /opt"
    test = f"cat /by; pwd; ls /tests; echo $A; [[ $(cat /app/out) == $(cat /tests/answer) ]] && {PASS}"
    toml = 'artifacts = ["/app/out"]\n' + image() + "[verifier]\nenv = {A = '1'}\n[verifier.environment]\n"
    files = {"tests/Dockerfile": dockerfile, "tests/answer": "42"}
    task = harbor_task(written(tmp_path, toml, test, **files))
    with open_terminal(task, "docker") as terminal:
        assert "built" not in terminal.run("cat /by /tests/answer; mkdir /app; printf 42 > /app/out").text
        assert terminal.verify() == 1.0
    assert terminal.verifier_output.split() == ["built", "/opt", "answer", "test.sh", "1"]


def test_a_verifier_that_cannot_start_is_no_fault_of_the_agents(tmp_path, tokenizer):
    dockerfile = 'ARG BASE\nFROM $BASE\nENTRYPOINT ["/bin/false"]'
    toml = image() + '[verifier.environment]\nmemory = "1G"'
    task = harbor_task(written(tmp_path, toml, **{"tests/Dockerfile": dockerfile}))
    episode = played(task, ["true"], tokenizer)
    assert episode.stop is StopReason.INFRA_ERROR and "cannot start" in episode.error


@pytest.mark.parametrize("test", ["sleep 60", "exit 3"])
def test_a_verifier_of_its_own_without_verdict_after_an_agent_is_a_0(tmp_path, tokenizer, test):
    task = harbor_task(written(tmp_path, image() + SAME, f"echo so far; {test}"))
    task = replace(task, limits=replace(task.limits, verifier_seconds=2.0))
    episode = played(task, ["true"], tokenizer)
    assert (episode.reward, episode.stop) == (0.0, StopReason.BROKE_TERMINAL), episode
    assert episode.verifier_output == "so far" and "so far" in episode.error


def test_artifacts_beyond_the_storage_are_the_agents_fault(tmp_path, tokenizer):
    task = harbor_task(written(tmp_path, 'artifacts = ["/app"]\n' + image() + SAME))
    episode = played(task, ["mkdir /app; truncate -s 5G /app/sparse"], tokenizer)
    assert (episode.reward, episode.stop) == (0.0, StopReason.BROKE_TERMINAL)
    assert "more than 200 MiB" in episode.error


def test_an_agents_container_that_is_gone_has_no_artifacts_to_grade(tmp_path):
    with open_terminal(harbor_task(written(tmp_path, image() + SAME)), "docker") as terminal:
        docker.from_env().api.remove_container(terminal.id, force=True)
        with pytest.raises(TerminalDied) as died:
            terminal.verify()
        assert not isinstance(died.value, BrokenByAgent)


def test_what_the_verifier_printed_is_kept_to_its_end(tmp_path):
    test = f"echo first; head -c 100000 /dev/zero | tr '\\0' x; echo; echo last >&2; {PASS}"
    with open_terminal(harbor_task(written(tmp_path, image(), test)), "docker") as terminal:
        assert terminal.verify() == 1.0
    said = terminal.verifier_output
    assert len(said) <= grading.KEPT_BYTES and said.endswith("x\nlast") and "first" not in said


def test_entries_are_judged_by_where_they_lead():
    def stays(kind, target=""):
        entry = tarfile.TarInfo("out/a/b")
        entry.type, entry.linkname = kind, target
        return grading._stays(entry, ["a", "b"], {"out/dropped"})

    assert stays(tarfile.REGTYPE) and stays(tarfile.DIRTYPE)
    assert not any(stays(kind) for kind in (tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE))
    assert all(stays(tarfile.SYMTYPE, target) for target in ("c", "../c", "c/d", "..", ".", "../c/d"))
    assert not any(stays(tarfile.SYMTYPE, to) for to in ("/c", "../../c", "c/../d", "../c/..", "../.."))
    assert stays(tarfile.LNKTYPE, "out/kept") and not stays(tarfile.LNKTYPE, "out/dropped")


# ---- storage ----


def seconds(terminal, command):
    times = []
    for _ in range(5):
        started = time.monotonic()
        assert not terminal.run(command, timeout=60).timed_out
        times.append(time.monotonic() - started)
    return sorted(times)[2]


@pytest.mark.slow
def test_counting_costs_the_agent_no_time(tmp_path):
    with open_terminal(harbor_task(written(tmp_path, image())), "docker") as terminal:
        empty = seconds(terminal, "sleep 0.2")
        made = "mkdir /d; cd /d; seq 100000 | split -l 1 -a 5 - f; ls | wc -l"
        assert terminal.run(made, timeout=120).text == "100000\n"
        full = seconds(terminal, "sleep 0.2")
    print(f"sleep 0.2 in an empty container: {empty:.3f} s, beside 100,000 files: {full:.3f} s")
    assert full < 1.1 * empty + 0.02


def test_a_writer_at_full_speed_is_stopped_soon(tmp_path):
    with open_terminal(harbor_task(written(tmp_path, image())), "docker") as terminal:
        started = time.monotonic()
        with pytest.raises(BrokenByAgent, match="more than 200 MiB"):
            terminal.run("while :; do head -c 50M /dev/zero >> /big; sleep 0.1; done", timeout=60)
        assert time.monotonic() - started < 5


def test_watches_end_with_their_containers(tmp_path):
    before = threading.active_count()
    for _ in range(3):
        with open_terminal(harbor_task(written(tmp_path, image())), "docker") as terminal:
            terminal.run("sleep 0.3")
    assert wait_until(lambda: threading.active_count() <= before)
