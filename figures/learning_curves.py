"""Learning curves of GRPO, ECHO and its placebos from one weak base a seed (paper: figure 2, tables 1, 2).

python figures/learning_curves.py          redraws the pictures and prints the tables, from figures/data
python figures/learning_curves.py --run    makes the runs that are missing
"""

import random
from dataclasses import replace
from math import isnan
from statistics import fmean

import common
import matplotlib.pyplot as plt
import stats
import style

from echo_min import checkpoint
from echo_min.checkpoint import load_policy
from echo_min.config import Config
from echo_min.evaluate import cross_entropy, expert_transcripts, observation_logprobs
from echo_min.machine import on_this_machine
from echo_min.report import pass_at_k
from echo_min.rollout import Episode, Noise, sample_episodes
from echo_min.sft import record, supervise

EXPERIMENT = "learning_curves"
SEEDS = 1, 2, 3, 4, 5
SCENES = {  # name -> (world, turns, steps, lambda chosen on a development seed, title)
    "hard": ("hard", 1, 150, 1.0, "hard tool, one call"),
    "tool": ("tool", 1, 100, 1.0, "tool, one call"),
    "tool3": ("tool", 3, 100, 1.0, "tool, three calls"),
    "file": ("file", 3, 50, 1.0, "files, three calls"),
}
TUNED = {  # chosen on development seeds; else the defaults
    "file": {"base_steps": 600, "learning_rate": 3e-4},
}
CONTROL_STEPS = 75  # of the placebos and of the lying terminal
ARMS = {  # name -> (arm, control, lambda or None for the chosen one)
    "grpo": ("grpo", "", 0.05),
    "echo": ("echo", "", None),
    "echo 0.05": ("echo", "", 0.05),
    "placebo": ("echo", "placebo", None),
    "placebo_words": ("echo", "placebo_words", None),
    "placebo_outputs": ("echo", "placebo_outputs", None),
    "lying": ("echo", "", None),  # at a tool whose usage lines show wrong words
    "placebo_words 0.05": ("echo", "placebo_words", 0.05),
    "placebo_outputs 0.05": ("echo", "placebo_outputs", 0.05),
    "lying 0.05": ("echo", "", 0.05),
    "floor": ("floor", "", 1.0),
}
LABELS = {
    "grpo": "GRPO",
    "echo": "ECHO",
    "echo 0.05": "ECHO, paper's lambda 0.05",
    "placebo": "placebo: tokens in random order",
    "placebo_words": "placebo: telling words exchanged",
    "placebo_outputs": "placebo: outputs exchanged",
    "lying": "ECHO, the terminal lies",
    "placebo_words 0.05": "telling words exchanged, 0.05",
    "placebo_outputs 0.05": "outputs exchanged, 0.05",
    "lying 0.05": "the terminal lies, 0.05",
}
HEADLINE = "hard"  # the scene with every arm; the others have the main ones
MAIN = "grpo", "echo", "echo 0.05"


def jobs() -> common.Jobs:
    found = {}
    for scene, (world, turns, steps, chosen, _) in SCENES.items():
        for seed in SEEDS:
            for name, (arm, control, weight) in ARMS.items():
                if name not in MAIN and scene != HEADLINE:
                    continue
                tasks = f"world:{world}" + (",usage=lying" if name.startswith("lying") else "")
                settings = {"tasks": tasks, "max_turns": turns, "seed": seed} | TUNED.get(world, {})
                settings["steps"] = steps if name in (*MAIN, "floor") else CONTROL_STEPS
                settings["env_weight"] = chosen if weight is None else weight
                found[f"{scene}/{name}/{seed}"] = arm, control, Config(**common.SETTINGS, **settings)
    return dict(sorted(found.items(), key=lambda job: job[1][-1].seed))


def run(key: str, arm: str, control: str, config: Config) -> list[dict]:
    config = replace(config, model=str(common.base(config, config.seed)))
    if arm == "floor":
        return [floor(key, config)]
    lines = common.train_run(key, arm, control, config)
    model, tokenizer = load_policy(checkpoint.latest(common.RUNS / key / arm)[1])
    held_out = common.world_of(config).held_out[: config.eval_tasks]
    key = Noise.PASS_AT_K, config.seed
    lines[-1] |= pass_rates(sample_episodes(model, tokenizer, held_out, 8, config, key))
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


def floor(key: str, config: Config) -> dict:
    """How low supervision alone gets: the base, trained on the observations of expert episodes."""
    config = on_this_machine(config)
    world = common.world_of(config)
    model, tokenizer = load_policy(config.model)
    rng = random.Random("expert")
    training = record(tokenizer, [(task, world.expert(task, rng)) for task in world.train], config)
    supervise(model, training, replace(config, base_observation_weight=1.0), action_weight=0.0)
    expert = expert_transcripts(tokenizer, world, config)
    ce = cross_entropy(observation_logprobs(model, expert, config))
    line = {"key": key, "config": common.digest(config), "arm": "floor", "seed": config.seed}
    return line | {"observation_ce": ce}


# ---- pictures and tables ----


def of(lines: list[dict], scene: str, name: str) -> list[dict]:
    return [line for line in lines if line["key"].startswith(f"{scene}/{name}/")]


def draw(lines: list[dict]) -> None:
    scenes = [scene for scene in SCENES if of(lines, scene, "grpo")]
    for key, name, label in (
        ("pass_rate", EXPERIMENT, "pass rate, held-out tasks"),
        ("pass_rate_greedy", f"{EXPERIMENT}_greedy", "greedy pass rate, held-out tasks"),
    ):
        fig, axes = plt.subplots(2, 2, figsize=(11, 9.6), sharey=True)
        for ax, scene in zip(axes.flat, scenes, strict=False):
            for arm in LABELS:
                colour = style.COLOURS.get(arm) or style.COLOURS[arm.removesuffix(" 0.05")]
                dashes = "-" if arm in MAIN else ":" if arm.endswith("0.05") else "--"
                style.band(ax, of(lines, scene, arm), key, colour, LABELS[arm], ls=dashes)
            seeds = len({line["seed"] for line in of(lines, scene, "grpo")})
            title = f"{SCENES[scene][4]} ($\\lambda$ = {SCENES[scene][3]:g}, {seeds} seeds)"
            style.axes(ax, xlabel="step", ylabel=label, ylim=(0, 1.02))
            ax.set_title(title, fontsize=12)
        handles = axes[0, 0].get_legend_handles_labels()
        fig.legend(*handles, loc="lower center", ncols=3, frameon=False, fontsize=10)
        fig.tight_layout(rect=(0, 0.1, 1, 1))
        common.save(fig, name)
    for scene in scenes:
        table(lines, scene)


def area(lines: list[dict], key: str) -> dict[int, float]:
    """Mean over the curve, every evaluation after step 0 up to CONTROL_STEPS: one number a seed."""
    return stats.by_seed([line for line in lines if 0 < line["step"] <= CONTROL_STEPS], key)


def peak_step(lines: list[dict], grpo: list[dict]) -> dict[int, float]:
    """seed -> (first step at which this arm reaches GRPO's best pass rate) / (GRPO's own first such step)."""
    ratios = {}
    lines, grpo = ([x for x in some if "pass_rate" in x] for some in (lines, grpo))  # no small evaluations
    for seed in {line["seed"] for line in lines} & {line["seed"] for line in grpo}:
        own = stats.pick(grpo, seed=seed)
        best = max(line["pass_rate"] for line in own)
        first = [min((x["step"] for x in curve if x["pass_rate"] >= best), default=None)
                 for curve in (stats.pick(lines, seed=seed), own)]  # fmt: skip
        if first[0] is not None and first[1]:
            ratios[seed] = first[0] / first[1]
    return ratios


def table(lines: list[dict], scene: str) -> None:
    grpo = of(lines, scene, "grpo")
    print(f"\n{SCENES[scene][4]}: mean ± 95 % interval over seeds\n")
    print("| | step 25 | 50 | 75 | 100 | 150 | mean over the curve to 75 | minus GRPO, paired | greedy |"
          " pass@8 | steps to GRPO's best / GRPO's | observation CE, last / base |")  # fmt: skip
    print("|---" * 12 + "|")
    for arm in LABELS:
        mine = of(lines, scene, arm)
        if not mine:
            continue
        cells = [list(stats.by_seed(mine, "pass_rate", step=s).values()) for s in (25, 50, 75, 100, 150)]
        cells += [list(area(mine, "pass_rate").values())]
        cells += [stats.paired(area(grpo, "pass_rate"), area(mine, "pass_rate"))]
        cells += [list(area(mine, "pass_rate_greedy").values())]
        cells += [list(stats.by_seed(mine, "pass_at_8").values())]
        ratios = peak_step(mine, grpo)
        cells += [list(ratios.values())]
        steps = max(line["step"] for line in mine)
        first, last = (stats.by_seed(mine, "observation_ce", step=s) for s in (0, steps))
        cells += [[last[seed] / first[seed] for seed in last]]
        reached = f" ({len(ratios)} of {len({x['seed'] for x in mine})})"
        texts = [stats.interval(cell) for cell in cells]
        texts[9] += reached
        print(f"| {LABELS[arm]} | " + " | ".join(texts) + " |")
    for echo in ("echo", "echo 0.05"):
        for control in LABELS:
            same_lambda = control.endswith("0.05") == echo.endswith("0.05")
            pair = [area(of(lines, scene, arm), "pass_rate") for arm in (control, echo)]
            if control not in MAIN and same_lambda and (differences := stats.paired(*pair)):
                print(f"\n{LABELS[echo]} minus {LABELS[control]}, paired: {stats.interval(differences)}")
    floors = [line["observation_ce"] for line in of(lines, scene, "floor")]
    bases = [line["observation_ce"] for line in grpo if line["step"] == 0]
    print(f"\nobservation CE: base {stats.interval(bases)}, supervised floor {stats.interval(floors)}")


if __name__ == "__main__":
    common.main(EXPERIMENT, __doc__, jobs(), run, draw)
