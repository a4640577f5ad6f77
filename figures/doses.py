"""When does ECHO help? Three doses of what makes the terminal's output useful, in the hard tool.

python figures/doses.py          redraws the picture and prints the table, from figures/data
python figures/doses.py --run    makes the runs that are missing

linked: share of training tasks whose failures print what follows from the command. tells: how many
candidates a usage line lists, the right one among them. persist: share of training tasks with this world's
facts, which held-out tasks always have. With one command a task GRPO never reads what a command prints, so
that linked and tells leave its runs as they are. The world as it is: the first steps of learning_curves.py's
runs. free: on from that world's ECHO checkpoint without a reward, as in verifier_free.py, whose runs these
are where all is told. Data of both must be there.

Intervals of gains and changes are by the spread that all doses share, since three seeds tell it badly. Most
doses share GRPO's runs, so they err together.
"""

from statistics import fmean

import common
import learning_curves
import matplotlib.pyplot as plt
import recipe
import stats
import style
import tables
import verifier_free

from echo_min.config import Config

EXPERIMENT = "doses"
SEEDS = 1, 2, 3
STEPS = 100
DIALS = {  # dial -> (its values from the weakest dose on; the last is the world as it is, meaning)
    "linked": ((0.0, 0.25, 0.5, 0.75, 1.0), "share of tasks whose failures tell"),
    "tells": ((8, 4, 2, 1), "candidates that a failure lists"),
    "persist": ((0.25, 0.5, 0.75, 1.0), "share of tasks with lasting facts"),
}
ARMS = learning_curves.MAIN
LABELS = learning_curves.LABELS
FREE = {"pass_rate": "new verbs", "pass_rate_trained": "verbs trained before"}  # of the runs without a reward
LENT = {f"hard/{name}/{seed}": (f"plain/{name}/{seed}", STEPS) for name in ARMS for seed in SEEDS}


def cell(dial: str, value: float) -> str:
    return "plain" if value == 1 else f"{dial}={value:g}"


def of_arm(dial: str, value: float, name: str) -> str:
    """The cell whose runs this arm has at this dose."""
    return cell(dial, value if name != "grpo" or dial == "persist" else 1)


def jobs() -> common.Jobs:
    found = {}
    for seed in SEEDS:
        for dial, (values, _) in DIALS.items():
            for value in values[:-1]:
                where = cell(dial, value)
                for name in ARMS if dial == "persist" else ARMS[1:]:
                    weight = recipe.TUNED["hard"] if name == "echo" else 0.05
                    arm = "grpo" if name == "grpo" else "echo"
                    config = recipe.config("hard", weight, seed, f",{where}", steps=STEPS)
                    found[f"{where}/{name}/{seed}"] = arm, "", config
                if dial != "persist":
                    free = verifier_free.config("hard", seed, f",family=linked,{where}")
                    found[f"{where}/free/{seed}"] = "echo", "", free
    return found


def run(key: str, arm: str, control: str, config: Config) -> list[dict]:
    if "/free/" in key:
        return verifier_free.trained_on(key, arm, control, config, "echo")
    return common.train_run(key, arm, control, common.from_base(config))


# ---- numbers ----


Dose = tuple[str, float]  # (dial, value)


def gains(lines: list[dict], name: str) -> dict[Dose, dict[int, float]]:
    """dose -> seed -> the arm's mean over the curve minus GRPO's."""
    found = {}
    for dial, (values, _) in DIALS.items():
        for value in values:
            both = [stats.of(lines, of_arm(dial, value, one), one) for one in ("grpo", name)]
            found[dial, value] = stats.difference(*map(learning_curves.end, both))
    return found


def smaller(found: dict[Dose, dict[int, float]]) -> dict[Dose, dict[int, float]]:
    """What a dose's gain is above that of the world as it is, by seed."""
    return {
        (dial, value): stats.difference(found[dial, DIALS[dial][0][-1]], own)
        for (dial, value), own in found.items()
        if value != 1
    }


def halves(found: dict[Dose, dict[int, float]]) -> dict[Dose, float]:
    """Of each interval; the world as it is, which all dials share, counts once."""
    cells = {cell(*dose): list(own.values()) for dose, own in found.items()}
    pooled = dict(zip(cells, stats.pooled_halves([*cells.values()]), strict=True))
    return {dose: pooled[cell(*dose)] for dose in found}


def judged(found: dict[Dose, dict[int, float]]) -> dict[Dose, tuple[str, str]]:
    """dose -> (the mean with its interval, what it says)."""
    texts = {}
    for dose, half in halves(found).items():
        if not found[dose]:
            texts[dose] = "–", "no data"
            continue
        mean = fmean(found[dose].values())
        says = "ahead" if mean > half else "behind" if mean < -half else "open"
        texts[dose] = f"{mean:+.3f} ± {half:.3f}", says
    return texts


def boundary(lines: list[dict], dial: str, name: str) -> str:
    """The doses at which the arm is ahead of GRPO, and those at which it is behind, or not told from it."""
    said = {"ahead": [], "behind": [], "open": [], "no data": []}
    for (of, value), (_, says) in judged(gains(lines, name)).items():
        if of == dial:
            said[says].append(f"{value:g}")
    texts = [f"{how} at {', '.join(values)}" for how, values in said.items() if values]
    return f"{dial}: {', '.join(texts)}"


def free_changes(lines: list[dict], key: str) -> dict[Dose, dict[int, float]]:
    """dose -> seed -> after the last step without a reward minus before the first."""
    every = [(dial, value) for dial, (values, _) in DIALS.items() for value in values]
    return {dose: verifier_free.change(stats.of(lines, cell(*dose), "free"), key) for dose in every}


# ---- picture and table ----


def draw(lines: list[dict]) -> dict[str, str]:
    lines = lines + learning_curves.lent(LENT) + lent_free()
    fig, axes = plt.subplots(2, len(DIALS), figsize=(13, 8.6), sharey="row")
    for (above, below), (dial, (values, meaning)) in zip(axes.T, DIALS.items(), strict=True):
        for name in ARMS[1:]:
            found = gains(lines, name)
            half, said = halves(found), judged(found)
            here = [(dial, value) for value in values]
            series = [(list(found[dose].values()), half[dose], said[dose][1]) for dose in here]
            bars(above, series, style.COLOURS[name], f"{LABELS[name]}, minus GRPO")
        for (key, label), colour in zip(FREE.items(), ("echo", "base"), strict=True):
            found = free_changes(lines, key)
            half, here = halves(found), [(dial, value) for value in values]
            series = [(list(found[dose].values()), half[dose], "") for dose in here]
            bars(below, series, style.COLOURS[colour], f"no reward: {label}, last minus first", "s")
        for ax in (above, below):
            ax.axhline(0, color="black", lw=0.7)
            ax.set_xticks(range(len(values)), [f"{value:g}" for value in values])
            style.axes(ax, xlabel=f"{dial}: {meaning}", xlim=(-0.3, len(values) - 0.7))
    axes[1, -1].set_visible(False)  # on the tasks of one world every fact persists
    axes[0, 0].set_ylabel("gain in pass rate, mean over the curve\nfilled: ahead of GRPO, or behind")
    axes[1, 0].set_ylabel("change in pass rate without a reward")
    said = []
    for name in ARMS[1:]:
        boundaries = [boundary(lines, dial, name) for dial in DIALS]
        said.append(f"{LABELS[name]}, against GRPO: {'; '.join(boundaries)}")
    world = f"hard tool (1: as it is), {STEPS} steps, {style.seeds(lines)}"
    said += [f"{world}, tuned lambda {recipe.TUNED['hard']:g}"]
    fig.suptitle("\n".join(said), fontsize=9)
    style.legend(fig, axes.flat, 0.07, ncols=2)
    common.save(fig, EXPERIMENT)
    return {EXPERIMENT: table(lines)}


def lent_free() -> list[dict]:
    """The runs without a reward in the world as it is."""
    known = common.load(verifier_free.EXPERIMENT, common.as_asked(verifier_free.jobs()))
    mine = stats.of(known, "linked", "echo")
    return [line | {"key": f"plain/free/{line['seed']}"} for line in mine]


def bars(ax, series: list[tuple[list[float], float, str]], colour: str, label: str, marker="o") -> None:
    """A point a dose with its interval, every seed small beside it; hollow where it is open."""
    points = [(x, fmean(own), half, says) for x, (own, half, says) in enumerate(series) if own]
    if not points:
        return
    x, means, half, says = zip(*points, strict=True)
    ax.errorbar(x, means, yerr=half, color=colour, lw=2, capsize=3, label=label)
    for place, (own, *_) in enumerate(series):
        ax.plot([place + 0.1] * len(own), own, "_", color=colour, alpha=0.6)
    for place, mean, said in zip(x, means, says, strict=True):
        inside = "white" if said == "open" else colour
        ax.plot(place, mean, marker, color=colour, mfc=inside, ms=7, zorder=3)


def table(lines: list[dict]) -> str:
    names = {name: gains(lines, name) for name in ARMS[1:]}
    rows = [("dial", "value", *(LABELS[name] for name in ARMS))]
    rows[0] += tuple(f"{LABELS[name]}, minus GRPO" for name in names)
    rows[0] += tuple(f"{LABELS[name]}: lead, minus that at 1" for name in names)
    rows[0] += tuple(f"no reward: {label}, change" for label in FREE.values())
    for dial, (values, _) in DIALS.items():
        for value in values:
            cells = []
            for name in ARMS:
                rates = learning_curves.end(stats.of(lines, of_arm(dial, value, name), name))
                cells.append(stats.interval(list(rates.values())))
            cells += [" ".join(judged(found)[dial, value]) for found in names.values()]
            differences = (judged(smaller(found)) for found in names.values())
            cells += [found[dial, value][0] if value != 1 else "–" for found in differences]
            cells += [judged(free_changes(lines, key))[dial, value][0] for key in FREE]
            rows.append([dial, f"{value:g}", *cells])
    return tables.table(rows)


if __name__ == "__main__":
    common.main(EXPERIMENT, __doc__, jobs(), run, draw)
