"""Which learning rate, warm-up, groups and lambda each arm deserves, on seeds that no result is made of.

python figures/recipe.py                  prints the table, from figures/data
python figures/recipe.py --run --jobs 1   makes the runs that are missing

Three stages, every run with the same number of rollouts: learning rate x warm-up on one seed; the best two of
each arm with three ways to deal rollouts into groups on three seeds (in gnu the best one, in the groups that
both arms liked in the hard tool); then lambda, with what ECHO 0.05 liked best. Best is the mean pass rate
over the curve. A cell that loses a policy (its last pass rate is below half of its own best) is out.
"""

from statistics import fmean

import common
import stats
import tables

from echo_min.config import Config

EXPERIMENT = "recipe"
SEEDS = 101, 102, 103
ROLLOUTS, EVALUATIONS = 6400, 5
WORLDS = {  # what a world needs beside the defaults
    "hard": {},
    "gnu": {"max_action_tokens": 16, "output_chars": 320, "context": 160, "base_steps": 600},
}
GRID = [(rate, warmup) for rate in (1.5e-4, 3e-4, 6e-4) for warmup in (0, 20)]
GROUPS = {"hard": ((8, 8), (2, 32), (8, 16)), "gnu": ((8, 8),)}  # tasks a step, rollouts a task
LAMBDAS = 0.2, 1.0
BEST_FEW: dict[tuple[str, str], list] = {  # of GRID, by world and arm: what the first stage said
    ("hard", "grpo"): [(6e-4, 20), (6e-4, 0)],
    ("hard", "echo"): [(6e-4, 20), (6e-4, 0)],
    ("gnu", "grpo"): [(6e-4, 0)],
    ("gnu", "echo"): [(6e-4, 0)],
}
BEST: dict[tuple[str, str], tuple] = {  # rate, warm-up, groups: what the second stage said
    ("hard", "grpo"): (6e-4, 20, (8, 8)),
    ("hard", "echo"): (6e-4, 20, (8, 8)),
    ("gnu", "grpo"): (6e-4, 0, (8, 8)),
    ("gnu", "echo"): (6e-4, 0, (8, 8)),
}
SHARED = {"learning_rate": 6e-4, "warmup_steps": 20, "tasks_per_step": 8, "group_size": 8}
RECIPE = {  # of every experiment, both arms; file takes the hard tool's
    "hard": SHARED | {"max_turns": 1},
    "gnu": SHARED | {"max_turns": 1, "warmup_steps": 0} | WORLDS["gnu"],
    "file": SHARED | {"max_turns": 3, "base_steps": 600},
}
TUNED = {"hard": 1.0, "gnu": 0.2, "file": 1.0}  # lambda of the arm "echo"; "echo 0.05" has the paper's


def config(world: str, weight: float, seed: int, dials: str = "", **more) -> Config:
    """Of an experiment's run. dials: the world's, as in `,usage=lying`."""
    settings = common.SETTINGS | RECIPE[world] | {"env_weight": weight, "seed": seed} | more
    return Config(tasks=f"world:{world}{dials}", **settings)


def jobs() -> common.Jobs:
    found = {}

    def add(world: str, arm: str, cell: tuple, groups: tuple, weight: float, seed: int) -> None:
        (rate, warmup), (tasks, size) = cell, groups
        steps = ROLLOUTS // (tasks * size)
        settings = {"tasks_per_step": tasks, "group_size": size, "steps": steps, "env_weight": weight}
        settings |= {"learning_rate": rate, "warmup_steps": warmup, "seed": seed, "max_turns": 1}
        settings |= {"eval_every": steps // EVALUATIONS, "eval_tasks": 100, "save_every": steps}
        key = f"{world}/{arm}/{rate:g}/{warmup}/{tasks}x{size}/{weight:g}/{seed}"
        found[key] = arm, "", Config(tasks=f"world:{world}", **settings, **WORLDS[world])

    for world in WORLDS:
        for cell in GRID:
            for arm in ("grpo", "echo"):
                add(world, arm, cell, GROUPS[world][0], 0.05, SEEDS[0])
    for (world, arm), cells in BEST_FEW.items():
        for seed in SEEDS:
            for cell in cells:
                for groups in GROUPS[world]:
                    add(world, arm, cell, groups, 0.05, seed)
    for (world, arm), (rate, warmup, groups) in BEST.items():
        for seed in SEEDS:
            for weight in LAMBDAS if arm == "echo" else ():
                add(world, arm, (rate, warmup), groups, weight, seed)
    return found


def run(key: str, arm: str, control: str, config: Config) -> list[dict]:
    return common.train_run(key, arm, control, common.from_base(config))


def cells(lines: list[dict]) -> dict[str, dict[int, list[dict]]]:
    """key without its seed -> seed -> the full evaluations of a run, in order."""
    found: dict[str, dict[int, list[dict]]] = {}
    for line in [line for line in lines if "pass_rate" in line]:  # not the small evaluations
        found.setdefault(line["key"].rpartition("/")[0], {}).setdefault(line["seed"], []).append(line)
    return found


def curve(run: list[dict]) -> float:
    """Mean pass rate of the evaluations after step 0."""
    return fmean(line["pass_rate"] for line in run if line["step"])


def lost(run: list[dict]) -> bool:
    return run[-1]["pass_rate"] < max(line["pass_rate"] for line in run) / 2


def draw(lines: list[dict]) -> dict[str, str]:
    rows = [("world", "arm", "learning rate", "warm-up", "groups", "lambda", "mean over the curve", "last",
             "lost", "steps clipped", "steps without an advantage")]  # fmt: skip
    ranked = sorted(cells(lines).items(), key=lambda cell: -fmean(map(curve, cell[1].values())))
    for key, runs in sorted(ranked, key=lambda cell: (cell[0].split("/")[:2], len(cell[1]))):
        world, arm, rate, warmup, groups, weight = key.split("/")
        texts = [world, arm, rate, warmup, groups, weight if arm == "echo" else "–"]
        texts += [stats.interval([curve(run) for run in runs.values()])]
        texts += [stats.interval([run[-1]["pass_rate"] for run in runs.values()])]
        texts += [f"{sum(map(lost, runs.values()))} of {len(runs)}"]
        for name in ("clipped", "no_advantage"):
            texts += [f"{fmean(line[name] for run in runs.values() for line in run if name in line):.2f}"]
        rows.append(texts)
    return {EXPERIMENT: tables.table(rows)}


if __name__ == "__main__":
    common.main(EXPERIMENT, __doc__, jobs(), run, draw)
