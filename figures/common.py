"""What the figure scripts share: runs and their data, jobs on every core, statistics, one style.

A script's jobs are its runs: {key: (arm, control or "", Config)}. A finished run's lines stand in
figures/data/SCRIPT.jsonl, each with the run's key, arm, control and a digest of its Config; a run whose lines
are there is never repeated.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from statistics import fmean, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the scripts in figures/ import train and echo_min

import controls  # noqa: E402

import train  # noqa: E402
from echo_min import report  # noqa: E402
from echo_min.config import Config  # noqa: E402
from echo_min.machine import on_this_machine  # noqa: E402
from echo_min.sft import make_base  # noqa: E402
from echo_min.tasks import World  # noqa: E402
from echo_min.worlds.registry import load_tasks  # noqa: E402

DATA, PNG, RUNS = ROOT / "figures" / "data", ROOT / "figures" / "png", Path("runs") / "figures"
COLOURS = report.COLOURS | {
    "base": "#bbbbbb", "floor": "#2e7d5b", "echo 0.05": "#e8a0a8", "placebo": "#3d6c9e",
    "placebo_words": "#7a5aa6", "placebo_outputs": "#5aa6a0", "lying": "#c98a2b",
}  # fmt: skip
Jobs = dict[str, tuple[str, str, Config]]
SETTINGS = {"eval_tasks": 200, "save_every": 25}  # of every experiment
FROZEN = {  # settings as they were when digests began: a default may change, these never do
    "seed": 1, "arms": "grpo,echo", "control": "", "tasks": "world:tool", "backend": "sandbox",
    "terminals": 64, "harness": "plain", "max_turns": 3, "max_action_tokens": 12, "output_chars": 160,
    "context": 192, "format_stage": False, "dtype": "float32", "base_demonstrations": 1500,
    "base_steps": 300, "base_batch": 64, "base_learning_rate": 2e-3, "base_observation_weight": 0.3,
    "steps": 100, "tasks_per_step": 8, "group_size": 8, "temperature": 1.0, "policy_weight": 1.0,
    "env_weight": 0.05, "observation_temperature": 1.0, "observation_norm": "observation",
    "policy_norm": "sequence", "parsed_only": False, "warnings_as_targets": False, "clip_low": 0.2,
    "clip_high": 0.28, "optimizer": "adamw", "learning_rate": 6e-4, "warmup_steps": 0, "beta1": 0.9,
    "beta2": 0.95, "weight_decay": 0.01, "grad_clip": 1.0, "micro_batch_tokens": 2048, "eval_every": 25,
    "eval_tasks": 100, "save_every": 1,
}  # fmt: skip
MEANS = "reward", "command_diversity", "trivial_failures", "true_targets", "warning_tokens"  # over steps
# what says where and how a run is made; model: of every experiment a base that its other settings name
PLACE = """name model device threads allow_network tracker prefill_tokens logit_mb
    gradient_checkpointing""".split()


def digest(config: Config) -> str:
    """Of the settings that differ from FROZEN; one that is not in it counts if it differs from its default.
    So a setting that is added or taken away later leaves the digests of all runs without it as they are."""
    neutral = {f.name: f.default for f in fields(config)} | FROZEN
    settings = {k: v for k, v in asdict(config).items() if k not in PLACE and v != neutral[k]}
    return hashlib.sha1(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def world_of(config: Config) -> World:
    return load_tasks(config.tasks, config.allow_network, config.seed)


def base(config: Config, seed: int) -> Path:
    """The base policy of a world (and turns, strength, seed), made if it is not there yet."""
    world = config.tasks.removeprefix("world:").split(",")[0]  # one for all dials
    strength = f"{config.base_observation_weight:g}"
    path = RUNS / "bases" / f"{world}-{config.max_turns}-{strength}-{config.base_steps}-{seed}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            config = on_this_machine(replace(config, seed=seed, tasks=f"world:{world}"))
            make_base(config, world_of(config), path)
    return path


def train_run(key: str, arm: str, control: str, config: Config) -> list[dict]:
    """Train one arm, or what is left of it. -> a line an evaluation, with means of the steps before."""
    folder = RUNS / key
    run = replace(config, name=key.replace("/", "-"), arms=arm, control=control)
    train.main(run, folder, control=controls.named(control))
    about = {"key": key, "config": digest(config), "world": config.tasks.removeprefix("world:"), "arm": arm}
    about |= {"control": control} if control else {}
    about |= {"env_weight": config.env_weight if arm != "grpo" else 0.0, "seed": config.seed}
    lines, since = [], []
    for r in report.read(folder / "metrics.jsonl"):
        if "reward" in r:
            since.append(r)
        if "pass_rate" in r:
            line = about | {"step": r["step"], "pass_rate": r["pass_rate"], "tasks": r["eval_tasks"]}
            line |= {"pass_rate_greedy": r["pass_rate_greedy"], "observation_ce": r["expert_ce"]}
            for name in MEANS:
                if values := [s[name] for s in since if name in s]:
                    line[name] = round(fmean(values), 5)
            lines.append(line)
            since = []
    return lines


def load(experiment: str, jobs: Jobs) -> list[dict]:
    """The experiment's lines. Says which jobs are missing or made with other settings, and the command that
    makes them; ends the program if there is nothing at all."""
    path, command = DATA / f"{experiment}.jsonl", f"python figures/{experiment}.py --run"
    lines = report.read(path)
    have = {line["key"]: (line["arm"], line.get("control", ""), line["config"]) for line in lines}
    missing = [key for key in jobs if key not in have]
    wanted = {key: (arm, control, digest(config)) for key, (arm, control, config) in jobs.items()}
    other = [key for key in jobs if have.get(key, wanted[key]) != wanted[key]]
    if other:
        sys.exit(f"{path.name}: made with other settings: {', '.join(other)}; remove them, then {command}")
    if len(missing) == len(jobs):
        sys.exit(f"figures/data/{path.name} holds none of the {len(jobs)} runs; make them with: {command}")
    if missing:
        print(f"{path.name}: {len(missing)} of {len(jobs)} runs are missing; make them with: {command}")
        print(f"missing: {' '.join(missing)}")
    return [line for line in lines if line["key"] in jobs]


def main(
    experiment: str,
    about: str,
    jobs: Jobs,
    run: Callable[[str, str, str, Config], list[dict]],
    draw: Callable[[list[dict]], None],
) -> None:
    """The command line of a figure script: redraw from data, make what is missing, or make one run."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="make the runs that are missing, on all cores")
    parser.add_argument("--only", default="", help="with --run: only runs whose key matches this regex")
    parser.add_argument("--job", help="make this run, in this process")
    parser.add_argument("--quick", action="store_true", help="a few tiny runs, under runs/quick")
    args = parser.parse_args()
    os.chdir(ROOT)
    if args.quick:
        jobs = quick(jobs)
    if args.job:
        if args.job not in jobs:
            parser.error(f"--job: {args.job!r} is not one of: {', '.join(jobs)}")
        lines = run(args.job, *jobs[args.job])
        DATA.mkdir(parents=True, exist_ok=True)
        with open(DATA / f"{experiment}.jsonl", "a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        return
    if args.run:
        done = {line["key"] for line in report.read(DATA / f"{experiment}.jsonl")}
        todo = [key for key in jobs if key not in done and re.search(args.only, key)]
        run_all([[f"figures/{experiment}.py", *["--quick"] * args.quick, "--job", key] for key in todo])
    draw(load(experiment, jobs))


def tiny(config: Config) -> Config:
    sizes = {"steps": 4, "eval_every": 2, "eval_tasks": 8, "tasks_per_step": 2, "group_size": 4}
    return replace(config, **sizes, base_demonstrations=100, base_steps=20)


def quick(jobs: Jobs) -> Jobs:
    """At most a dozen jobs of the first seed, tiny; all they write goes to runs/quick."""
    global DATA, PNG, RUNS
    DATA, PNG, RUNS = (Path("runs") / "quick" / name for name in ("data", "png", "runs"))
    seed = min(config.seed for *_, config in jobs.values())
    first = {key: job for key, job in jobs.items() if job[-1].seed == seed}
    some = list(first)[:: -(-len(first) // 12)]
    return {key: (*first[key][:-1], tiny(first[key][-1])) for key in some}


def run_all(commands: list[list[str]]) -> None:
    """Run each command in a process of its own, as many at a time as there are cores; show the time left."""
    waiting, running, started, done = list(commands), {}, time.time(), 0
    (ROOT / RUNS).mkdir(parents=True, exist_ok=True)
    failed = []
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            command = waiting.pop(0)
            path = ROOT / RUNS / f"{command[-1].replace('/', '-').replace(' ', '-')}.log"
            with open(path, "w") as log:
                process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=log, stderr=log)
            running[process] = command[-1], path
        time.sleep(0.5)
        for process in [p for p in running if p.poll() is not None]:
            name, path = running.pop(process)
            done += 1
            left = (time.time() - started) / done * (len(waiting) + len(running)) / 60
            if process.returncode:
                failed.append(name)
            state = f"FAILED, see {path}" if process.returncode else "done"
            print(f"{name} {state}; {done} of {len(commands)}, about {left:.0f} minutes left", flush=True)
    if failed:
        sys.exit(f"{len(failed)} runs failed: {' '.join(failed)}; run the same command again to go on")


# ---- statistics and style ----


def pick(lines: list[dict], **wanted) -> list[dict]:
    return [line for line in lines if all(line.get(k) == v for k, v in wanted.items())]


def by_seed(lines: list[dict], key: str, **wanted) -> dict[int, float]:
    """seed -> value; several lines of a seed are averaged."""
    found: dict[int, list[float]] = {}
    for line in pick(lines, **wanted):
        if key in line:
            found.setdefault(line["seed"], []).append(line[key])
    return {seed: fmean(values) for seed, values in sorted(found.items())}


def mean_interval(values: list[float]) -> tuple[float, float]:
    """-> (mean, half-width of its 95 % interval). One value has no interval: (value, nan)."""
    n = len(values)
    return fmean(values), report.student(n) * stdev(values) / n**0.5 if n > 1 else float("nan")


def interval(values: list[float]) -> str:
    """mean ± half-width of the 95 % interval; one seed has none."""
    if len(values) < 2:
        return f"{values[0]:.3f} (one seed)" if values else "–"
    return "{:.3f} ± {:.3f}".format(*mean_interval(values))


def paired(a: dict[int, float], b: dict[int, float]) -> list[float]:
    """b - a for the seeds that both have."""
    return [b[seed] - a[seed] for seed in a if seed in b]


def band(ax, lines: list[dict], key: str, colour: str, label: str, **style) -> None:
    """Mean over seeds and its 95 % interval at every step."""
    steps = sorted({line["step"] for line in lines if key in line})
    points = [mean_interval([x[key] for x in lines if x["step"] == s and key in x]) for s in steps]
    if not points:
        return
    ax.plot(steps, [mean for mean, _ in points], color=colour, lw=2, label=label, **style)
    low, high = ([m + sign * h for m, h in points] for sign in (-1, 1))
    ax.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)


def style(ax, **labels) -> None:
    ax.set(**labels)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def save(fig, name: str) -> None:
    PNG.mkdir(parents=True, exist_ok=True)
    fig.savefig(PNG / f"{name}.png", dpi=130)
    plt.close(fig)
    print(f"figures/png/{name}.png")
