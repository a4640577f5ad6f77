"""World gnu: is the terminal's list acted on? Two kinds of knowledge, apart: what is valid, which the
terminal tells, and what is right, which the reward alone tells. Drawn by learning_curves.py, from its lines.

Fixed before the runs: over the curve, P(valid) of ECHO is above GRPO's (the interval of the paired difference
is above 0), and P(right given valid) is alike (that interval lies within ALIKE), else it is undecided.
"""

import common
import matplotlib.pyplot as plt
import stats
import style
import tables

ALIKE = 0.1
KEYS = {"p_valid": "P(a valid word)", "p_right": "P(the right word, given a valid one)"}


def exact(line: dict) -> dict:
    """What a full evaluation measured at the word's place (probes.word_slots), as the two probabilities."""
    valid = line["slot_first"] + line["slot_others"]
    right, first = (line[name] / valid if valid else 0.0 for name in ("slot_goal", "slot_first"))
    missed = (valid - line["slot_goal"]) / (1 - line["slot_goal"]) if line["slot_goal"] < 1 else 0.0
    return line | {"p_valid": valid, "p_right": right, "p_first": first, "p_missed": missed}


def verdicts(lines: list[dict], arm: str) -> tuple[list[float], str, list[float], str]:
    """arm minus GRPO over the curve: P(valid), what it says of the prediction; P(right given valid), too."""
    found = []
    for key in KEYS:
        after = [line for line in lines if line["step"] > 0]
        grpo, mine = (stats.by_seed(stats.of(after, "gnu", name), key) for name in ("grpo", arm))
        differences = stats.paired(grpo, mine)
        mean, half = stats.mean_interval(differences) if differences else (0.0, float("nan"))
        above, below = mean - half > 0, mean + half < 0
        alike = max(abs(mean - half), abs(mean + half)) <= ALIKE
        of_valid = "higher" if above else "lower" if below else "open"
        found += [differences, of_valid if key == "p_valid" else "alike" if alike else "undecided"]
    return tuple(found)


def draw(lines: list[dict], arms: tuple[str, ...], labels: dict) -> dict[str, str]:
    lines = [exact(line) for line in stats.of(lines, "gnu") if "slot_goal" in line]
    if not lines:
        return {"gnu": ""}
    panels = KEYS | {"pass_rate": "pass rate, sampled"}
    fig, axes = plt.subplots(1, len(panels), figsize=(13, 4.8), sharey=True)
    for ax, (key, title) in zip(axes, panels.items(), strict=True):
        for name in arms:
            style.curves(ax, stats.of(lines, "gnu", name), key, style.COLOURS[name], labels[name], top=1)
        style.axes(ax, xlabel="step", ylim=(0, 1.02))
        ax.set_title(title, fontsize=10)
    ceiling = stats.mean_interval([line["ceiling"] for line in lines])[0]
    axes[-1].axhline(ceiling, color="black", ls=":", label="who knows the lists alone")
    said = []
    for arm in arms[1:]:
        _, valid, _, right = verdicts(lines, arm)
        said.append(f"{labels[arm]}, against GRPO: P(valid) {valid}, P(right given valid) {right}")
    title = f"world gnu, {style.seeds(lines)}, held-out tasks, exact probabilities at the word's place"
    fig.suptitle("\n".join([*said, title]), fontsize=11)
    style.legend(fig, axes, 0.07, ncols=4)
    common.save(fig, "gnu")
    return {"gnu": table(lines, arms, labels)}


def table(lines: list[dict], arms: tuple[str, ...], labels: dict) -> str:
    rows = [("arm", "P(valid), base", "last", "minus GRPO's, curve", "", "P(right given valid), base", "last",
             "minus GRPO's, curve", "", "P(valid given not right): base → last", "minus GRPO's, curve",
             "P(first listed given valid): base → last",
             "sampled commands: valid, last 25 steps", "ceiling by the lists")]  # fmt: skip
    last, after = max(line["step"] for line in lines), [line for line in lines if line["step"] > 0]
    for name in arms:
        mine, cells = stats.of(lines, "gnu", name), []
        found = verdicts(lines, name) if name != "grpo" else ([], "", [], "")
        for key, (differences, said) in zip(KEYS, (found[:2], found[2:]), strict=True):
            ends = [stats.by_seed(mine, key, step=step) for step in (0, last)]
            cells += [stats.interval(list(values.values())) for values in ends]
            cells += [stats.interval(differences), said]
        keys = "p_missed", "p_first"
        pairs = ([list(stats.by_seed(mine, key, step=step).values()) for step in (0, last)] for key in keys)
        missed, first = (" → ".join(map(stats.interval, ends)) for ends in pairs)
        both = (stats.by_seed(stats.of(after, "gnu", one), "p_missed") for one in ("grpo", name))
        cells += [missed, stats.interval(stats.paired(*both)) if name != "grpo" else "–", first]
        for key in ("valid", "ceiling"):
            cells.append(stats.interval(list(stats.by_seed(mine, key, step=last).values())))
        rows.append([labels[name], *cells])
    return tables.table(rows)
