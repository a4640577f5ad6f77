"""What the figure scripts share: runs and their data, jobs on every core.

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
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the scripts in figures/ import train and echo_min

import controls  # noqa: E402
import probes  # noqa: E402
import tables  # noqa: E402

import train  # noqa: E402
from echo_min import checkpoint, report  # noqa: E402
from echo_min.checkpoint import load_policy  # noqa: E402
from echo_min.config import Config  # noqa: E402
from echo_min.evaluate import expert_transcripts  # noqa: E402
from echo_min.machine import on_this_machine  # noqa: E402
from echo_min.sft import make_base  # noqa: E402
from echo_min.tasks import World  # noqa: E402
from echo_min.worlds.registry import load_tasks  # noqa: E402

DATA, PNG, RUNS = ROOT / "figures" / "data", ROOT / "figures" / "png", Path("runs") / "figures"
QUICK = Path("runs") / "quick"
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
MEANS = """reward command_diversity trivial_failures true_targets warning_tokens valid
    right""".split()  # over steps; valid, right: of world gnu's words
# what says where and how a run is made; model: a base that its other settings name, or the experiment
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


@contextmanager
def alone(path: Path):
    """While one process makes what shall lie there, others that need it wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def from_base(config: Config) -> Config:
    """The run, from the base policy of its model, world, turns, strength, steps, seed; made if not there."""
    tasks = re.sub(",.*", "", config.tasks)  # one base for all dials
    world = tasks.replace("world:", "" if config.model == "tiny" else f"{config.model}-")
    made_as = config.max_turns, f"{config.base_observation_weight:g}", config.base_steps, config.seed
    path = RUNS / "bases" / "-".join(map(str, (world, *made_as)))
    with alone(path):
        if not path.exists():
            of_base = on_this_machine(replace(config, tasks=tasks))
            make_base(of_base, world_of(of_base), path)
    return replace(config, model=str(path))


def trained(key: str, arm: str, control: str, config: Config, few_every: int = 0) -> Path:
    """Train one arm, or what is left of it. -> the run's folder"""
    run = replace(config, name=key.replace("/", "-").replace(" ", "-"), arms=arm, control=control or "probes")
    watched = probes.watched(controls.named(control), world_of(config), config, few_every)
    train.main(run, RUNS / key, control=watched)
    return RUNS / key


def train_run(key: str, arm: str, control: str, config: Config, few_every: int = 0) -> list[dict]:
    """Train one arm. few_every: steps from one small evaluation (probes.py) to the next; 0: only with the
    full ones. -> a line an evaluation, small ones too, with means of the steps before."""
    folder, world = trained(key, arm, control, config, few_every), world_of(config)
    about = {"key": key, "config": digest(config), "world": config.tasks.removeprefix("world:"), "arm": arm}
    about |= {"control": control} if control else {}
    about |= {"env_weight": config.env_weight if arm != "grpo" else 0.0, "seed": config.seed}
    records = report.read(folder / "metrics.jsonl")
    probed = {r["probe"]["step"]: r["probe"] for r in records if "probe" in r}
    probed[config.steps] = last_probe(folder / arm, world, config)
    lines, since = {step: about | numbers for step, numbers in probed.items()}, []
    for r in records:
        if "reward" in r:
            since.append(r)
        if "pass_rate" in r:
            line = lines.setdefault(r["step"], about | {"step": r["step"]})
            line |= {"pass_rate": r["pass_rate"], "tasks": r["eval_tasks"]}
            line |= {"pass_rate_greedy": r["pass_rate_greedy"], "observation_ce": r["expert_ce"]}
            line |= means(since, config)
            since = []
    return [lines[step] for step in sorted(lines)]


def means(steps: list[dict], config: Config) -> dict[str, float]:
    """Over the steps since the last evaluation; clipped: share of them whose gradient was clipped;
    no_advantage: share without a group of both passes and failures."""
    found = {name: [s[name] for s in steps if name in s] for name in MEANS}
    found["clipped"] = [s["grad_norm"] > config.grad_clip for s in steps]
    found["no_advantage"] = [s["learning_share"] == 0 for s in steps]
    return {name: round(fmean(values), 5) for name, values in found.items() if values}


def last_probe(arm: Path, world: World, config: Config) -> dict:
    """Of the policy after the last step, which no step follows."""
    config = on_this_machine(config)
    model, tokenizer = load_policy(checkpoint.latest(arm)[1], config.device, config.dtype)
    expert = expert_transcripts(tokenizer, world, config)
    numbers = probes.probe(model, tokenizer, world, expert, config.steps, config)
    return {"step": config.steps} | numbers


def load(experiment: str, jobs: Jobs) -> list[dict]:
    """The experiment's lines. Says which jobs are missing or made with other settings, and the command that
    makes them; ends the program, well, if there is nothing at all yet."""
    path, command = DATA / f"{experiment}.jsonl", f"python figures/{experiment}.py --run"
    lines = report.read(path)
    have = {line["key"]: (line["arm"], line.get("control", ""), line["config"]) for line in lines}
    missing = [key for key in jobs if key not in have]
    wanted = {key: (arm, control, digest(config)) for key, (arm, control, config) in jobs.items()}
    other = [key for key in jobs if have.get(key, wanted[key]) != wanted[key]]
    if other:
        sys.exit(f"{path.name}: made with other settings: {', '.join(other)}; remove them, then {command}")
    if len(missing) == len(jobs):
        print(f"figures/data/{path.name} holds none of the {len(jobs)} runs; make them with: {command}")
        sys.exit(0)
    if missing:
        print(f"{path.name}: {len(missing)} of {len(jobs)} runs are missing; make them with: {command}")
        print(f"missing: {' '.join(missing)}")
    return [line for line in lines if line["key"] in jobs]


def main(
    experiment: str,
    about: str,
    jobs: Jobs,
    run: Callable[[str, str, str, Config], list[dict]],
    draw: Callable[[list[dict]], dict[str, str]],
) -> None:
    """The command line of a figure script: redraw from data, make what is missing, or make one run. draw
    returns the tables, by the names that they have in figures/README.md."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="make the runs that are missing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="with --run: so many at a time")
    parser.add_argument("--only", default="", help="with --run: only runs whose key matches this regex")
    parser.add_argument("--job", help="make this run, in this process")
    parser.add_argument("--write", action="store_true", help="put the tables into figures/README.md")
    parser.add_argument("--quick", action="store_true", help="a few tiny runs, under runs/quick")
    args = parser.parse_args()
    os.chdir(ROOT)
    if args.quick:
        go_quick()
        jobs = as_asked(jobs)
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
        command = [f"figures/{experiment}.py", *["--quick"] * args.quick, "--job"]
        run_all([[*command, key] for key in todo], args.jobs)
    found = draw(load(experiment, jobs))
    print(*found.values(), sep="\n")
    if not args.quick:
        tables.in_page(ROOT / "figures" / "README.md", found, args.write)


def tiny(config: Config) -> Config:
    sizes = {"steps": 4, "eval_every": 2, "eval_tasks": 8, "tasks_per_step": 2, "group_size": 4}
    return replace(config, **sizes, base_demonstrations=100, base_steps=20, base_batch=8)


def go_quick() -> None:
    """All that is written goes to runs/quick."""
    global DATA, PNG, RUNS
    DATA, PNG, RUNS = (QUICK / name for name in ("data", "png", "runs"))


def as_asked(jobs: Jobs, *also: str) -> Jobs:
    """The jobs; with --quick at most six, each of its first seed, and those named, all of them tiny."""
    if QUICK not in DATA.parents:
        return jobs
    first = [*{key.rpartition("/")[0]: key for key in reversed(jobs)}.values()][::-1]
    some = [*first[:: -(-len(first) // 6)], *also]
    return {key: (*jobs[key][:-1], tiny(jobs[key][-1])) for key in some}


def run_all(commands: list[list[str]], at_a_time: int) -> None:
    """Run each command in a process of its own; show the time left."""
    waiting, running, started, done, failed = list(commands), {}, time.time(), 0, []
    (ROOT / RUNS).mkdir(parents=True, exist_ok=True)
    while waiting or running:
        while waiting and len(running) < at_a_time:
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


def save(fig, name: str) -> None:
    PNG.mkdir(parents=True, exist_ok=True)
    fig.savefig(PNG / f"{name}.png", dpi=130)
    plt.close(fig)
    print(f"figures/png/{name}.png")
