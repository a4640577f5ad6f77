"""What containers cost here, beside the plain docker command: `python figures/docker_speed.py`.

Times are medians of interleaved rounds, with their range. A rollout: start, three commands, verify, remove.
"""

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import common  # noqa: F401, finds echo_min

from echo_min.terminal import open_terminal
from echo_min.terminals import docker_engine
from echo_min.worlds.harbor import harbor_task

COMMANDS = "ls", "echo hello > file", "cat file"
TEST = "[[ $(cat file) == hello ]] && echo 1 > /logs/verifier/reward.txt"


def docker(*words: str) -> str:
    return subprocess.run(["docker", *words], capture_output=True, text=True, check=True).stdout.strip()


def plain_rollout(folder: Path, image: str) -> None:
    """What a script of docker commands would do."""
    container = docker("run", "-d", "--network=none", "--memory=512m", image, "sleep", "infinity")
    for command in COMMANDS:
        docker("exec", container, "bash", "-c", command)
    docker("cp", f"{folder}/tests", f"{container}:/tests")
    docker("exec", container, "bash", "-c", "mkdir -p /logs/verifier; bash /tests/test.sh")
    assert docker("exec", container, "cat", "/logs/verifier/reward.txt") == "1"
    docker("rm", "-f", container)


def rollout(task) -> None:
    with open_terminal(task, "docker") as terminal:
        for command in COMMANDS:
            terminal.run(command)
        assert terminal.verify() == 1.0


def seconds(action) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def shown(values: list[float]) -> str:
    return f"{1e3 * statistics.median(values):.0f} ms [{1e3 * min(values):.0f}, {1e3 * max(values):.0f}]"


def main(rounds: int, image: str) -> None:
    folder = Path(tempfile.mkdtemp())
    (folder / "tests").mkdir()
    (folder / "tests/test.sh").write_text(TEST)
    (folder / "instruction.md").touch()
    (folder / "task.toml").write_text(f'[environment]\ndocker_image = "{image}"\ncpus = 1\nmemory_mb = 512')
    task = harbor_task(folder)
    opened: list = []
    rollout(task)  # the image is there from here on

    times = {name: [] for name in ("start", "plain start", "command", "plain command")}
    plain = "run", "-d", "--network=none", "--memory=512m", image, "sleep", "infinity"
    for _ in range(rounds):
        times["start"].append(seconds(lambda: opened.append(open_terminal(task, "docker"))))
        times["plain start"].append(seconds(lambda: opened.append(docker(*plain))))
        terminal, container = opened[-2:]
        execute = "exec", container, "bash", "-c", "true"
        for _ in range(5):
            times["command"].append(seconds(partial(terminal.run, "true")))
            times["plain command"].append(seconds(partial(docker, *execute)))
        terminal.close()
        docker("rm", "-f", container)
    print("| | ours | plain docker | ratio of medians |\n|---|--:|--:|--:|")
    for name, words in (("start", "start, `docker run -d`"), ("command", "a command, `docker exec`")):
        ours, plain = times[name], times[f"plain {name}"]
        ratio = statistics.median(ours) / statistics.median(plain)
        print(f"| {words} | {shown(ours)} | {shown(plain)} | {ratio:.2f} |")
    for workers in 1, 4, 16:
        count, took = max(4, workers), {rollout: [], plain_rollout: []}
        for _ in range(max(rounds // 2, 1)):
            for action, arguments in ((rollout, [task]), (plain_rollout, [folder, image])):
                with ThreadPoolExecutor(workers) as pool:
                    repeated = ([argument] * count for argument in arguments)
                    took[action].append(seconds(partial(list, pool.map(action, *repeated))))
        ours, plain = (60 * count / statistics.median(times) for times in took.values())
        print(f"| rollouts a minute, {workers} at a time | {ours:.0f} | {plain:.0f} | {ours / plain:.2f} |")
    print(f"\n{os.cpu_count()} cores, {rounds} rounds")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--image", default=docker_engine.BASE or docker_engine.DEFAULT)
    main(**vars(parser.parse_args()))
