"""Task folders in Harbor's format: what is read, what is refused, and how eval.py plays a set of them."""

import random
import string

import pytest

from echo_min.worlds.harbor import harbor_task, harbor_tasks
from echo_min.worlds.registry import load_tasks

TB2 = '''# canary
version = "1.0"

[metadata]
author_name = "someone"
difficulty = "easy"
tags = ["a", "b"]

[verifier]
timeout_sec = 900.0

[agent]
timeout_sec = 900.0

[environment]
build_timeout_sec = 600.0
docker_image = "someone/image:20250101"
cpus = 1
memory = "2G"
storage = "10G"
'''
NEWER = '''schema_version = "1.2"
artifacts = ["/app/out"]

[task]
name = "org/task"

[verifier]
timeout_sec = 60
env = { MODE = "strict" }

[environment]
cpus = 2
memory_mb = 4096
storage_mb = 512
gpus = 0
network_mode = "public"
workdir = "/srv"
mcp_servers = []

[environment.env]
A = "1"
'''


def write(folder, toml, **files):
    """A task folder; files: "instruction_md" and so on, None to leave one out."""
    content = {
        "instruction.md": "# Do it\n", "tests/test.sh": "exit", "environment/Dockerfile": "FROM x",
        "solution/solve.sh": "true", "task.toml": toml,
    } | files  # fmt: skip
    for name, text in content.items():
        if text is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_terminal_bench_2(tmp_path):
    task = harbor_task(write(tmp_path / "some-task", TB2), allow_network=True)
    limits, environment = task.limits, task.environment
    assert (task.name, task.instruction) == ("some-task", "# Do it\n")
    assert (limits.agent_seconds, limits.verifier_seconds, limits.command_seconds) == (900, 900, 120)
    assert (environment.memory_mb, environment.storage_mb) == (2048, 10240)
    assert (environment.image, environment.cpus, environment.network) == ("someone/image:20250101", 1, True)
    assert not harbor_task(tmp_path / "some-task").environment.network


def test_newer_schema(tmp_path):
    task = harbor_task(write(tmp_path, NEWER), allow_network=True)
    limits, environment = task.limits, task.environment
    assert (environment.memory_mb, environment.storage_mb, limits.agent_seconds) == (4096, 512, 1e9)
    assert (environment.workdir, environment.env, environment.network) == ("/srv", {"A": "1"}, True)
    assert (environment.cpus, environment.verifier.env, environment.image) == (2, {"MODE": "strict"}, "")
    offline = NEWER.replace("public", "no-network") + "\n"
    assert not harbor_task(write(tmp_path, offline), allow_network=True).environment.network


@pytest.mark.parametrize("schema", ["1.3", "1.4"])
def test_todays_schemas(tmp_path, schema):
    newest = NEWER.replace("1.2", schema).replace("mcp_servers", 'os = "linux"\nmcp_servers')
    assert harbor_task(write(tmp_path, newest)).environment.memory_mb == 4096


def test_one_task_that_is_refused_leaves_the_others(tmp_path, capsys):
    for name, toml in (("a", '[environment]\nos = "windows"'), ("b", TB2), ("c", "version = "), ("d", NEWER)):
        write(tmp_path / name, toml)
    assert [task.name for task in harbor_tasks(tmp_path, allow_network=True)] == ["b", "d"]
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said] == ["skipped a", "skipped c"]
    assert f"{tmp_path / 'a' / 'task.toml'}: [environment] os: expected \"linux\", got 'windows'" in said[0]
    harbor_tasks(tmp_path, allow_network=True)
    assert capsys.readouterr().out == ""  # once
    with pytest.raises(ValueError, match=r"a/task\.toml: \[environment\] os"):
        harbor_tasks(tmp_path, strict=True)
    with pytest.raises(ValueError, match="none of its 1 tasks can be played"):
        harbor_tasks(tmp_path / "a")


def test_an_empty_task_toml_is_all_defaults(tmp_path):
    task = harbor_task(write(tmp_path, "", **{"solution/solve.sh": None}))
    asked = task.environment
    assert (task.limits.verifier_seconds, asked.build_seconds, task.solution) == (600, 600, "")
    assert (asked.cpus, asked.memory_mb, asked.storage_mb) == (0, 0, 0)
    assert (asked.user, asked.healthcheck, asked.kept_offline) == ("", None, True)
    assert (asked.verifier.container, asked.verifier.user) == (None, "")


def test_users_and_healthcheck(tmp_path):
    toml = """agent = {user = "bob"}
        verifier = {user = 0}
        environment = {healthcheck = {command = "true", retries = 7, start_period_sec = 0}}"""
    environment = harbor_task(write(tmp_path, toml)).environment
    assert (environment.user, environment.verifier.user) == ("bob", "0")
    check = environment.healthcheck
    assert (check.command, check.retries, check.start_period_sec, check.interval_sec) == ("true", 7, 0, 5)


def test_variables_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("ECHO_TEST_KEY", "a b")
    monkeypatch.setenv("ECHO_TEST_EMPTY", "")
    monkeypatch.delenv("ECHO_TEST_NONE", raising=False)
    toml = """[environment.env]
        A = "<${ECHO_TEST_KEY}>"
        B = "${ECHO_TEST_NONE:-x:-y}${ECHO_TEST_EMPTY:-z}${ECHO_TEST_KEY:-}"
        C = "${ECHO_TEST_EMPTY}$HOME"
        [verifier]
        env = {D = "${ECHO_TEST_KEY}"}
        [solution]
        env = {E = "${ECHO_TEST_KEY}"}"""
    task = harbor_task(write(tmp_path, toml))
    assert task.environment.env == {"A": "<a b>", "B": "x:-yza b", "C": "$HOME"}
    assert task.environment.verifier.env == {"D": "a b"}
    assert task.solution == "E='a b' /solution/solve.sh"
    for table in "environment.env", "verifier.env", "verifier.environment.env", "solution.env":
        says = rf"\[{table.rpartition('.')[0]}\] env: K: this machine has no variable ECHO_TEST_NONE"
        with pytest.raises(ValueError, match=says):
            harbor_task(write(tmp_path, f"[{table}]\nK = '${{ECHO_TEST_NONE}}'"))


@pytest.mark.parametrize("agent, verifier, baseline, gets", [
    ("", "", 'network_mode = "public"', (True, True)),
    ("", "", 'network_mode = "no-network"', (False, False)),
    ("", 'network_mode = "public"', "allow_internet = false", (False, True)),
    ('network_mode = "no-network"', "", "", (False, False)),
    ('network_mode = "public"', 'network_mode = "no-network"', 'network_mode = "no-network"', (True, False)),
])  # fmt: skip
def test_a_network_for_each_phase(tmp_path, capsys, agent, verifier, baseline, gets):
    write(tmp_path / "t", f"[agent]\n{agent}\n[verifier]\n{verifier}\n[environment]\n{baseline}")
    (online,), (offline,) = harbor_tasks(tmp_path, True), harbor_tasks(tmp_path)
    assert (online.environment.network, online.environment.verifier.network) == gets
    assert (offline.environment.network, offline.environment.verifier.network) == (False, False)
    assert ("1 of 1 tasks ask for a network" in capsys.readouterr().out) == any(gets)


SEPARATE = 'verifier.environment_mode = "separate"\n'
OWN = '[verifier.environment]\ndocker_image = "grader"\ncpus = 3\nenv = {A = "1"}\nworkdir = "/w"'


def test_a_verifier_of_its_own_image(tmp_path):
    verifier = harbor_task(write(tmp_path, f"{OWN}\n{TB2}", **{"tests/test.sh": None})).environment.verifier
    own = verifier.container
    assert (own.image, own.cpus, own.env) == ("grader", 3, {"A": "1"})
    assert own.workdir == "/w" and verifier.has_tests
    shared = harbor_task(write(tmp_path, f'verifier.environment_mode = "shared"\n{OWN}')).environment
    assert shared.verifier.container is None


def test_a_verifier_built_from_its_tests(tmp_path):
    write(tmp_path, SEPARATE + '[environment]\ndocker_image = "x"', **{"tests/Dockerfile": "FROM x"})
    verifier = harbor_task(tmp_path).environment.verifier
    assert (verifier.container.image, verifier.container.build, verifier.has_tests) == ("", "tests", True)


@pytest.mark.parametrize("image", ["", 'docker_image = "x"'])
def test_a_verifier_in_a_fresh_copy_of_the_agents_image(tmp_path, image):
    task = harbor_task(write(tmp_path, f'{SEPARATE}[environment]\nworkdir = "/srv"\n{image}'))
    own = task.environment.verifier.container
    same = own.image, own.build, own.workdir
    assert same == (task.environment.image, "environment", "/srv") and not task.environment.verifier.has_tests


def test_a_verifier_that_is_described_without_an_image_has_the_agents(tmp_path):
    toml = '[environment]\ndocker_image = "x"\n[verifier.environment]\ncpus = 2'
    verifier = harbor_task(write(tmp_path, toml)).environment.verifier
    assert (verifier.container.image, verifier.container.cpus, verifier.has_tests) == ("x", 2, False)


def test_artifacts(tmp_path):
    toml = 'artifacts = ["/app/out/", {source = "/srv//a", exclude = ["*.o"]}]\n' + SEPARATE
    verifier = harbor_task(write(tmp_path, toml)).environment.verifier
    assert verifier.artifacts == (("/app/out", ()), ("/srv/a", ("*.o",)), ("/logs/artifacts", ()))


def test_several_containers_are_refused(tmp_path):
    write(tmp_path, TB2, **{"environment/docker-compose.yaml": "services: {}"})
    with pytest.raises(ValueError, match="tasks of several containers"):
        harbor_task(tmp_path)


@pytest.mark.parametrize("layout", ["", "tasks/", "1a2b/"])
def test_layouts(tmp_path, layout):
    for name in "b", "a":
        write(tmp_path / layout / name, TB2)
    assert [task.name for task in harbor_tasks(tmp_path)] == ["a", "b"]


def test_a_world_of_tasks(tmp_path):
    for i in range(7):
        write(tmp_path / f"task-{i}", TB2)
    world = load_tasks(str(tmp_path), False, 0)
    assert [t.name for t in world.held_out] == ["task-0", "task-5"] and len(world.train) == 5
    task, commands = world.weak(random.Random(0))
    assert task in world.train and commands[-1] == "done"


REFUSED = {
    "no toml": ("version = ", {}, "task.toml: "),
    "not utf-8": (b"\xff", {}, "task.toml: "),
    "version": ('version = "2.0"', {}, "task.toml: version: expected 1.0 to 1.4, got '2.0'"),
    "steps": ("[[steps]]\nname = 'a'", {}, "task.toml: steps: expected nothing: it is not supported"),
    "table": ("agent = 3", {}, "task.toml: agent: expected a table"),
    "timeout": ("[agent]\ntimeout_sec = -1", {}, r"\[agent\] timeout_sec: expected a number above 0, got -1"),
    "boolean": ("[environment]\ncpus = true", {}, r"\[environment\] cpus: expected a number"),
    "nan": ("[verifier]\ntimeout_sec = nan", {}, r"\[verifier\] timeout_sec: .*got nan"),
    "memory": ('[environment]\nmemory = "lots"', {}, r"\[environment\] memory: expected a size"),
    "network": ('[environment]\nnetwork_mode = "some"', {}, r'network_mode: expected "public"'),
    "env": ("[environment]\nenv = {a = 1}", {}, r"\[environment\] env: expected names and texts"),
    "verifier elsewhere": ('[verifier]\nenvironment_mode = "away"', {}, 'mode: expected "shared" or "separ'),
    "gpus": ("[environment]\ngpus = 1", {}, "gpus: expected nothing: it is not supported, got 1"),
    "health": ("[environment.healthcheck]\nretries = 1", {}, r"\[environment.healthcheck\] command: missing"),
    "no health": ("environment.healthcheck = true", {}, r"environment.healthcheck: expected a table"),
    "retries": ("[environment.healthcheck]\ncommand = 'true'\nretries = 0", {}, "retries: expected a whole"),
    "servers": ("[[environment.mcp_servers]]\nname = 'a'", {}, r"\[environment\] mcp_servers: .*not supp"),
    "skills": ("[environment]\nskills_dir = 'skills'", {}, r"\[environment\] skills_dir: .*not supp"),
    "system": ("[environment]\nos = 'windows'", {}, r"\[environment\] os: expected \"linux\""),
    "tpu": ("[environment]\ntpu = {type = 'v5'}", {}, r"\[environment\] tpu: .*not supp"),
    "allowlist": ("[environment]\nnetwork_mode = 'allowlist'", {}, "mode: expected .*got 'allowlist'"),
    "user": ("[agent]\nuser = '-x y'", {}, r"\[agent\] user: expected a name or a number"),
    "boolean user": ("[verifier]\nuser = true", {}, r"\[verifier\] user: expected a name or a number"),
    "agent's network": ("[agent]\nnetwork_mode = 'allowlist'", {}, r"\[agent\] network_mode: expected"),
    "verifier's skills": ("[verifier.environment]\nskills_dir = 'a'", {}, r"verifier.environment\] skills"),
    "collect": ("[[verifier.collect]]", {}, r"\[verifier\] collect: .*not supp"),
    "artifacts": ("artifacts = ['a']", {}, "artifacts: expected absolute paths"),
    "artifact that grades": ("artifacts = ['/logs/x/../verifier']", {}, "artifacts: expected absolute"),
    "artifact that grades, otherwise": ("artifacts = ['//tests']", {}, "artifacts: expected absolute"),
    "artifact of no name": ('artifacts = ["/a\\u0000"]', {}, "artifacts: expected absolute"),
    "artifact above": ("artifacts = [{source = '/logs'}]", {}, "artifacts: expected absolute paths, none"),
    "artifact of a service": ("artifacts = [{source = '/a', service = 'b'}]", {}, "artifacts: expected"),
    "what is left out": ("artifacts = [{source = '/a', exclude = 'b'}]", {}, "artifacts: expected"),
    "instruction": ("", {"instruction.md": None}, "instruction.md: missing"),
    "instruction not utf-8": ("", {"instruction.md": b"\xff"}, "instruction.md: 'utf-8'"),
    "verifier": ("", {"tests/test.sh": None}, "tests/test.sh: missing"),
    "image": ("", {"environment/Dockerfile": None}, "environment/Dockerfile: missing"),
    "verifier's services": ("", {"tests/docker-compose.yaml": ""}, "tests/docker-compose.yaml: tasks of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_names_file_and_key(tmp_path, name):
    toml, files, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        harbor_task(write(tmp_path, toml, **files))


def test_sets_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"no task\.toml"):
        harbor_tasks(tmp_path)
    for folder in "x/a", "y/a":
        write(tmp_path / folder, TB2)
    with pytest.raises(ValueError, match="more than one task is called a"):
        harbor_tasks(tmp_path)


def test_fuzzed_task_files_are_accepted_or_refused_clearly(tmp_path):
    rng = random.Random(0)
    values = """-1 0 1 1e300 -inf nan true false "" "2G" "2GB" "1.5T" "-3M" "\\u0000" "public" [] [1] {}
        {a="b"} {a=1} 1979-05-27 0x10 "nul\\u0007" 10000000000000000000000 "G" "99999999999G" """.split()
    keys = """version schema_version timeout_sec build_timeout_sec docker_image cpus memory memory_mb storage
        storage_mb gpus allow_internet network_mode workdir env steps other user artifacts healthcheck
        environment_mode""".split()
    folder, outcomes = write(tmp_path, ""), {True: 0, False: 0}
    for _ in range(1000):
        lines = (TB2 if rng.random() < 0.5 else NEWER).splitlines()
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(lines))
            kind = rng.random()
            if kind < 0.5:
                lines[at] = f"{rng.choice(keys)} = {rng.choice(values)}"
            elif kind < 0.7:
                names = "agent", "environment", "verifier", "x", "[steps]", "a.b"
                lines.insert(at, f"[{rng.choice(names)}]")
            elif kind < 0.8:
                lines.pop(at)
            else:
                where = rng.randrange(len(lines[at]) + 1)
                lines[at] = lines[at][:where] + rng.choice(string.printable + "\0é") + lines[at][where:]
            lines = lines or [""]
        (folder / "task.toml").write_text("\n".join(lines))
        try:
            task = harbor_task(folder)
            assert 0 <= task.environment.memory_mb <= 1e9 and 0 < task.limits.verifier_seconds < 1e10
            assert task.environment.cpus >= 0 and task.limits.agent_seconds > 0
            outcomes[True] += 1
        except ValueError as error:
            said = str(error)
            assert said.startswith(str(folder / "task.toml")) and len(said) < 500 and said.isprintable(), said
            outcomes[False] += 1
    assert min(outcomes.values()) > 100, outcomes
