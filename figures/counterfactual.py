"""Does the policy know what its command does, or only what the task's outputs look like?

python figures/counterfactual.py            draws the picture and prints the table, from the data of
                                            learning_curves.py; with --write the table goes into README.md

On the expert's episodes: how much likelier, in nats a token, the true first output is after its own command
than after another episode's, the prompt being the same. 0: the command does not matter. Whole outputs, and
the words alone that tell what to do.
"""

import argparse
from math import inf
from statistics import fmean

import common
import learning_curves
import matplotlib.pyplot as plt
import stats
import style
import tables

EXPERIMENT = "counterfactual"
PANELS = {"log_ratio": "whole outputs", "log_ratio_telling": "words that tell what to do"}


def headline(lines: list[dict], worlds: list[str]) -> str:
    """For which worlds and arms the last log-ratio of the words that tell is told from 0."""
    said = []
    for world in worlds:
        for name in learning_curves.MAIN:
            mine = [line for line in stats.of(lines, world, name) if "log_ratio_telling" in line]
            last = max((line["step"] for line in mine), default=0)
            values = list(stats.by_seed(mine, "log_ratio_telling", step=last).values())
            if len(values) > 1 and abs(stats.mean_interval(values)[0]) > stats.mean_interval(values)[1]:
                said.append(f"{learning_curves.LABELS[name]} in {world} ({fmean(values):+.2f} nats)")
    return f"Words that tell depend on the command typed: {'; '.join(said) or 'in no arm'}"


def draw(lines: list[dict]) -> dict[str, str]:
    worlds = [world for world in learning_curves.WORLDS if stats.of(lines, world)]
    rows = [("world", "", *(f"{title}: base → last, nats a token" for title in PANELS.values()))]
    fig, axes = plt.subplots(len(worlds), len(PANELS), figsize=(11, 1.2 + 3.6 * len(worlds)), squeeze=False)
    for row, world in zip(axes, worlds, strict=True):
        for name in learning_curves.ARMS:
            mine, cells = stats.of(lines, world, name), []
            for ax, (key, title) in zip(row, PANELS.items(), strict=True):
                drawn = mine if name in learning_curves.MAIN else []
                style.curves(ax, drawn, key, style.COLOURS[name], learning_curves.LABELS[name], bottom=-inf)
                style.axes(ax, xlabel="step", title=f"{world}: {title}", ylabel="log-ratio, nats a token")
                last = max((line["step"] for line in mine if key in line), default=0)
                ends = [list(stats.by_seed(mine, key, step=step).values()) for step in (0, last)]
                cells.append(" → ".join(map(stats.interval, ends)))
            if mine:
                rows.append((world, learning_curves.LABELS[name], *cells))
    seeds = f"{style.seeds(lines)}; 0: the command does not matter"
    fig.suptitle(f"{headline(lines, worlds)}\n{seeds}", fontsize=11)
    style.legend(fig, axes.flat, 0.05, ncols=4)
    common.save(fig, EXPERIMENT)
    return {EXPERIMENT: tables.table(rows)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into figures/README.md")
    write = parser.parse_args().write
    found = draw(common.load(learning_curves.EXPERIMENT, learning_curves.jobs()))
    print(*found.values(), sep="\n")
    tables.in_page(common.ROOT / "figures" / "README.md", found, write)
