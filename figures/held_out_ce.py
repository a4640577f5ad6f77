"""How well the policies predict the terminal on the expert's episodes, by kind of token (probes.kinds).

Does an arm learn facts, or form? Drawn by learning_curves.py, from its lines.
"""

from math import log

import common
import matplotlib.pyplot as plt
import probes
import stats
import style
import tables

from echo_min.worlds.tool import FILES

SHOWN = {
    "echoed": "words of the command itself",
    "telling": "words that tell what to do",
    "template": "all else: what every output has",
}
# Nats a token of one who knows world and command: nothing is open, but which file grep finds, each as likely.
FLOOR = {("file", "telling"): log(len(FILES))}


def change(lines: list[dict], kind: str) -> tuple[list[float], list[float], list[float]]:
    """-> (base, last, last - base), each a number a seed."""
    key, last = f"ce_{kind}", max((line["step"] for line in lines), default=0)
    first, then = (stats.by_seed(lines, key, step=step) for step in (0, last))
    return list(first.values()), list(then.values()), stats.paired(first, then)


def verdict(differences: list[float]) -> str:
    """By the 95 % interval of the change."""
    if len(differences) < 2:
        return "no data"
    mean, half = stats.mean_interval(differences)
    return "open" if abs(mean) <= half else f"{'rises' if mean > 0 else 'falls'} by {abs(mean):.2f}"


def draw(lines: list[dict], arms: dict, worlds: list, labels: dict) -> dict[str, str]:
    """Rows of panels: the worlds, and the controls of the hard tool."""
    main = [name for name, (_, control, dials, _) in arms.items() if not control + dials]
    shown = [(world, world, main) for world in worlds]
    shown.append(("hard, controls", "hard", ["echo 0.05", *(name for name in arms if name not in main)]))
    fig, axes = plt.subplots(len(shown), len(SHOWN), figsize=(12, 3.1 * len(shown)), squeeze=False)
    for row, (title, world, names) in zip(axes, shown, strict=True):
        for ax, (kind, meaning) in zip(row, SHOWN.items(), strict=True):
            for name in names:
                mine = stats.of(lines, world, name)
                style.curves(ax, mine, f"ce_{kind}", style.COLOURS[name], labels[name])
            if any(f"ce_{kind}" in line for line in stats.of(lines, world)):
                ax.axhline(FLOOR.get((world, kind), 0.0), color="black", ls=":", lw=1, label="floor")
            else:
                ax.text(0.5, 0.5, "no such tokens", ha="center", transform=ax.transAxes)
            style.axes(ax, ylabel=f"{title}: nats a token" if ax is row[0] else "", ylim=(0, None))
            ax.set_title(f"{title}, {kind}: {meaning}", fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("step; 0 is the base")
    said = []
    for name in main:
        of = {kind: verdict(change(stats.of(lines, "hard", name), kind)[2]) for kind in SHOWN}
        said.append(f"{labels[name]}: " + "; ".join(f"{kind} {text}" for kind, text in of.items()))
    title = f"Surprise at the expert's episodes, hard tool, {style.seeds(lines)}, last minus base"
    fig.suptitle("\n".join([title, *said]), fontsize=11)
    style.legend(fig, axes.flat, 0.05, ncols=4)
    common.save(fig, "held_out_ce")
    return {"held_out_ce": table(lines, arms, worlds, labels)}


def table(lines: list[dict], arms: dict, worlds: list, labels: dict) -> str:
    rows = [("world", "arm", *(f"{kind}: base → last" for kind in probes.KINDS))]
    for world in worlds:
        for name in arms:
            mine = stats.of(lines, world, name)
            texts = []
            for kind in probes.KINDS:
                first, last, _ = change(mine, kind)
                texts.append(f"{stats.interval(first)} → {stats.interval(last)}" if last else "–")
            if mine:
                rows.append([world, labels[name], *texts])
    return tables.table(rows)
