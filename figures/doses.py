"""When does ECHO help? Three doses of what makes the terminal's output useful, in the hard tool.

python figures/doses.py          redraws the picture and prints the table, from figures/data
python figures/doses.py --run    makes the runs that are missing

linked: share of training tasks whose failures print what follows from the command. tells: how many
candidates a usage line lists, the right one among them. persist: share of training tasks with this world's
facts, which held-out tasks always have. With one command a task GRPO never reads what a command prints, so
that linked and tells leave its runs as they are: its runs in the plain world stand for all of them.
"""

import common
import learning_curves
import matplotlib.pyplot as plt
import recipe
import stats
import style
import tables

from echo_min.config import Config

EXPERIMENT = "doses"
SEEDS = 11, 12, 13
STEPS = 100
DIALS = {  # dial -> (its values from the weakest dose on; the last is the world as it is, meaning)
    "linked": ((0.0, 0.25, 0.5, 0.75, 1.0), "share of tasks whose failures tell"),
    "tells": ((8, 4, 2, 1), "candidates that a failure lists"),
    "persist": ((0.25, 0.5, 0.75, 1.0), "share of tasks with lasting facts"),
}
ARMS = learning_curves.MAIN
LABELS = learning_curves.LABELS


def cell(dial: str, value: float) -> str:
    return "plain" if value == 1 else f"{dial}={value:g}"


def of_arm(dial: str, value: float, name: str) -> str:
    """The cell whose runs this arm has at this dose."""
    return cell(dial, value if name != "grpo" or dial == "persist" else 1)


def jobs() -> common.Jobs:
    found = {}
    for seed in SEEDS:
        for dial, (values, _) in DIALS.items():
            for value in values:
                for name in ARMS:
                    where = of_arm(dial, value, name)
                    dials = "" if where == "plain" else f",{where}"
                    weight = recipe.TUNED["hard"] if name == "echo" else 0.05
                    arm = "grpo" if name == "grpo" else "echo"
                    config = recipe.config("hard", weight, seed, dials, steps=STEPS)
                    found[f"{where}/{name}/{seed}"] = arm, "", config
    return found


def run(key: str, arm: str, control: str, config: Config) -> list[dict]:
    return common.train_run(key, arm, control, common.from_base(config))


# ---- numbers ----


def gain(lines: list[dict], dial: str, value: float, name: str) -> list[float]:
    """The arm's mean over the curve minus GRPO's, paired by seed."""
    rates = [stats.of(lines, of_arm(dial, value, one), one) for one in ("grpo", name)]
    return stats.paired(*map(learning_curves.end, rates))


def verdict(gains: list[float]) -> str:
    """By the 95 % interval."""
    if len(gains) < 2:
        return "no data"
    mean, half = stats.mean_interval(gains)
    return "ahead" if mean > half else "behind" if mean < -half else "open"


def boundary(lines: list[dict], dial: str, name: str) -> str:
    """The doses at which the arm is ahead of GRPO, and those at which it is behind."""
    said = {"ahead": [], "behind": []}
    for value in DIALS[dial][0]:
        said.get(verdict(gain(lines, dial, value, name)), []).append(f"{value:g}")
    texts = [f"{how} at {', '.join(values)}" for how, values in said.items() if values]
    return f"{dial}: {' and '.join(texts) or 'open everywhere'}"


# ---- picture and table ----


def draw(lines: list[dict]) -> dict[str, str]:
    fig, axes = plt.subplots(1, len(DIALS), figsize=(13, 5.2), sharey=True)
    for ax, (dial, (values, meaning)) in zip(axes, DIALS.items(), strict=True):
        for name in ARMS:
            points = []
            for place, value in enumerate(values):
                rates = learning_curves.end(stats.of(lines, of_arm(dial, value, name), name))
                points += [{"seed": seed, "dose": place, "rate": rate} for seed, rate in rates.items()]
            colour, mark = style.COLOURS[name], {"marker": "o", "ms": 3}
            style.curves(ax, points, "rate", colour, LABELS[name], "dose", top=1, **mark)
        ax.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        style.axes(ax)
        ax.set_xlabel(f"{dial}: {meaning}; 1 is the world as it is", fontsize=9)
    axes[0].set(ylabel="pass rate, mean over the curve", ylim=(0, None))
    said = []
    for name in ARMS[1:]:
        boundaries = [boundary(lines, dial, name) for dial in DIALS]
        said.append(f"{LABELS[name]}, against GRPO: {'; '.join(boundaries)}")
    said += [f"hard tool, {STEPS} steps, {style.seeds(lines)}, tuned lambda {recipe.TUNED['hard']:g}"]
    fig.suptitle("\n".join(said), fontsize=10)
    style.legend(fig, axes, 0.07, ncols=3)
    common.save(fig, EXPERIMENT)
    return {EXPERIMENT: table(lines)}


def table(lines: list[dict]) -> str:
    rows = [("dial", "value", *(LABELS[name] for name in ARMS))]
    rows[0] += tuple(f"{LABELS[name]}, minus GRPO, paired" for name in ARMS[1:])
    for dial, (values, _) in DIALS.items():
        for value in values:
            cells = []
            for name in ARMS:
                rates = learning_curves.end(stats.of(lines, of_arm(dial, value, name), name))
                cells.append(stats.interval(list(rates.values())))
            gains = [gain(lines, dial, value, name) for name in ARMS[1:]]
            cells += [f"{stats.interval(own)} {verdict(own)}" for own in gains]
            rows.append([dial, f"{value:g}", *cells])
    return tables.table(rows)


if __name__ == "__main__":
    common.main(EXPERIMENT, __doc__, jobs(), run, draw)
