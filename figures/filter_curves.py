"""Does prediction become action where nothing can be learned by heart? World filter.

python figures/filter_curves.py          redraws the picture and prints the table, from figures/data
python figures/filter_curves.py --run    makes the runs that are missing

Input and wanted output stand in the prompt, every held-out input is new, and the terminal prints only what
the filter made of the input. A lead says that the hard tool's gain is more than words learned by heart; none
leaves that standing.
"""

from dataclasses import replace

import common
import compare
import learning_curves
import recipe

from echo_min.config import Config

EXPERIMENT = "filter_curves"
SEEDS, STEPS = (51, 52, 53), 150
SIZES = {"max_turns": 1, "context": 192}


def jobs() -> common.Jobs:
    found = {}
    for seed in SEEDS:
        for name in learning_curves.MAIN:
            arm, control, _, weight = learning_curves.ARMS[name]
            config = recipe.config("hard", 1.0 if weight is None else weight, seed, steps=STEPS, **SIZES)
            found[f"{name}/{seed}"] = arm, control, replace(config, tasks="world:filter")
    return found


def run(key: str, arm: str, control: str, config: Config) -> list[dict]:
    return common.train_run(key, arm, control, common.from_base(config))


def draw(lines: list[dict]) -> dict[str, str]:
    labels = {name: learning_curves.LABELS[name] for name in learning_curves.MAIN}
    labels["echo"] = "ECHO, lambda 1"
    return compare.draw(EXPERIMENT, lines, labels, "Filters on inputs that are always new")


if __name__ == "__main__":
    common.main(EXPERIMENT, __doc__, jobs(), run, draw)
