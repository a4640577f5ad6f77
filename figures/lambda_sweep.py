"""Pass rate, observation CE and form of the commands against lambda, in three worlds, from two bases.

python figures/lambda_sweep.py          redraws the picture and prints the tables, from figures/data
python figures/lambda_sweep.py --run    makes the runs that are missing

A lambda collapses where the last pass rate, mean over seeds, is below half of lambda 0's. How: commands are
preferred whose output the policy can predict (most rollouts of the last steps fail with an output CE below
0.1), or words are destroyed (most first commands call no program that the expert calls).
"""

from statistics import fmean

import common
import matplotlib.pyplot as plt
import numpy as np
import recipe
import stats
import style
import tables

from echo_min.config import Config

EXPERIMENT = "lambda_sweep"
SEEDS = 11, 12, 13
STEPS = {"hard": 75, "gnu": 75, "file": 50}
BASES = {  # (world, name) -> weight of the observations when its base was made, lambdas
    **{(world, "moderate"): (0.3, (0.0, 0.01, 0.05, 0.2, 1.0, 5.0, 20.0)) for world in STEPS},
    ("hard", "high"): (0.0, (0.0, 0.001, 0.05, 1.0)),  # never saw terminal text: its observation CE is high
}
ROWS = {  # of the picture: means over all evaluations after step 0
    "pass_rate": "pass rate",
    "observation_ce": "observation CE on the\nexpert's episodes, nats a token",
    "well_begun": "first commands that call\na program of the expert's",
    "trivial_failures": "rollouts that fail with\nan output known beforehand",
}


def jobs() -> common.Jobs:
    found = {}
    for seed in SEEDS:
        for (world, name), (base_weight, weights) in BASES.items():
            for weight in weights:
                more = {"steps": STEPS[world], "base_observation_weight": base_weight}
                config = recipe.config(world, weight, seed, **more)
                found[f"{world}/{name}/{weight:g}/{seed}"] = "echo" if weight else "grpo", "", config
    return found


def run(key: str, arm: str, control: str, config: Config) -> list[dict]:
    return common.train_run(key, arm, control, common.from_base(config))


# ---- numbers ----


def curve(lines: list[dict], world: str, name: str, weight: float, key: str) -> dict[int, float]:
    """seed -> mean over what was measured after step 0."""
    mine = stats.of(lines, world, name, f"{weight:g}")
    return stats.by_seed([line for line in mine if line["step"] > 0], key)


def last(lines: list[dict], world: str, name: str, weight: float, key: str) -> float:
    """Mean over seeds after the last step; nan if there is none."""
    values = stats.by_seed(stats.of(lines, world, name, f"{weight:g}"), key, step=STEPS[world])
    return fmean(values.values()) if values else float("nan")


def collapse(lines: list[dict], world: str, name: str, weight: float) -> str:
    """How this lambda destroys the policy; empty if it does not."""
    reached, without = (last(lines, world, name, w, "pass_rate") for w in (weight, 0.0))
    if not reached < without / 2:
        return ""
    if last(lines, world, name, weight, "trivial_failures") > 0.5:
        return "predictable commands preferred"
    return "words destroyed" if last(lines, world, name, weight, "well_begun") < 0.5 else "otherwise"


def headline(lines: list[dict]) -> str:
    said = []
    for (world, name), (_, weights) in BASES.items():
        curves = {w: curve(lines, world, name, w, "pass_rate").values() for w in weights}
        means = {w: fmean(values) for w, values in curves.items() if values}
        if not means:
            continue
        best = max(means, key=means.get)
        lost = [f"{w:g} ({how})" for w in weights if (how := collapse(lines, world, name, w))]
        ends = f"collapse at {', '.join(lost)}" if lost else "no collapse"
        said.append(f"{world}, base with {name} observation CE: best {best:g}, {ends}")
    return "\n".join(said)


# ---- picture and tables ----


def place(weight: float) -> float:
    """Where a lambda stands on the axis: logarithmic, with 0 left of all."""
    return np.log10(weight) if weight else -3.7


def draw(lines: list[dict]) -> dict[str, str]:
    fig, axes = plt.subplots(len(ROWS), len(STEPS), figsize=(12, 11.5), sharex=True, sharey="row")
    every = sorted({weight for _, weights in BASES.values() for weight in weights})
    for ax, label in zip(axes[:, 0], ROWS.values(), strict=True):
        ax.set_ylabel(label)
    for column, world in zip(axes.T, STEPS, strict=True):
        for ax, key in zip(column, ROWS, strict=True):
            top = float("inf") if key == "observation_ce" else 1.0
            for (where, name), (_, weights) in BASES.items():
                values = {w: curve(lines, world, name, w, key) for w in weights} if where == world else {}
                points = [
                    {"seed": seed, "place": place(w), key: value}
                    for w, own in values.items()
                    for seed, value in own.items()
                ]
                dashes = {"ls": "-", "marker": "o"} if name == "moderate" else {"ls": "--", "marker": "s"}
                label_of = f"base with {name} observation CE"
                style.curves(ax, points, key, "black", label_of, "place", top, **dashes, ms=3)
            ax.axvline(np.log10(0.05), color=style.COLOURS["echo 0.05"], ls=":", label="the paper's 0.05")
            style.axes(ax)
        here = stats.of(lines, world)
        seeds = style.seeds(here) if here else "no data"
        column[0].set_title(f"{world}, {STEPS[world]} steps, {seeds}", fontsize=10)
        column[-1].set_xticks([place(w) for w in every], [f"{w:g}" for w in every], rotation=45)
        column[-1].set_xlabel("lambda")
    for ax in axes[:, 0]:
        ax.set_ylim(bottom=0)  # and that of its row
    fig.suptitle(f"{headline(lines)}\nmeans over all evaluations after step 0", fontsize=10)
    style.legend(fig, axes.flat, 0.03, ncols=3)
    common.save(fig, EXPERIMENT)
    return {EXPERIMENT: table(lines)}


def table(lines: list[dict]) -> str:
    rows = [("world", "base", "lambda", "pass rate, curve", "observation CE, curve", "last pass rate",
             "first commands well begun, last", "failures foreseen, last", "collapse")]  # fmt: skip
    for (world, name), (_, weights) in BASES.items():
        for weight in weights:
            if not stats.of(lines, world, name, f"{weight:g}"):
                continue
            own = [curve(lines, world, name, weight, key) for key in ("pass_rate", "observation_ce")]
            cells = [stats.interval(list(values.values())) for values in own]
            for key in ("pass_rate", "well_begun", "trivial_failures"):
                cells.append(f"{last(lines, world, name, weight, key):.3f}")
            rows.append([world, name, f"{weight:g}", *cells, collapse(lines, world, name, weight)])
    return tables.table(rows)


if __name__ == "__main__":
    common.main(EXPERIMENT, __doc__, jobs(), run, draw)
