"""Does ECHO wait less? Tool world with one word to find out, three calls, where half of the wrong words hang.

python figures/hanging.py          redraws the picture and prints the table, from figures/data
python figures/hanging.py --run    makes the runs that are missing

A call that hangs prints no usage line and is cut off after 3 seconds; after two such calls the episode's time
is up. Such an episode is graded but is in no loss, as in the paper, so that only what hung once teaches. Who
knows more of the right words waits less without avoiding anything; so the question is put to wrong calls:
what share of them hangs? Means over the small evaluations of the last STEPS_SHOWN steps.
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

EXPERIMENT = "hanging"
SEEDS, STEPS = (71, 72, 73), 75
STEPS_SHOWN, FEW_EVERY = 25, 5  # steps; from one small evaluation to the next
SETTINGS = {"steps": STEPS, "max_turns": 3, "eval_every": STEPS, "eval_tasks": 50}
PANELS = {  # key of a line -> (title, where it can end)
    "pass_rate_few": ("pass rate, sampled", 1),
    "hung": ("of the wrong calls, those that hang", 1),
    "cut_off": ("calls cut off, an episode", inf),
    "timeouts": ("episodes whose time was up", 1),
    "turns": ("turns", inf),
}
COMPARED = "hung", "cut_off", "timeouts", "turns"


def jobs() -> common.Jobs:
    found = {}
    for seed in SEEDS:
        for name in learning_curves.MAIN:
            arm, control, _, weight = learning_curves.ARMS[name]
            weight = recipe.TUNED["hard"] if weight is None else weight
            config = recipe.config("hard", weight, seed, **SETTINGS)
            found[f"{name}/{seed}"] = arm, control, replace(config, tasks="world:tool,hangs=0.5")
    return found


def run(key: str, arm: str, control: str, config: Config) -> list[dict]:
    return common.train_run(key, arm, control, common.from_base(config), FEW_EVERY)


def draw(lines: list[dict]) -> dict[str, str]:
    rows = [("", *(f"{title}: step 0 → last" for title, _ in PANELS.values()),
             *(f"{PANELS[key][0]}, minus GRPO's" for key in COMPARED))]  # fmt: skip
    fig, axes = plt.subplots(1, len(PANELS), figsize=(18, 5))
    grpo = stats.of(lines, "grpo")
    for name in learning_curves.MAIN:
        if not (mine := stats.of(lines, name)):
            continue
        cells, label = [], learning_curves.LABELS[name]
        for ax, (key, (title, top)) in zip(axes, PANELS.items(), strict=True):
            style.curves(ax, mine, key, style.COLOURS[name], label, top=top)
            style.axes(ax, xlabel="step", title=title, ylim=(0, None))
            cells.append(" → ".join(stats.interval(list(end.values())) for end in ends(mine, key)))
        for key in COMPARED:
            fewer = stats.paired(ends(grpo, key)[1], ends(mine, key)[1]) if name != "grpo" else []
            cells.append(stats.interval(fewer))
        rows.append((label, *cells))
    fig.suptitle(f"tool, half of the wrong words hang, three calls, {style.seeds(lines)}", fontsize=11)
    style.legend(fig, axes, 0.08, ncols=3)
    common.save(fig, EXPERIMENT)
    return {EXPERIMENT: tables.table(rows)}


def ends(lines: list[dict], key: str) -> tuple[dict[int, float], dict[int, float]]:
    """-> seed -> value before the first step; over the last STEPS_SHOWN steps."""
    last = max((line["step"] for line in lines), default=0)
    late = [line for line in lines if line["step"] > last - STEPS_SHOWN]
    return stats.by_seed(lines, key, step=0), stats.by_seed(late, key)


if __name__ == "__main__":
    common.main(EXPERIMENT, __doc__, jobs(), run, draw)
