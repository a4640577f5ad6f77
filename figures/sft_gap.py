"""How much of what expert demonstrations bring does ECHO find without them? In two worlds.

python figures/sft_gap.py          redraws the picture and prints the table, from figures/data
python figures/sft_gap.py --run    makes the runs that are missing

In the hard tool the expert knows facts that the terminal tells too; in gnu which of the valid words is right,
which only the reward tells. SFT: the base, supervised on the right commands of so many training tasks. The
gap is what GRPO after SFT on 200 has above GRPO without SFT. Base, GRPO and ECHO are the first steps of
learning_curves.py's runs.
"""

import random
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import common
import learning_curves
import matplotlib.pyplot as plt
import recipe
import stats
import style
import tables

from echo_min.checkpoint import load_policy, publish
from echo_min.config import Config
from echo_min.machine import on_this_machine
from echo_min.sft import record, supervise

EXPERIMENT = "sft_gap"
SEEDS, STEPS = (1, 2, 3), 100
WORLDS = {"hard": "hard tool: facts", "gnu": "gnu: which valid word"}
SFT = {"base_steps": 150, "base_learning_rate": 1e-3, "base_observation_weight": 0.0}
ALL = 10**6  # demonstrations: as many as there are training tasks
ARMS = {  # name -> (demonstrations, arm; none: SFT alone)
    "sft 50": (50, ""), "sft 200": (200, ""), "sft all": (ALL, ""),
    "sft grpo": (200, "grpo"), "sft echo": (200, "echo"),
}  # fmt: skip
SHARED = [f"{world}/{arm}/{seed}" for world in WORLDS for arm in ("grpo", "echo") for seed in SEEDS]
BARS = {  # arm -> (label, colour)
    "base": ("base", "base"), "sft 50": ("SFT on 50", ""), "sft 200": ("SFT on 200", ""),
    "sft all": ("SFT on all", ""), "grpo": ("GRPO", "grpo"), "echo": ("ECHO", "echo"),
    "sft grpo": ("SFT on 200, then GRPO", "grpo"), "sft echo": ("SFT on 200, then ECHO", "echo"),
}  # fmt: skip


def jobs() -> common.Jobs:
    found = {}
    for seed in SEEDS:
        for world in WORLDS:
            for name, (_, arm) in ARMS.items():
                config = recipe.config(world, recipe.TUNED[world], seed, steps=STEPS if arm else 0)
                found[f"{world}/{name}/{seed}"] = arm or "grpo", "", config
    return found


def run(key: str, arm: str, control: str, config: Config) -> list[dict]:
    config, shown = common.from_base(config), ARMS[key.split("/")[1]][0]
    return common.train_run(key, arm, control, replace(config, model=str(taught(config, shown))))


def taught(config: Config, shown: int) -> Path:
    """The base after SFT on so many demonstrations, made if it is not there."""
    base = Path(config.model)
    folder = base.with_name(f"{base.name}-sft-{shown}")
    with common.alone(folder):
        if not folder.exists():
            config, rng = on_this_machine(config), random.Random(f"experts {config.seed}")
            world = common.world_of(config)
            tasks = rng.sample(world.train, min(shown, len(world.train)))
            model, tokenizer = load_policy(base)
            demonstrations = record(tokenizer, [(task, [task.solution]) for task in tasks], config)
            assert all(episode.reward >= 1 for episode in demonstrations)
            supervise(model, demonstrations, replace(config, **SFT))
            publish(model, tokenizer, folder, config)
    return folder


def last(lines: list[dict], key: str = "pass_rate") -> dict[int, float]:
    """seed -> after the last step."""
    return stats.by_seed(lines, key, step=max((line["step"] for line in lines), default=0))


def closed(lines: list[dict], world: str) -> tuple[list[float], list[float]]:
    """-> the gap (GRPO after SFT minus GRPO), what ECHO without SFT is above GRPO; a number a seed each."""
    grpo, echo, after = (last(stats.of(lines, world, name)) for name in ("grpo", "echo", "sft grpo"))
    both = [seed for seed in grpo if seed in echo and seed in after]
    return [after[s] - grpo[s] for s in both], [echo[s] - grpo[s] for s in both]


def draw(lines: list[dict]) -> dict[str, str]:
    lines = lines + learning_curves.lent({key: (key, STEPS) for key in SHARED})
    rows = [("world", "", "pass rate, sampled", "greedy", "above GRPO, paired", "share of the gap")]
    fig, axes = plt.subplots(1, len(WORLDS), figsize=(12, 5.4), sharey=True)
    for ax, (world, title) in zip(axes, WORLDS.items(), strict=True):
        grpo, part = last(stats.of(lines, world, "grpo")), stats.share_text(*closed(lines, world))
        for place, (name, (label, colour)) in enumerate(BARS.items()):
            mine = stats.of(lines, world, "grpo" if name == "base" else name)
            mine = stats.pick(mine, step=0) if name == "base" else mine
            if not (rates := last(mine)):
                continue
            ax.bar(place, fmean(rates.values()), color=style.COLOURS.get(colour, "white"), edgecolor="black")
            ax.plot([place] * len(rates), [*rates.values()], "k_")
            cells = [list(rates.values()), list(last(mine, "pass_rate_greedy").values())]
            cells += [stats.paired(grpo, rates) if name not in ("grpo", "base") else []]
            rows.append((world, label, *map(stats.interval, cells), part if name == "echo" else ""))
        ax.set_xticks(range(len(BARS)), [label for label, _ in BARS.values()], rotation=35, ha="right")
        style.axes(ax, ylim=(0, 1.02))
        ax.set_title(f"{title}; ECHO's share of the gap: {part}", fontsize=10)
    axes[0].set_ylabel("pass rate, held-out tasks, sampled")
    fig.suptitle(f"{learning_curves.LABELS['echo']}; {STEPS} steps, {style.seeds(lines)}", fontsize=11)
    fig.tight_layout()
    common.save(fig, EXPERIMENT)
    return {EXPERIMENT: tables.table(rows)}


if __name__ == "__main__":
    common.main(EXPERIMENT, __doc__, jobs(), run, draw)
