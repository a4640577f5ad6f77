"""What else could be learned from a failed attempt? Four rivals of ECHO in the hard tool, at equal rollouts.

python figures/rival_curves.py          redraws the picture and prints the table, from figures/data
python figures/rival_curves.py --run    makes the runs that are missing

process: GRPO whose advantage grows with the share of right words. curiosity: with the surprise at the output.
imitate: supervised on the base's own rollouts, actions and outputs alike, then GRPO. hindsight: the usage
line that a wrong call printed is typed as the reply, supervised beside GRPO. Each has a strength, chosen on
a development seed; GRPO and ECHO are the runs of learning_curves.py. Compared at equal rollouts: those that
imitate imitates count as steps, and its curve is read between its evaluations.
"""

from dataclasses import replace

import common
import controls
import learning_curves
import matplotlib.pyplot as plt
import recipe
import rivals
import stats
import style
import tables
from rivals import STRENGTHS

from echo_min.config import Config

EXPERIMENT = "rival_curves"
TUNING, TUNING_STEPS, SEEDS = 101, 100, (1, 2, 3)
BEST: dict[str, float] = {}  # what the development seed said
LABELS = {
    "process": "right words rewarded", "curiosity": "surprise rewarded",
    "imitate": "own rollouts imitated first", "hindsight": "printed line typed as reply",
}  # fmt: skip
REFERENCES = "grpo", "echo 0.05", "echo"  # of learning_curves.py


def jobs() -> common.Jobs:
    wanted = [(name, strength, TUNING) for name, tried in STRENGTHS.items() for strength in tried]
    wanted += [(name, strength, seed) for name, strength in BEST.items() for seed in SEEDS]
    found = {}
    for name, strength, seed in wanted:
        arm, control = "grpo", f"{name}={strength:g}" if name in ("process", "curiosity") else ""
        steps = TUNING_STEPS if seed == TUNING else learning_curves.STEPS
        config = recipe.config("hard", 0.05, seed, steps=steps)
        if name == "hindsight":
            arm, control, config = "echo", name, replace(config, env_weight=strength)
        if name == "imitate":  # its rollouts are counted
            config = replace(config, steps=steps - int(strength))
        found[f"{name}/{strength:g}/{seed}"] = arm, control, config
    return found


def run(key: str, arm: str, control: str, config: Config) -> list[dict]:
    name, strength, _ = key.split("/")
    config = common.from_base(config)
    if name != "imitate":
        return common.train_run(key, arm, control, config)
    config = replace(config, model=str(rivals.imitated(config, common.RUNS, int(strength))))
    return later(common.train_run(key, arm, control, config), int(strength))


def later(lines: list[dict], steps: int) -> list[dict]:
    return [line | {"step": line["step"] + steps} for line in lines]


def draw(lines: list[dict]) -> dict[str, str]:
    known = common.load("learning_curves", common.as_asked(learning_curves.jobs()))
    known = [line for line in stats.of(known, "hard") if line["seed"] in SEEDS]
    references = {
        name: stats.between(stats.of(known, "hard", name), learning_curves.STEPS) for name in REFERENCES
    }
    fig, axes = plt.subplots(2, 2, figsize=(11, 9), sharex=True, sharey=True)
    for ax, (name, label) in zip(axes.flat, LABELS.items(), strict=True):
        for other in REFERENCES:
            mine = stats.of(known, "hard", other)
            style.curves(ax, mine, "pass_rate", style.COLOURS[other], learning_curves.LABELS[other], top=1)
        if name in BEST:
            mine = fresh(lines, name, BEST[name])
            style.curves(ax, mine, "pass_rate", "black", "the rival", top=1, ls="--")
        style.axes(ax, ylim=(0, 1.02))
        ax.set_title(label, fontsize=10)
    for ax in axes[1]:
        ax.set_xlabel("step")
    for ax in axes[:, 0]:
        ax.set_ylabel("pass rate, held-out tasks, sampled")
    fig.suptitle(f"ECHO and four rivals, hard tool, seeds {', '.join(map(str, SEEDS))}", fontsize=11)
    style.legend(fig, axes.flat, 0.05, ncols=4)
    common.save(fig, EXPERIMENT)
    heads = [f"minus {learning_curves.LABELS[name]}, paired" for name in REFERENCES]
    rows = [("", "strength", "development seed, curve", "curve, three seeds", "last", *heads)]
    for name in REFERENCES:
        mine = stats.of(known, "hard", name)
        rows.append(row(learning_curves.LABELS[name], "", [], mine, references))
    for name, tried in STRENGTHS.items():
        for strength in tried:
            tuning = stats.pick(stats.of(lines, name, f"{strength:g}"), seed=TUNING)
            rows.append(row(LABELS[name], f"{strength:g}", tuning, fresh(lines, name, strength), references))
    return {EXPERIMENT: tables.table(rows)}


def fresh(lines: list[dict], name: str, strength: float) -> list[dict]:
    return [line for line in stats.of(lines, name, f"{strength:g}") if line["seed"] in SEEDS]


def row(label: str, strength: str, tuning: list[dict], lines: list[dict], references: dict) -> tuple:
    own = stats.between(lines, learning_curves.STEPS)
    last = stats.by_seed(lines, "pass_rate", step=max((line["step"] for line in lines), default=0))
    texts = [stats.interval(list(one.values())) for one in (stats.between(tuning, TUNING_STEPS), own, last)]
    others = [stats.paired(other, own) if other != own else [] for other in references.values()]
    return label, strength, *texts, *map(stats.interval, others)


if __name__ == "__main__":
    controls.CONTROLS |= rivals.changes()
    common.main(EXPERIMENT, __doc__, jobs(), run, draw)
