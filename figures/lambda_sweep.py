"""Pass rate, observation CE and form of the commands against lambda, in three worlds, from two bases.

python figures/lambda_sweep.py          redraws the picture and prints the tables, from figures/data
python figures/lambda_sweep.py --run    makes the runs that are missing

In gnu and files the runs with lambda 0, 0.05 and the tuned one are the first steps of learning_curves.py's.
A run collapses if its last pass rate is below half of that of lambda 0 from the same base. How: commands are
preferred whose output the policy can predict (most rollouts of the last steps fail with an output CE below
0.1), or words are destroyed (most first commands call no program that the expert calls), or neither: commands
are well formed, and what is right is learned slower.
"""

from statistics import fmean

import common
import learning_curves
import matplotlib.pyplot as plt
import numpy as np
import recipe
import stats
import style
import tables

from echo_min.config import Config

EXPERIMENT = "lambda_sweep"
SEEDS = {"hard": (11, 12, 13), "gnu": (1, 2, 3), "file": (1, 2, 3)}
STEPS = {"hard": 75, "gnu": 75, "file": 50}
BASES = {  # (world, name) -> weight of the observations when its base was made, lambdas
    **{(world, "moderate"): (0.3, (0.0, 0.01, 0.05, 0.2, 1.0, 5.0, 20.0)) for world in STEPS},
    ("hard", "high"): (0.0, (0.0, 0.001, 0.05, 1.0)),  # never saw terminal text: its observation CE is high
}
LENT = {  # world -> {lambda: the arm of learning_curves.py that has it}
    world: {0.0: "grpo", 0.05: "echo 0.05", recipe.TUNED[world]: "echo"} for world in ("gnu", "file")
}
ROWS = {  # of the picture: means over all full evaluations after step 0
    "pass_rate": "pass rate",
    "observation_ce": "observation CE on the\nexpert's episodes, nats a token",
    "well_begun": "first commands that call\na program of the expert's",
    "trivial_failures": "rollouts that fail with\nan output known beforehand",
}


def jobs() -> common.Jobs:
    found = {}
    for (world, name), (base_weight, weights) in BASES.items():
        for seed in SEEDS[world]:
            for weight in weights:
                if weight in LENT.get(world, {}):
                    continue
                more = {"steps": STEPS[world], "base_observation_weight": base_weight}
                config = recipe.config(world, weight, seed, **more)
                found[f"{world}/{name}/{weight:g}/{seed}"] = "echo" if weight else "grpo", "", config
    return found


def run(key: str, arm: str, control: str, config: Config) -> list[dict]:
    return common.train_run(key, arm, control, common.from_base(config))


# ---- numbers ----


def lent() -> list[dict]:
    """The lines of LENT, cut at STEPS, under the keys that these runs would have here."""
    keys = {}
    for world, arms in LENT.items():
        for seed in SEEDS[world]:
            for weight, name in arms.items():
                keys[f"{world}/{name}/{seed}"] = f"{world}/moderate/{weight:g}/{seed}", STEPS[world]
    return learning_curves.lent(keys)


def curve(lines: list[dict], world: str, name: str, weight: float, key: str) -> dict[int, float]:
    """seed -> mean over the full evaluations after step 0."""
    mine = stats.of(lines, world, name, f"{weight:g}")
    return stats.by_seed([line for line in mine if line["step"] > 0 and "pass_rate" in line], key)


def last(lines: list[dict], world: str, name: str, weight: float, key: str) -> dict[int, float]:
    """seed -> after the last step."""
    return stats.by_seed(stats.of(lines, world, name, f"{weight:g}"), key, step=STEPS[world])


def collapse(lines: list[dict], world: str, name: str, weight: float) -> tuple[list[int], str]:
    """-> the seeds whose run collapses at this lambda, and how; ([], "") if none does."""
    reached, without = (last(lines, world, name, w, "pass_rate") for w in (weight, 0.0))
    lost = [seed for seed in reached if seed in without and reached[seed] < without[seed] / 2]
    if not lost:
        return [], ""
    ends = {key: last(lines, world, name, weight, key) for key in ("trivial_failures", "well_begun")}
    shares = {key: fmean(values.get(seed, float("nan")) for seed in lost) for key, values in ends.items()}
    if shares["trivial_failures"] > 0.5:
        return lost, "predictable commands preferred"
    return lost, "words destroyed" if shares["well_begun"] < 0.5 else "well formed, slower"


def lead(lines: list[dict], world: str, name: str, weight: float) -> list[float]:
    """Of this lambda's curve on that of lambda 0, paired by seed."""
    return stats.paired(*(curve(lines, world, name, w, "pass_rate") for w in (0.0, weight)))


def headline(lines: list[dict]) -> str:
    said = []
    for (world, name), (_, weights) in BASES.items():
        leads, lost = {"ahead": [], "behind": []}, []
        for weight in weights[1:]:
            if len(found := lead(lines, world, name, weight)) > 1:
                mean, half = stats.mean_interval(found)
                leads["ahead"] += [f"{weight:g}"] * (mean > half)
                leads["behind"] += [f"{weight:g}"] * (mean < -half)
            seeds, how = collapse(lines, world, name, weight)
            runs = len(last(lines, world, name, weight, "pass_rate"))
            lost += [f"{weight:g} ({how}, {len(seeds)} of {runs})"] * (2 * len(seeds) > runs)
        if stats.of(lines, world, name):
            of_zero = "; ".join(f"{how} {', '.join(found) or '–'}" for how, found in leads.items())
            ends = f"most runs collapse at {', '.join(lost) or '–'}"
            said.append(f"{world}, base with {name} observation CE, against lambda 0: {of_zero}; {ends}")
    return "\n".join(said)


# ---- picture and tables ----


def place(weight: float) -> float:
    """Where a lambda stands on the axis: logarithmic, with 0 left of all."""
    return np.log10(weight) if weight else -3.7


def draw(lines: list[dict]) -> dict[str, str]:
    lines = lines + lent()
    fig, axes = plt.subplots(len(ROWS), len(STEPS), figsize=(12, 11.5), sharex=True)
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
    for ax in axes.flat:
        ax.set_ylim(bottom=0)
    for row, key in zip(axes, ROWS, strict=True):
        for ax in row if key != "observation_ce" else ():
            ax.set_ylim(top=1.02)
    fig.suptitle(f"{headline(lines)}\nmeans over all full evaluations after step 0", fontsize=10)
    style.legend(fig, axes.flat, 0.03, ncols=3)
    common.save(fig, EXPERIMENT)
    return {EXPERIMENT: table(lines)}


def table(lines: list[dict]) -> str:
    rows = [("world", "base", "lambda", "pass rate, curve", "minus lambda 0, paired", "last pass rate",
             "observation CE, curve", "first commands well begun, last", "failures foreseen, last",
             "steps clipped, last 25", "runs that collapse")]  # fmt: skip
    for (world, name), (_, weights) in BASES.items():
        for weight in weights:
            if not (mine := stats.of(lines, world, name, f"{weight:g}")):
                continue
            lost, how = collapse(lines, world, name, weight)
            own = [curve(lines, world, name, weight, key) for key in ("pass_rate", "observation_ce")]
            keys = "pass_rate", *list(ROWS)[2:], "clipped"
            ends = [last(lines, world, name, weight, key) for key in keys]
            curves, ces = (stats.interval(list(values.values())) for values in own)
            rate, *shares = (stats.interval(list(values.values())) for values in ends)
            leads = stats.interval(lead(lines, world, name, weight)) if weight else "–"
            runs = len({line["seed"] for line in mine})
            lost = f"{len(lost)} of {runs}: {how}" if lost else f"0 of {runs}"
            rows.append([world, name, f"{weight:g}", curves, leads, rate, ces, *shares, lost])
    return tables.table(rows)


if __name__ == "__main__":
    common.main(EXPERIMENT, __doc__, jobs(), run, draw)
