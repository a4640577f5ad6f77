"""Are the harness's warnings worth predicting? Tool world, one word to find out, three calls a task.

python figures/warned.py          redraws the picture and prints the table, from figures/data
python figures/warned.py --run    makes the runs that are missing

ECHO 0.05 with warnings left out of the targets, as in the paper, and with them in. A warning's CE is that of
the answers to fixed malformed replies, one on each of 50 held-out tasks.
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

EXPERIMENT = "warned"
SEEDS, STEPS = (61, 62, 63), 75
ARMS = {  # name -> (warnings among the targets, label, colour)
    "out": (False, "ECHO 0.05, warnings left out", "echo 0.05"),
    "in": (True, "ECHO 0.05, warnings predicted", "code"),
}
PANELS = {  # key of a line -> (title, where it can end)
    "ce_warned": ("CE of warnings", inf),
    "observation_ce": ("CE of output, expert's episodes", inf),
    "pass_rate": ("pass rate, sampled", 1),
}


def jobs() -> common.Jobs:
    found = {}
    for seed in SEEDS:
        for name, (targets, *_) in ARMS.items():
            config = recipe.config("hard", 0.05, seed, steps=STEPS, max_turns=3, warnings_as_targets=targets)
            found[f"{name}/{seed}"] = "echo", "", replace(config, tasks="world:tool")
    return found


def run(key: str, arm: str, control: str, config: Config) -> list[dict]:
    return common.train_run(key, arm, control, common.from_base(config))


def draw(lines: list[dict]) -> dict[str, str]:
    heads = [f"{title}: step 0, last" for title, _ in PANELS.values()]
    rows = [("", *heads, "curve of the pass rate, minus the first, paired")]
    out = learning_curves.end(stats.of(lines, "out"))
    fig, axes = plt.subplots(1, len(PANELS), figsize=(13, 5))
    for name, (_, label, colour) in ARMS.items():
        if not (mine := stats.of(lines, name)):
            continue
        cells = []
        for ax, (key, (title, top)) in zip(axes, PANELS.items(), strict=True):
            style.curves(ax, mine, key, style.COLOURS[colour], label, top=top)
            style.axes(ax, xlabel="step", ylim=(0, None), title=title)
            steps = sorted({line["step"] for line in mine if key in line})
            ends = [list(stats.by_seed(mine, key, step=step).values()) for step in steps[:1] + steps[-1:]]
            cells.append(", ".join(map(stats.interval, ends)) or "–")
        gain = stats.paired(out, learning_curves.end(mine)) if name != "out" else []
        rows.append((label, *cells, stats.interval(gain)))
    fig.suptitle(f"Warnings as targets: tool, one word, three calls, {style.seeds(lines)}", fontsize=11)
    style.legend(fig, axes, 0.08, ncols=2)
    common.save(fig, EXPERIMENT)
    return {EXPERIMENT: tables.table(rows)}


if __name__ == "__main__":
    common.main(EXPERIMENT, __doc__, jobs(), run, draw)
