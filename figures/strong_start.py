"""Does ECHO still help a policy that already passes two tasks in five? Tool world with one word to find out.

python figures/strong_start.py          redraws the picture and prints the table, from figures/data
python figures/strong_start.py --run    makes the runs that are missing

Both start from the first full evaluation of a GRPO run in which it passes STRONG, with a new optimizer.
"""

from dataclasses import replace
from pathlib import Path

import common
import compare
import learning_curves
import recipe

from echo_min import checkpoint, report
from echo_min.config import Config

EXPERIMENT = "strong_start"
SEEDS = 31, 32, 33
STRONG, PATIENCE = 0.4, 300  # pass rate, steps until which a start must have it
STEPS = 75
ARMS = learning_curves.MAIN


def jobs() -> common.Jobs:
    found = {}
    for seed in SEEDS:
        for name in ARMS:
            arm, control, _, weight = learning_curves.ARMS[name]
            weight = recipe.TUNED["hard"] if weight is None else weight
            config = recipe.config("hard", weight, seed, steps=STEPS)
            found[f"{name}/{seed}"] = arm, control, replace(config, tasks="world:tool")
    return found


def run(key: str, arm: str, control: str, config: Config) -> list[dict]:
    return common.train_run(key, arm, control, replace(config, model=str(start(config))))


def start(config: Config) -> Path:
    """The checkpoint, made if it is not there. Raises SystemExit if GRPO is not strong in time."""
    key, config = f"start/{config.seed}", replace(config, env_weight=0.05)  # one run, whoever asks
    folder, patience = common.RUNS / key, 0 if common.QUICK in common.RUNS.parents else PATIENCE
    with common.alone(folder):
        step, rate = evaluated(folder)
        while step == 0 or (rate < STRONG and step < patience):
            steps = step + config.eval_every
            common.trained(key, "grpo", "", common.from_base(replace(config, steps=steps)))
            step, rate = evaluated(folder)
    if rate < STRONG and patience:
        raise SystemExit(f"{key}: GRPO passes {rate:.0%} after {step} steps")
    return checkpoint.latest(folder / "grpo")[1]


def evaluated(folder: Path) -> tuple[int, float]:
    """-> (step, pass rate) of the run's last full evaluation; (0, 0) before the first."""
    lines = [line for line in report.read(folder / "metrics.jsonl") if "pass_rate" in line]
    return (lines[-1]["step"], lines[-1]["pass_rate"]) if lines else (0, 0.0)


def draw(lines: list[dict]) -> dict[str, str]:
    labels = {name: learning_curves.LABELS[name] for name in ARMS}
    return compare.draw(EXPERIMENT, lines, labels, f"From a policy that passes {STRONG:.0%}: tool, one word")


if __name__ == "__main__":
    common.main(EXPERIMENT, __doc__, jobs(), run, draw)
