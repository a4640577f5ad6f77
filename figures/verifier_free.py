"""Training on without a verifier: no reward, observation CE alone, on verbs never trained (paper: figure 5,
table 4).

python figures/verifier_free.py          redraws the picture and prints the table, from figures/data
python figures/verifier_free.py --run    makes the runs that are missing
"""

from dataclasses import replace

import common
import learning_curves
import matplotlib.pyplot as plt
import stats
import style

import train
from echo_min import checkpoint
from echo_min.checkpoint import load_policy
from echo_min.config import Config
from echo_min.evaluate import graded
from echo_min.rollout import Noise, sample_episodes
from echo_min.worlds.registry import load_world

EXPERIMENT = "verifier_free"
SEEDS = learning_curves.SEEDS
SCENE = "tool"  # whose checkpoints it starts from
STEPS = 60
FAMILIES = {
    "linked": "output follows from the command",
    "ambient": "output does not follow from the command",
}
ARMS = {  # name -> (start, control, settings, colour, label)
    "echo": ("echo", "", {}, style.COLOURS["echo"], "from ECHO"),
    "parsed": ("echo", "", {"parsed_only": True}, "#e8a0a8", "from ECHO, parsed ones only (one seed)"),
    "grpo": ("grpo", "", {}, style.COLOURS["grpo"], "from GRPO"),
    "placebo": ("echo", "placebo_words", {}, style.COLOURS["placebo"], "from ECHO, telling words exchanged"),
}


def jobs() -> common.Jobs:
    found = {}
    for seed in SEEDS:
        for family in FAMILIES:
            for name, (_, control, settings, *_) in ARMS.items():
                if control and family == "ambient":
                    continue  # its outputs hold no telling word
                if name == "parsed" and seed != SEEDS[0]:
                    continue  # in one call a reply that is not parsed has no output: the filter never acts
                settings = settings | {"tasks": f"world:{SCENE},family={family}", "max_turns": 1}
                settings |= {"seed": seed, "steps": STEPS, "eval_every": 10}
                settings |= {"policy_weight": 0.0, "env_weight": 1.0}
                settings |= {"learning_rate": 2e-4}  # chosen on a development seed; with 6e-4 it drifts away
                found[f"{family}/{name}/{seed}"] = "echo", control, Config(**common.SETTINGS, **settings)
    return found


def run(key: str, arm: str, control: str, config: Config) -> list[dict]:
    _, name, seed = key.split("/")
    config = replace(config, model=str(start(ARMS[name][0], int(seed))))
    lines = common.train_run(key, arm, control, config)
    _, last = checkpoint.latest(common.RUNS / key / arm)
    for line, path in ((lines[0], start(ARMS[name][0], int(seed))), (lines[-1], last)):
        model, tokenizer = load_policy(path)
        trained = load_world(SCENE, config.seed).held_out[: config.eval_tasks]
        episodes = sample_episodes(model, tokenizer, trained, 1, config, (Noise.PASS_AT_K, config.seed))
        rewards = graded(episodes)
        line["pass_rate_trained"] = sum(reward >= 1 for reward in rewards) / len(rewards)
    return lines


def start(arm: str, seed: int):
    """The last checkpoint of a run of learning_curves.py, which is made if it is not there."""
    key = f"{SCENE}/{arm}/{seed}"
    folder = common.RUNS / key / arm
    arm, _, config = learning_curves.jobs()[key]
    if common.Path("runs/quick") in common.RUNS.parents:
        config = common.tiny(config)
    if not (found := checkpoint.latest(folder)) or found[0] < config.steps:
        config = replace(config, model=str(common.base(config, seed)), arms=arm, name=key.replace("/", "-"))
        train.main(config, common.RUNS / key)
    return checkpoint.latest(folder)[1]


def draw(lines: list[dict]) -> None:
    fig, axes = plt.subplots(1, len(FAMILIES), figsize=(9, 3.9), sharey=True)
    for ax, (family, title) in zip(axes, FAMILIES.items(), strict=True):
        for name, (*_, colour, label) in ARMS.items():
            mine = [line for line in lines if line["key"].startswith(f"{family}/{name}/")]
            style.band(ax, mine, "pass_rate", colour, label, ls="--" if name == "placebo" else "-")
        style.axes(ax, xlabel="step without a reward", ylabel="pass rate, held-out tasks", ylim=(0, 1.02))
        ax.set_title(f"{family}: {title}", fontsize=10)
    handles = axes[0].get_legend_handles_labels()
    fig.legend(*handles, loc="lower center", ncols=2, frameon=False, fontsize=9)
    fig.tight_layout(rect=(0, 0.13, 1, 1))
    common.save(fig, EXPERIMENT)
    table(lines)


def table(lines: list[dict]) -> None:
    print("| verbs | | before | step 20 | last | change at 20 | at the end | trained verbs: before | last |")
    print("|---" * 9 + "|")
    for family in FAMILIES:
        for name, (*_, label) in ARMS.items():
            mine = [line for line in lines if line["key"].startswith(f"{family}/{name}/")]
            if not mine:
                continue
            first, early, last = (stats.by_seed(mine, "pass_rate", step=step) for step in (0, 20, STEPS))
            cells = [list(rates.values()) for rates in (first, early, last)]
            cells += [stats.paired(first, early), stats.paired(first, last)]
            for step in (0, STEPS):
                cells.append(list(stats.by_seed(mine, "pass_rate_trained", step=step).values()))
            print(f"| {family} | {label} | " + " | ".join(map(stats.interval, cells)) + " |")


if __name__ == "__main__":
    common.main(EXPERIMENT, __doc__, jobs(), run, draw)
