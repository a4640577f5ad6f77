"""Pass rate, observation CE and diversity against lambda, in three worlds, from two bases.

python figures/lambda_sweep.py          redraws the pictures and prints the table, from figures/data
python figures/lambda_sweep.py --run    makes the runs that are missing
"""

from dataclasses import replace

import common
import learning_curves
import matplotlib.pyplot as plt
import numpy as np

from echo_min.config import Config

EXPERIMENT = "lambda_sweep"
SEEDS = 11, 12, 13
SCENES = {  # name -> (world, turns, steps, title); file learns faster, and a step of three calls takes longer
    "tool": ("tool", 1, 75, "tool, one call"),
    "hard": ("hard", 1, 75, "hard tool, one call"),
    "file": ("file", 3, 50, "files, three calls"),
}
BASES = {  # name -> (weight of the observations when the base was made, lambdas: finer where its curve bends)
    "moderate": (0.3, (0.0, 0.01, 0.05, 0.2, 1.0, 5.0, 20.0, 100.0)),
    "high": (0.0, (0.0, 0.0001, 0.001, 0.01, 0.05, 1.0)),
}
LAMBDAS = sorted({weight for _, weights in BASES.values() for weight in weights})
NORMS = "selected", "global"  # beside the paper's, in one world
NORM_SCENE, NORM_LAMBDAS = "hard", (0.05, 1.0, 20.0)
COLOURS = {"moderate": common.COLOURS["echo"], "high": common.COLOURS["placebo"]}


def jobs() -> common.Jobs:
    found = {}

    def add(kind: str, scene: str, weight: float, seed: int, **settings) -> None:
        world, turns, steps, _ = SCENES[scene]
        settings |= {"tasks": f"world:{world}", "max_turns": turns, "steps": steps, "seed": seed}
        settings |= learning_curves.TUNED.get(world, {})
        config = Config(**common.SETTINGS, **settings, env_weight=weight)
        found[f"{scene}/{kind}/{weight:g}/{seed}"] = ("echo" if weight else "grpo"), "", config

    for strength, (base_weight, weights) in BASES.items():
        for seed in SEEDS:
            for scene in SCENES:
                for weight in weights:
                    add(strength, scene, weight, seed, base_observation_weight=base_weight)
    for norm in NORMS:
        for seed in SEEDS:
            for weight in NORM_LAMBDAS:
                add(norm, NORM_SCENE, weight, seed, observation_norm=norm)
    return found


def run(key: str, arm: str, control: str, config: Config) -> list[dict]:
    """Every seed starts from the same base: of its scene and strength."""
    return common.train_run(key, arm, control, replace(config, model=str(common.base(config, seed=11))))


# ---- pictures and tables ----


def curve(lines: list[dict], scene: str, kind: str, key: str) -> dict[float, list[float]]:
    """lambda -> a value a seed: the mean over the learning curve, or what the last evaluation says."""
    found: dict[float, list[float]] = {}
    for weight in LAMBDAS:
        mine = [line for line in lines if line["key"].startswith(f"{scene}/{kind}/{weight:g}/")]
        first = 1 if key.startswith("pass") else SCENES[scene][2]
        mine = [line for line in mine if line["step"] >= first]
        if values := list(common.by_seed(mine, key).values()):
            found[weight] = values
    return found


def place(weight: float) -> float:
    """Where a lambda stands on the axis: logarithmic, with 0 left of all."""
    return np.log10(weight) if weight else -4.7


def draw(lines: list[dict]) -> None:
    rows = (
        ("pass_rate", "pass rate,\nmean over the curve"),
        ("observation_ce", "expert's observation CE\n(nats/token)"),
        ("command_diversity", "different commands\nper command"),
        ("trivial_failures", "failures with output\nknown beforehand (share)"),
    )
    fig, axes = plt.subplots(len(rows), len(SCENES), figsize=(12, 11), sharex=True)
    for column, scene in enumerate(SCENES):
        for ax, (key, label) in zip(axes[:, column], rows, strict=True):
            for kind in (*BASES, *NORMS):
                points = curve(lines, scene, kind, key)
                if not points:
                    continue
                x = [place(weight) for weight in points]
                mean, half = np.array([common.mean_interval(v) for v in points.values()]).T
                if kind in NORMS:
                    mark = "s" if kind == "selected" else "^"
                    ax.plot(x, mean, mark, color="black", ms=5, mfc="none", label=f"{kind} normaliser")
                    continue
                ax.plot(x, mean, "o-", color=COLOURS[kind], ms=4, label=f"base with {kind} observation CE")
                ax.fill_between(x, mean - half, mean + half, color=COLOURS[kind], alpha=0.15, lw=0)
            ax.axvline(np.log10(0.05), color="#999999", ls=":", lw=1)
            common.style(ax, ylabel=label if column == 0 else "", ylim=(0, None))
        axes[0, column].set_title(SCENES[scene][3], fontsize=10)
        ticks = [place(weight) for weight in LAMBDAS]
        axes[-1, column].set_xticks(ticks, [f"{weight:g}" for weight in LAMBDAS], rotation=45)
        axes[-1, column].set_xlabel("$\\lambda$ (dotted: the paper's 0.05)")
    handles = axes[0, list(SCENES).index(NORM_SCENE)].get_legend_handles_labels()
    fig.legend(*handles, loc="lower center", ncols=4, frameon=False, fontsize=9)
    fig.tight_layout(rect=(0, 0.04, 1, 1))
    common.save(fig, EXPERIMENT)
    for key, label in rows:
        table(lines, key, label.replace("\n", " "))


def table(lines: list[dict], key: str, label: str) -> None:
    print(f"\n{label}: mean ± 95 % interval over seeds\n")
    print("| world | base | " + " | ".join(f"{weight:g}" for weight in LAMBDAS) + " |")
    print("|---" * (len(LAMBDAS) + 2) + "|")
    for scene in SCENES:
        for kind in (*BASES, *NORMS):
            if points := curve(lines, scene, kind, key):
                cells = [common.interval(points[w]) if w in points else "" for w in LAMBDAS]
                print(f"| {SCENES[scene][3]} | {kind} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    common.main(EXPERIMENT, __doc__, jobs(), run, draw)
