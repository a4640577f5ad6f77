"""Pass rate and observation CE over the steps of GRPO and ECHO, from one base a seed (paper: figure 2, table
1).

python figures/learning_curves.py          redraws the picture and prints the table, from figures/data
python figures/learning_curves.py --run    makes the data: a run a seed; finished seeds are not repeated
"""

import argparse
import random
from dataclasses import replace

import common
import matplotlib.pyplot as plt
import torch

import train
from echo_min import report
from echo_min.config import Config
from echo_min.policy import load_policy
from echo_min.sft import record, supervise
from echo_min.worlds import load_world
from eval import expert_transcripts, observation_ce

EXPERIMENT, SEEDS = "learning_curves", (1, 2, 3)
COMMAND = "python figures/learning_curves.py --run"


def run(seed: int) -> None:
    """Base, GRPO, ECHO and the supervised floor of one seed; its lines are written when all of it is done."""
    sizes = {"steps": 200, "eval_tasks": 200, "micro_batch_tokens": 16384}
    config = Config(name=f"{EXPERIMENT}-{seed}", seed=seed, **sizes)
    train.main(config, config.folder)
    lines = [
        {
            "experiment": EXPERIMENT,
            "world": config.tasks,
            "arm": r["arm"],
            "env_weight": 0.0 if r["arm"] == "grpo" else config.env_weight,
            "seed": seed,
            "step": r["step"],
            "pass_rate": r["pass_rate"],
            "pass_rate_greedy": r["pass_rate_greedy"],
            "tasks": r["eval_tasks"],
            "observation_ce": r["expert_ce"],
        }
        for r in report.read(config.folder / "metrics.jsonl")
        if "pass_rate" in r
    ]
    common.append(EXPERIMENT, [*lines, floor(config)])


def floor(config: Config) -> dict:
    """How low supervision alone gets: the base, trained on the observations of expert episodes."""
    world = load_world(config.tasks.removeprefix("world:"))
    model, tokenizer = load_policy(config.folder / "base")
    rng = random.Random("expert")
    training = record(tokenizer, [(task, world.expert(task, rng)) for task in world.train], config)
    transcripts = [e.transcript for e in training]
    supervise(model, transcripts, replace(config, base_observation_weight=1.0), action_weight=0.0)
    ce = observation_ce(model, expert_transcripts(tokenizer, world, config))
    line = {"experiment": EXPERIMENT, "world": config.tasks, "arm": "floor", "seed": config.seed}
    return line | {"observation_ce": ce}


def draw(lines: list[dict]) -> None:
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
    panels = ("pass_rate", "observation_ce", "pass_rate_greedy")
    labels = ("pass rate, sampled", "observation CE (nats/token)", "pass rate, greedy")
    seeds = sorted({line["seed"] for line in lines})
    for ax, key, label in zip(axes, panels, labels, strict=True):
        for arm in ("grpo", "echo"):
            steps = sorted({line["step"] for line in lines if line["arm"] == arm})
            curves = torch.tensor([values(lines, arm, step, key) for step in steps])  # [steps, seeds]
            mean, half = torch.tensor([report.mean_interval(points.tolist()) for points in curves]).T
            colour = common.COLOURS[arm]
            ax.plot(steps, curves, color=colour, lw=0.8, alpha=0.5)
            ax.plot(steps, mean, color=colour, lw=2.2, label=arm.upper())
            ax.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.12, lw=0)
        top = 1.02 if key != "observation_ce" else 1.1 * max(line["observation_ce"] for line in lines)
        common.style(ax, xlabel="step", ylabel=label, ylim=(0, top))
    mean, _ = report.mean_interval(values(lines, "floor", None, "observation_ce"))
    axes[1].axhline(mean, color=common.COLOURS["floor"], ls="--", lw=2, label="supervised floor")
    for ax in axes:
        ax.legend(frameon=False, fontsize=8)
    title = f"{lines[0]['world']}, 200 held-out tasks: {len(seeds)} seeds, their mean, its 95 % interval"
    fig.suptitle(title, fontsize=10)
    common.save(fig, EXPERIMENT)


def values(lines: list[dict], arm: str, step: int | None, key: str) -> list[float]:
    return [
        line[key]
        for line in sorted(lines, key=lambda x: x["seed"])
        if line["arm"] == arm and line.get("step") == step
    ]


def table(lines: list[dict]) -> None:
    steps = sorted({line["step"] for line in lines if line["arm"] == "echo"})

    def curve_mean(arm: str, key: str) -> list[float]:
        """One number a seed: the mean over all evaluations after step 0."""
        per_step = [values(lines, arm, step, key) for step in steps[1:]]
        return [sum(column) / len(column) for column in zip(*per_step, strict=True)]

    print("| | GRPO | ECHO | paired difference |\n|---|---|---|---|")
    rows = [
        (
            f"pass rate, step {step}",
            values(lines, "grpo", step, "pass_rate"),
            values(lines, "echo", step, "pass_rate"),
        )
        for step in steps
    ]
    rows += [
        (f"{name}, mean over the curve", curve_mean("grpo", key), curve_mean("echo", key))
        for name, key in (("pass rate", "pass_rate"), ("greedy pass rate", "pass_rate_greedy"))
    ]
    rows += [
        (
            f"expert's observation CE, step {step}",
            values(lines, "grpo", step, "observation_ce"),
            values(lines, "echo", step, "observation_ce"),
        )
        for step in (steps[0], steps[-1])
    ]
    for name, grpo, echo in rows:
        cells = [grpo, echo, [b - a for a, b in zip(grpo, echo, strict=True)]]
        print(
            f"| {name} | "
            + " | ".join("{:.3f} ± {:.3f}".format(*report.mean_interval(cell)) for cell in cells)
            + " |"
        )
    print(
        "\nsupervised floor of observation CE: {:.3f} ± {:.3f}".format(
            *report.mean_interval(values(lines, "floor", None, "observation_ce"))
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="store_true", help="make the data that is missing, on all cores")
    parser.add_argument("--seed", type=int, help="make one seed's data in this process")
    args = parser.parse_args()
    path = common.DATA / f"{EXPERIMENT}.jsonl"
    if args.seed is not None:
        return run(args.seed)
    if args.run:
        done = {line["seed"] for line in common.load(EXPERIMENT, COMMAND)} if path.exists() else set()
        common.run_all([["figures/learning_curves.py", "--seed", str(s)] for s in SEEDS if s not in done])
    lines = common.load(EXPERIMENT, COMMAND)
    if missing := set(SEEDS) - {line["seed"] for line in lines}:
        print(f"seeds {sorted(missing)} are missing; make them with: {COMMAND}")
    draw(lines)
    table(lines)


if __name__ == "__main__":
    main()
