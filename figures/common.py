"""What the figure scripts share: the data files, one style, running jobs on every core."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the scripts in figures/ import train and eval
DATA, PNG = ROOT / "figures" / "data", ROOT / "figures" / "png"
COLOURS = {"base": "#bbbbbb", "grpo": "#777777", "echo": "#d1495b", "placebo": "#3d6c9e", "floor": "#2e7d5b"}


def load(experiment: str, command: str) -> list[dict]:
    """The lines of figures/data/<experiment>.jsonl; ends the program naming the command that makes them."""
    path = DATA / f"{experiment}.jsonl"
    if not path.exists():
        sys.exit(f"{path.relative_to(ROOT)} is missing; make it with: {command}")
    return [json.loads(line) for line in path.read_text().splitlines()]


def append(experiment: str, lines: list[dict]) -> None:
    DATA.mkdir(parents=True, exist_ok=True)
    with open(DATA / f"{experiment}.jsonl", "a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def run_all(commands: list[list[str]]) -> None:
    """Run each command in a process of its own, as many at a time as there are cores. Ends the program if one
    fails."""
    waiting, running, started = list(enumerate(commands, 1)), {}, time.time()
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            number, command = waiting.pop(0)
            running[subprocess.Popen([sys.executable, *command], cwd=ROOT)] = number
        time.sleep(0.5)
        for process in [p for p in running if p.poll() is not None]:
            number = running.pop(process)
            if process.returncode:
                for other in running:
                    other.terminate()
                sys.exit(f"run {number} of {len(commands)} failed; run the same command again to go on")
            print(
                f"run {number} of {len(commands)} done after {(time.time() - started) / 60:.1f} minutes",
                flush=True,
            )


def style(ax, **labels) -> None:
    ax.set(**labels)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def save(fig, name: str) -> None:
    PNG.mkdir(parents=True, exist_ok=True)
    fig.savefig(PNG / f"{name}.png", dpi=150)
    plt.close(fig)
    print(f"figures/png/{name}.png")
