"""Training on without a verifier: no reward, observation CE alone.

python figures/verifier_free.py          redraws the picture and prints the table, from figures/data
python figures/verifier_free.py --run    makes the runs that are missing

In the hard tool on verbs that were never trained, from the last checkpoints of learning_curves.py (which are
made if they are not there); in gnu from the base, where the lists alone have a ceiling. doses.py trains on in
worlds that tell less.
"""

from dataclasses import replace
from statistics import fmean

import common
import gnu_curves
import learning_curves
import matplotlib.pyplot as plt
import recipe
import stats
import style
import tables

from echo_min import checkpoint
from echo_min.checkpoint import load_policy
from echo_min.config import Config
from echo_min.evaluate import graded
from echo_min.rollout import Noise, sample_episodes
from echo_min.worlds.registry import load_world

EXPERIMENT = "verifier_free"
SEEDS = 1, 2, 3
STEPS = 60
SETTINGS = {"steps": STEPS, "eval_every": 20, "policy_weight": 0.0, "warmup_steps": 0}
# of a development seed, from a checkpoint: at 6e-4 gains were lost again; from gnu's base the recipe's own
LEARNING_RATES = {"hard": 2e-4, "gnu": recipe.RECIPE["gnu"]["learning_rate"]}
FAMILIES = {
    "linked": "hard tool, output follows from the command",
    "ambient": "hard tool, output does not follow",
    "gnu": "gnu, from the base",
}
ARMS = {  # name -> (families, control, label); its start is the arm of that name, or for the words ECHO
    "echo": (("linked", "ambient"), "", "from ECHO"),
    "grpo": (("linked", "ambient"), "", "from GRPO"),
    "base": (("gnu",), "", "from the base"),
    "placebo_words": (("linked", "gnu"), "placebo_words", "shuffled targets"),
}


def jobs() -> common.Jobs:
    found = {}
    for seed in SEEDS:
        for name, (families, control, _) in ARMS.items():
            for family in families:
                world, dials = ("gnu", "") if family == "gnu" else ("hard", f",family={family}")
                found[f"{family}/{name}/{seed}"] = "echo", control, config(world, seed, dials)
    return found


def config(world: str, seed: int, dials: str) -> Config:
    rate = LEARNING_RATES[world]
    return recipe.config(world, 1.0, seed, dials, learning_rate=rate, **SETTINGS)


def run(key: str, arm: str, control: str, config: Config) -> list[dict]:
    family, name, _ = key.split("/")
    if family == "gnu":
        return common.train_run(key, arm, control, common.from_base(config))
    return trained_on(key, arm, control, config, "grpo" if name == "grpo" else "echo")


def trained_on(key: str, arm: str, control: str, config: Config, name: str) -> list[dict]:
    """From the last checkpoint of an arm of learning_curves.py; with the pass rates before and after on the
    tasks that it was trained for."""
    first = start(name, config.seed)
    config = replace(config, model=str(first))
    lines = common.train_run(key, arm, control, config)
    _, last = checkpoint.latest(common.RUNS / key / arm)
    world = load_world("hard", config.seed)
    for line, path in ((lines[0], first), (lines[-1], last)):
        model, tokenizer = load_policy(path)
        tasks, noise = world.held_out[: config.eval_tasks], (Noise.PASS_AT_K, config.seed)
        rewards = graded(sample_episodes(model, tokenizer, tasks, 1, config, noise))
        line["pass_rate_trained"] = sum(reward >= 1 for reward in rewards) / len(rewards)
    return lines


def start(arm: str, seed: int):
    """The last checkpoint of a run of learning_curves.py, which is made if it is not there."""
    key = f"hard/{arm}/{seed}"
    arm, control, config = common.as_asked(learning_curves.jobs(), key)[key]
    with common.alone(common.RUNS / key):  # several runs start there
        config, few_every = common.from_base(config), learning_curves.FEW_EVERY
        return checkpoint.latest(common.trained(key, arm, control, config, few_every) / arm)[1]


# ---- picture and table ----


def change(lines: list[dict], key: str = "pass_rate") -> dict[int, float]:
    """seed -> after the last step minus before the first."""
    last = max((line["step"] for line in lines), default=0)
    return stats.difference(*(stats.by_seed(lines, key, step=step) for step in (0, last)))


def draw(lines: list[dict]) -> dict[str, str]:
    fig, axes = plt.subplots(1, len(FAMILIES), figsize=(13, 5.2), sharey=True)
    said = []
    for ax, (family, title) in zip(axes, FAMILIES.items(), strict=True):
        for name, (_, _, label) in ARMS.items():
            mine = stats.of(lines, family, name)
            style.curves(ax, mine, "pass_rate", style.COLOURS[name], label, top=1)
            if mine and name in ("echo", "base"):
                said.append(f"{family} {label}: {stats.interval(list(change(mine).values()))}")
        if ceilings := [line["ceiling"] for line in stats.of(lines, family) if "ceiling" in line]:
            ax.axhline(fmean(ceilings), color="black", ls=":", label="who knows the lists alone")
        style.axes(ax, xlabel="step without a reward", ylim=(0, 1.02))
        ax.set_title(title, fontsize=10)
    axes[0].set_ylabel("pass rate, held-out tasks, sampled")
    seeds = style.seeds(lines)
    fig.suptitle(f"{STEPS} steps without a reward, {seeds}; change in {'; '.join(said)}", fontsize=11)
    style.legend(fig, axes, 0.17, ncols=3)
    common.save(fig, EXPERIMENT)
    return {EXPERIMENT: table(lines)}


def table(lines: list[dict]) -> str:
    rows = [("verbs", "", "before", "after 20 steps", "last", "change, paired",
             "verbs trained before: change, paired", "P(valid word), change", "telling words, nats: change",
             "ceiling by the lists")]  # fmt: skip
    lines = [gnu_curves.exact(line) if "slot_goal" in line else line for line in lines]
    for family in FAMILIES:
        for name, (_, _, label) in ARMS.items():
            if not (mine := stats.of(lines, family, name)):
                continue
            last = max(line["step"] for line in mine)
            cells = [list(stats.by_seed(mine, "pass_rate", step=step).values()) for step in (0, 20, last)]
            keys = "pass_rate", "pass_rate_trained", "p_valid", "ce_telling"
            cells += [list(change(mine, key).values()) for key in keys]
            cells += [list(stats.by_seed(mine, "ceiling", step=last).values())]
            rows.append([family, label, *map(stats.interval, cells)])
    return tables.table(rows)


if __name__ == "__main__":
    common.main(EXPERIMENT, __doc__, jobs(), run, draw)
