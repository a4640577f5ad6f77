"""Does ECHO need fewer commands, and does it wait less? In the headline's worlds, and where wrong calls hang.

python figures/turns.py          redraws the picture and prints the table, from figures/data
python figures/turns.py --run    makes the runs that are missing

Tool world, one word to find out, three calls. Half of the words, where they are wrong, wait for ever: a call
is cut off after 2 seconds, and after two such calls the episode's time is up. It is graded and in no loss, so
only its other rollouts teach. Means over the small evaluations of the last STEPS_SHOWN steps.
"""

from dataclasses import replace
from math import inf

import common
import learning_curves
import matplotlib.pyplot as plt
import recipe
import stats
import style
import tables

from echo_min.config import Config

EXPERIMENT = "turns"
SEEDS, STEPS = (71, 72, 73), 75
STEPS_SHOWN = 25
HANGING = "tool, half of the words hang"
PANELS = {  # key of a line -> (title, where it can end)
    "pass_rate_few": ("pass rate, sampled", 1),
    "turns": ("commands an episode", inf),
    "timeouts": ("episodes whose time was up", 1),
}


def jobs() -> common.Jobs:
    found = {}
    for seed in SEEDS:
        for name in learning_curves.MAIN:
            arm, control, _, weight = learning_curves.ARMS[name]
            weight = recipe.TUNED["hard"] if weight is None else weight
            config = recipe.config("hard", weight, seed, steps=STEPS, max_turns=3)
            found[f"{name}/{seed}"] = arm, control, replace(config, tasks="world:tool,hangs=0.5")
    return found


def run(key: str, arm: str, control: str, config: Config) -> list[dict]:
    return common.train_run(key, arm, control, common.from_base(config))


def draw(lines: list[dict]) -> dict[str, str]:
    fig, axes = plt.subplots(1, len(PANELS), figsize=(13, 5))
    for name in learning_curves.MAIN:
        for ax, (key, (title, top)) in zip(axes, PANELS.items(), strict=True):
            colour, label = style.COLOURS[name], learning_curves.LABELS[name]
            style.curves(ax, stats.of(lines, name), key, colour, label, top=top)
            style.axes(ax, xlabel="step", title=title, ylim=(0, None))
    fig.suptitle(f"{HANGING}, three calls, {style.seeds(lines)}", fontsize=11)
    style.legend(fig, axes, 0.08, ncols=3)
    common.save(fig, EXPERIMENT)
    return {EXPERIMENT: table(lines)}


def table(lines: list[dict]) -> str:
    known = common.load(learning_curves.EXPERIMENT, common.as_asked(learning_curves.jobs()))
    keys = {**{key: title for key, (title, _) in PANELS.items()}, "action_tokens": "tokens typed"}
    rows = [("world", "", *(f"{title}: step 0 → last" for title in keys.values()), "turns minus GRPO's")]
    worlds = {HANGING: lines} | {
        title: stats.of(known, world) for world, title in learning_curves.WORLDS.items()
    }
    for title, of_world in worlds.items():
        per_arm = {name: arm_lines(of_world, name) for name in learning_curves.MAIN}
        for name, mine in per_arm.items():
            if not mine:
                continue
            both = [ends(mine, key) for key in keys]
            cells = [" → ".join(stats.interval(list(end.values())) for end in two) for two in both]
            others = stats.paired(ends(per_arm["grpo"], "turns")[1], ends(mine, "turns")[1])
            rows.append((title, learning_curves.LABELS[name], *cells, stats.interval(others)))
    return tables.table(rows)


def arm_lines(lines: list[dict], name: str) -> list[dict]:
    """Keys are ARM/SEED or WORLD/ARM/SEED."""
    return [line for line in lines if line["key"].split("/")[-2] == name]


def ends(lines: list[dict], key: str) -> tuple[dict[int, float], dict[int, float]]:
    """-> seed -> value before the first step; over the last STEPS_SHOWN steps."""
    last = max((line["step"] for line in lines), default=0)
    late = [line for line in lines if line["step"] > last - STEPS_SHOWN]
    return stats.by_seed(lines, key, step=0), stats.by_seed(late, key)


if __name__ == "__main__":
    common.main(EXPERIMENT, __doc__, jobs(), run, draw)
