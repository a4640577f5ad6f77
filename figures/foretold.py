"""What the scores of linkage.py said beforehand, and what came of it. Drawn by linkage.py.

Fixed before the runs: linkage says gain above LINKED, by_command too, alignment above 0, and two together
where both do. A condition has gained if its interval is above 0, has not if its upper end is below NONE;
else it is undecided and counts for nobody. Gains are means over the first doses.STEPS steps, their intervals
in the hard tool by the spread that its conditions share. Code is linked and useless by design: there linkage
alone should fail.
"""

from math import isnan, nan
from statistics import fmean

import common
import doses
import filter_curves
import learning_curves
import matplotlib.pyplot as plt
import stats
import style
import tables

LINKED, NONE = 0.1, 0.08  # nats a token; pass rate, two thirds of the gain in the hard tool as it is
DOSES = sorted({doses.cell(dial, value) for dial, (values, _) in doses.DIALS.items() for value in values})
OTHERS = {  # condition -> the runs with which it is compared: script, first parts of their keys, GRPO's
    "lying": (learning_curves, "hard/lying", "hard/grpo"),
    "code": (learning_curves, "hard/code", "hard/grpo"),
    "gnu": (learning_curves, "gnu/echo 0.05", "gnu/grpo"),
    "file": (learning_curves, "file/echo 0.05", "file/grpo"),
    "filter": (filter_curves, "echo 0.05", "grpo"),
}
SCORES = "linkage", "by_command", "alignment", "both", "linkage_all"


def gains() -> dict[str, list[float]]:
    """condition -> what ECHO 0.05 gained on GRPO, mean over the curve, a number a seed."""
    lines = {
        script: common.load(script.EXPERIMENT, common.as_asked(script.jobs()))
        for script in (doses, learning_curves, filter_curves)
    }
    lines[doses] = lines[doses] + learning_curves.lent(doses.LENT)
    found = {doses.cell(*d): list(v.values()) for d, v in doses.gains(lines[doses], "echo 0.05").items()}
    for condition, (script, mine, grpo) in OTHERS.items():
        early = [line for line in lines[script] if line["step"] <= doses.STEPS]
        seeds = (*doses.SEEDS, *filter_curves.SEEDS)
        both = [[line for line in stats.of(early, key) if line["seed"] in seeds] for key in (grpo, mine)]
        found[condition] = stats.paired(*map(learning_curves.end, both))
    return {condition: own for condition, own in found.items() if own}


def means(lines: list[dict]) -> dict[str, dict[str, float]]:
    """condition -> name of a number -> its mean over seeds; nan if no seed has it. both: linkage where
    alignment is above 0, else 0."""
    found = {}
    for condition in (*DOSES, *OTHERS):
        if mine := stats.of(lines, condition):
            names = "linkage", "linkage_all", "by_command", "alignment", "observed", "passes"
            own = {name: stats.by_seed(mine, name).values() for name in names}
            own = {name: fmean(values) if values else nan for name, values in own.items()}
            found[condition] = own | {"both": own["linkage"] * (own["alignment"] > 0)}
    return found


def says(own: dict[str, float]) -> dict[str, bool]:
    """Which score predicts a gain."""
    of = {score: own[score] > (0 if score == "alignment" else LINKED) for score in SCORES[:4]}
    return of | {"always": True}


def outcomes(gained: dict[str, list[float]]) -> dict[str, tuple[str, str]]:
    """condition -> (its gain with the interval, gain, none or undecided)."""
    halves = {condition: stats.pooled_halves([own])[0] for condition, own in gained.items()}
    hard = [condition for condition in gained if condition in (*DOSES, "lying", "code")]
    halves |= zip(hard, stats.pooled_halves([gained[condition] for condition in hard]), strict=True)
    found = {}
    for condition, own in gained.items():
        mean, half = fmean(own), halves[condition]
        said = "gain" if mean > half else "none" if mean + half < NONE else "undecided"
        found[condition] = f"{mean:+.3f} ± {half:.3f}", said
    return found


def right(scores: dict[str, dict[str, float]], came: dict[str, tuple[str, str]]) -> dict[str, str]:
    """score -> how many of the decided conditions it predicts."""
    decided = [condition for condition in scores if came[condition][1] != "undecided"]
    hits = {score: 0 for score in (*SCORES[:4], "always")}
    for condition in decided:
        for score, gain in says(scores[condition]).items():
            hits[score] += gain == (came[condition][1] == "gain")
    return {score: f"{n} of {len(decided)}" for score, n in hits.items()}


def draw(lines: list[dict]) -> dict[str, str]:
    gained, scores = gains(), means(lines)
    scores = {condition: own for condition, own in scores.items() if condition in gained}
    came = outcomes({condition: gained[condition] for condition in scores})
    fig, axes = plt.subplots(1, 2, figsize=(14, 6), sharey=True)
    for ax, score in zip(axes, ("linkage", "alignment"), strict=True):
        for place, (condition, own) in enumerate(sorted(scores.items(), key=lambda item: item[1][score])):
            if not isnan(own[score]):
                x, y = own[score], fmean(gained[condition])
                inside = "black" if came[condition][1] == "gain" else "white"
                ax.plot(x, y, "o", color="black", ms=5, mfc=inside)
                ax.annotate(condition, (x, y), xytext=(5, (-10, 4)[place % 2]), textcoords="offset points")
        ax.axhline(0, color="black", lw=0.7)
        ax.axvline(LINKED if score == "linkage" else 0, color="black", lw=0.7, ls=":")
        style.axes(ax, xlabel=f"{score}, nats a token" if score == "linkage" else "alignment, a cosine")
    axes[0].set_ylabel("gain of ECHO 0.05 on GRPO in pass rate; filled: its interval is above 0")
    hits = right(scores, came)
    said = f"of the decided conditions linkage tells {hits['linkage']}, alignment {hits['alignment']}, "
    said += f"the two together {hits['both']}, who always says gain {hits['always']}"
    fig.suptitle(f"{said}\nmeans over {len(doses.SEEDS)} seeds a condition; the scores are of the base alone")
    fig.tight_layout()
    common.save(fig, "linkage")
    return {"linkage": condition_table(scores, came), "linkage_ranks": rank_table(scores, gained, hits)}


def condition_table(scores: dict, came: dict) -> str:
    rows = [("condition", "linkage", "echoed words too", "by command", "alignment", "passes behind it",
             "the two say", "ECHO 0.05 – GRPO, curve", "", "observed alone")]  # fmt: skip
    for condition, own in sorted(scores.items(), key=lambda item: -item[1]["linkage"]):
        row = [f"{own[name]:.3f}" for name in ("linkage", "linkage_all", "by_command", "alignment")]
        row += [f"{own['passes']:.0f}", "gain" if says(own)["both"] else "none"]
        rows.append([condition, *row, *came[condition], f"{own['observed']:+.3f}"])
    return tables.table(rows)


def rank_table(scores: dict, gained: dict, hits: dict[str, str]) -> str:
    names = {"both": "linkage where alignment is above 0", "linkage_all": "linkage, echoed words too"}
    rows = [("score", "tells beforehand", "rank correlation with the gain [95 % interval]",
             "with what is gained by observing alone")]  # fmt: skip
    for score in (*SCORES, "always"):
        cells = ["–", "–"]
        if score != "always":
            known = {c: own for c, own in scores.items() if not isnan(own[score])}
            pairs = ([(own[score], fmean(gained[c])) for c, own in known.items()],
                     [(own[score], own["observed"]) for own in known.values()])  # fmt: skip
            cells = [stats.rank_text(some) for some in pairs]
        name = {"always": "who always says gain"}.get(score, names.get(score, score.replace("_", " ")))
        rows.append((name, hits.get(score, "–"), *cells))
    return tables.table(rows)
