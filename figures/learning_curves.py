"""Headline: GRPO and ECHO from one weak base a seed, in three worlds, and controls of ECHO in one of them.

python figures/learning_curves.py          redraws the pictures and prints the tables, from figures/data
python figures/learning_curves.py --run    makes the runs that are missing

What is compared was fixed before the runs, on seeds that no choice was made on: END, CONTRASTS. The controls
have lambda 0.05. held_out_ce.py and gnu_curves.py draw two more pictures from the same runs.
"""

from math import isnan
from statistics import fmean

import common
import gnu_curves
import held_out_ce
import matplotlib.pyplot as plt
import recipe
import stats
import style
import tables

from echo_min import checkpoint
from echo_min.checkpoint import load_policy
from echo_min.config import Config
from echo_min.report import pass_at_k
from echo_min.rollout import Episode, Noise, sample_episodes

EXPERIMENT = "learning_curves"
SEEDS = 1, 2, 3, 4, 5
STEPS = 150
WORLDS = {"hard": "hard tool, one call", "gnu": "gnu, one call", "file": "files, three calls"}
ARMS = {  # name -> (arm, control, the world's dials, lambda; None: the tuned one)
    "grpo": ("grpo", "", "", 0.05),
    "echo 0.05": ("echo", "", "", 0.05),
    "echo": ("echo", "", "", None),
    "lying": ("echo", "", ",usage=lying", 0.05),
    "code": ("echo", "", ",usage=code", 0.05),
    "placebo_words": ("echo", "placebo_words", "", 0.05),
    "elsewhere": ("echo", "elsewhere", "", 0.05),
}
LABELS = {
    "grpo": "GRPO",
    "echo 0.05": "ECHO, lambda 0.05",
    "echo": "ECHO, lambda tuned",
    "lying": "the usage line lies",
    "code": "the usage line shows a useless code",
    "placebo_words": "shuffled targets",
    "elsewhere": "usage lines of other verbs",
}
MAIN, CONTROLS = ("grpo", "echo 0.05", "echo"), ("lying", "code", "placebo_words", "elsewhere")
END = "sampled pass rate on 200 held-out tasks, mean of the evaluations from step 25 to the last"
CONTRASTS = [  # (world, arm, the arm taken from it), paired by seed; Holm's correction over all of them
    *[(world, arm, "grpo") for world in WORLDS for arm in ("echo 0.05", "echo")],
    *[("hard", "echo 0.05", control) for control in CONTROLS],
]
PASS_AT_8 = 100  # held-out tasks
FEW_EVERY = 5  # steps from one small evaluation to the next
WINDOW = 5  # small evaluations whose mean counts as one point of the curve; only whole windows


def jobs() -> common.Jobs:
    found = {}
    for seed in SEEDS:
        for world in WORLDS:
            for name in ARMS if world == "hard" else MAIN:
                arm, control, dials, weight = ARMS[name]
                weight = recipe.TUNED[world] if weight is None else weight
                config = recipe.config(world, weight, seed, dials, steps=STEPS)
                found[f"{world}/{name}/{seed}"] = arm, control, config
    return found


def run(key: str, arm: str, control: str, config: Config) -> list[dict]:
    lines = common.train_run(key, arm, control, common.from_base(config), FEW_EVERY)
    model, tokenizer = load_policy(checkpoint.latest(common.RUNS / key / arm)[1])
    tasks = common.world_of(config).held_out[: min(PASS_AT_8, config.eval_tasks)]
    noise = Noise.PASS_AT_K, config.seed
    lines[-1] |= pass_rates(sample_episodes(model, tokenizer, tasks, 8, config, noise))
    return lines


def pass_rates(episodes: list[Episode]) -> dict[str, float]:
    """pass@k, the mean over the tasks with at least k graded episodes; none, no entry."""
    graded: dict[int, list[bool]] = {}
    for episode in episodes:
        if not isnan(episode.reward):  # the infrastructure failed, not the policy
            graded.setdefault(episode.group, []).append(episode.reward >= 1)
    rates = {}
    for k in (1, 2, 4, 8):
        if tasks := [passed for passed in graded.values() if len(passed) >= k]:
            rates[f"pass_at_{k}"] = fmean(pass_at_k(sum(passed), len(passed), k) for passed in tasks)
    return rates


def lent(keys: dict[str, tuple[str, int]]) -> list[dict]:
    """Lines of runs here whose first steps another experiment shares. keys: of a run here -> (its key there,
    the last step that counts there)"""
    lines = [line for line in common.load(EXPERIMENT, common.as_asked(jobs())) if line["key"] in keys]
    there = [(line, *keys[line["key"]]) for line in lines]
    return [line | {"key": key} for line, key, steps in there if line["step"] <= steps]


# ---- numbers ----


def end(lines: list[dict]) -> dict[int, float]:
    """seed -> END."""
    return stats.by_seed([line for line in lines if line["step"] > 0], "pass_rate")


def contrasts(lines: list[dict]) -> dict[tuple, tuple[list[float], float, float]]:
    """contrast -> (differences, one a seed; p; p corrected)."""
    differences = {}
    for contrast in CONTRASTS:
        world, arm, other = contrast
        differences[contrast] = stats.paired(*(end(stats.of(lines, world, name)) for name in (other, arm)))
    p = {contrast: stats.paired_p(values) for contrast, values in differences.items()}
    corrected = stats.holm(p)
    return {contrast: (differences[contrast], p[contrast], corrected[contrast]) for contrast in CONTRASTS}


def verdict(differences: list[float], corrected: float) -> str:
    if isnan(corrected):
        return "no data"
    if corrected >= 0.05:
        return "open"
    mean = fmean(differences)
    return f"{'ahead' if mean > 0 else 'behind'} ({mean:+.2f})"


def smooth(lines: list[dict]) -> dict[int, float]:
    """step -> mean pass rate of the WINDOW small evaluations around it. lines: of one run."""
    few = sorted((line["step"], line["pass_rate_few"]) for line in lines if "pass_rate_few" in line)
    windows = [few[i : i + WINDOW] for i in range(len(few) - WINDOW + 1)]
    return {window[WINDOW // 2][0]: fmean(rate for _, rate in window) for window in windows}


def steps_to_best(lines: list[dict], grpo: list[dict]) -> dict[int, float]:
    """seed -> (first step at which this arm is as good as GRPO ever is) / (GRPO's own first such step);
    seeds that never are have no entry."""
    ratios = {}
    for seed in sorted({line["seed"] for line in lines}):
        mine, own = (smooth(stats.pick(some, seed=seed)) for some in (lines, grpo))
        if own and (step := min((s for s, rate in mine.items() if rate >= max(own.values())), default=None)):
            ratios[seed] = step / max(1, min(s for s, rate in own.items() if rate == max(own.values())))
    return ratios


# ---- pictures and tables ----


def draw(lines: list[dict]) -> dict[str, str]:
    found, worlds, said = contrasts(lines), [world for world in WORLDS if stats.of(lines, world)], []
    for arm in ("echo 0.05", "echo"):
        verdicts = [f"{verdict(*found[w, arm, 'grpo'][::2])} in {WORLDS[w].split(',')[0]}" for w in worlds]
        said.append(f"{LABELS[arm]}, against GRPO, mean over the curve: {'; '.join(verdicts)}")
    fig, axes = plt.subplots(1, len(worlds), figsize=(4 + 3 * len(worlds), 5.4), sharey=True, squeeze=False)
    axes = axes[0]
    for ax, world in zip(axes, worlds, strict=True):
        panel(ax, lines, world, MAIN)
        ax.set_title(f"{ax.get_title()}, tuned lambda {recipe.TUNED[world]:g}", fontsize=10)
    axes[0].set_ylabel("pass rate, held-out tasks, sampled")
    fig.suptitle("\n".join(said), fontsize=11)
    style.legend(fig, axes, 0.07, ncols=3)
    common.save(fig, EXPERIMENT)
    fig, ax = plt.subplots(figsize=(8, 6))
    panel(ax, lines, "hard", ("grpo", "echo 0.05", *CONTROLS))
    ax.set_ylabel("pass rate, held-out tasks, sampled")
    said = [verdict(*found["hard", "echo 0.05", control][::2]) for control in CONTROLS]
    texts = [f"{LABELS[control]}: {text}" for control, text in zip(CONTROLS, said, strict=True)]
    fig.suptitle("\n".join(["ECHO 0.05, mean over the curve, against", *texts]), fontsize=10)
    style.legend(fig, [ax], 0.14, ncols=2)
    common.save(fig, "controls")
    tables = {EXPERIMENT: table(lines), "contrasts": contrast_table(found)}
    return tables | held_out_ce.draw(lines, ARMS, worlds, LABELS) | gnu_curves.draw(lines, MAIN, LABELS)


def panel(ax, lines: list[dict], world: str, arms: tuple[str, ...]) -> None:
    for name in arms:
        style.curves(ax, stats.of(lines, world, name), "pass_rate", style.COLOURS[name], LABELS[name], top=1)
    style.axes(ax, xlabel="step", ylim=(0, 1.02))
    if here := stats.of(lines, world):
        ax.set_title(f"{WORLDS[world]}, {style.seeds(here)}", fontsize=10)


def table(lines: list[dict]) -> str:
    rows = [("world", "arm", "step 75", f"step {STEPS}", "curve", "greedy, last", "pass@8, last",
             "turns, last", "surprise, last / first", "steps to GRPO's best / its own")]  # fmt: skip
    for world in WORLDS:
        for name in ARMS:
            if not (mine := stats.of(lines, world, name)):
                continue
            last = max(line["step"] for line in mine)
            cells = [stats.by_seed(mine, "pass_rate", step=75), stats.by_seed(mine, "pass_rate", step=last)]
            cells += [end(mine), stats.by_seed(mine, "pass_rate_greedy", step=last)]
            cells += [stats.by_seed(mine, key, step=last) for key in ("pass_at_8", "turns")]
            first, then = (stats.by_seed(mine, "observation_ce", step=step) for step in (0, last))
            cells.append({seed: then[seed] / first[seed] for seed in then if seed in first})
            texts = [stats.interval(list(cell.values())) for cell in cells]
            ratios = steps_to_best(mine, stats.of(lines, world, "grpo"))
            runs = len({line["seed"] for line in mine})  # of those that get there alone a mean would flatter
            reached = stats.interval(list(ratios.values())) if len(ratios) == runs else "–"
            rows.append([world, LABELS[name], *texts, f"{reached} ({len(ratios)} of {runs})"])
    return tables.table(rows)


def contrast_table(found: dict) -> str:
    rows = [("world", "contrast", "difference of the curves, paired", "p", f"p, Holm over {len(CONTRASTS)}")]
    for (world, arm, other), (differences, p, corrected) in found.items():
        if not differences:
            continue
        name = f"{LABELS[arm]} – {LABELS[other]}"
        rows.append([world, name, stats.interval(differences), stats.p_text(p), stats.p_text(corrected)])
    return tables.table(rows)


if __name__ == "__main__":
    common.main(EXPERIMENT, __doc__, jobs(), run, draw)
