"""What else could be learned from a failed attempt? Four rivals of ECHO in the hard tool, at equal rollouts.

python figures/rival_curves.py          redraws the picture and prints the table, from figures/data
python figures/rival_curves.py --run    makes the runs that are missing

process: GRPO whose reward grows with the share of right words. curiosity: with the surprise at the output.
imitate: supervised on the base's own rollouts, actions and outputs alike, then GRPO. hindsight: the usage
line that a wrong call printed is typed as the reply, supervised beside GRPO. Each has a strength, chosen on
a development seed; GRPO and ECHO are the runs of learning_curves.py.
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

from echo_min.checkpoint import load_policy, publish
from echo_min.config import Config
from echo_min.machine import on_this_machine
from echo_min.rollout import Noise, sample_episodes
from echo_min.sft import supervise
from train import pick_tasks

EXPERIMENT = "rival_curves"
TUNING, SEEDS = 101, (1, 2, 3)
BEST: dict[str, float] = {}  # what the development seed said
IMITATION = {"base_steps": 50, "base_learning_rate": 1e-3, "base_observation_weight": 1.0}
LABELS = {
    "process": "reward for right words", "curiosity": "reward for surprise",
    "imitate": "own rollouts imitated first", "hindsight": "printed line typed as reply",
}  # fmt: skip
REFERENCES = "grpo", "echo 0.05", "echo"  # of learning_curves.py


def jobs() -> common.Jobs:
    wanted = [(name, strength, TUNING) for name, tried in STRENGTHS.items() for strength in tried]
    wanted += [(name, strength, seed) for name, strength in BEST.items() for seed in SEEDS]
    found = {}
    for name, strength, seed in wanted:
        arm, control = "grpo", f"{name}={strength:g}" if name in ("process", "curiosity") else ""
        steps = 100 if seed == TUNING else learning_curves.STEPS
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
    return common.train_run(key, arm, control, replace(config, model=str(imitated(config, int(strength)))))


def imitated(config: Config, steps: int):
    """The base, supervised on its own rollouts of so many steps."""
    config = on_this_machine(config)
    model, tokenizer = load_policy(config.model)
    world, played = common.world_of(config), []
    for step in range(steps):
        tasks, key = pick_tasks(world.train, step, config), (Noise.SHOWING, config.seed, step)
        played += sample_episodes(model, tokenizer, tasks, config.group_size, config, key)
    kept = [episode for episode in played if episode.valid]
    supervise(model, kept, replace(config, **IMITATION))
    folder = common.RUNS / "imitated" / f"{steps}-{config.seed}"
    publish(model, tokenizer, folder, config)
    return folder


def draw(lines: list[dict]) -> dict[str, str]:
    known = common.load("learning_curves", common.as_asked(learning_curves.jobs()))
    chosen = {f"{name}/{strength:g}": LABELS[name] for name, strength in BEST.items()}
    rows = [("", "strength", "development seed, curve", "curve, three seeds", "last", "minus GRPO, paired")]
    grpo = learning_curves.end(stats.of(known, "hard", "grpo"))
    fig, ax = plt.subplots(figsize=(8, 6))
    for name in REFERENCES:
        mine = [line for line in stats.of(known, "hard", name) if line["seed"] in SEEDS]
        style.curves(ax, mine, "pass_rate", style.COLOURS[name], learning_curves.LABELS[name], top=1)
        rows.append(row(learning_curves.LABELS[name], "", {}, mine, grpo))
    for (key, label), dashes in zip(chosen.items(), ("--", ":", "-.", (0, (5, 1, 1, 1))), strict=False):
        mine = [line for line in stats.of(lines, *key.split("/")) if line["seed"] in SEEDS]
        style.curves(ax, mine, "pass_rate", "black", label, top=1, ls=dashes)
    for name, tried in STRENGTHS.items():
        for strength in tried:
            mine = stats.of(lines, name, f"{strength:g}")
            tuning = learning_curves.end(stats.pick(mine, seed=TUNING))
            fresh = [line for line in mine if line["seed"] in SEEDS]
            rows.append(row(LABELS[name], f"{strength:g}", tuning, fresh, grpo))
    style.axes(ax, xlabel="step", ylabel="pass rate, held-out tasks, sampled", ylim=(0, 1.02))
    ax.set_title(f"ECHO and its rivals, hard tool, seeds {', '.join(map(str, SEEDS))}", fontsize=11)
    style.legend(fig, [ax], 0.14, ncols=2)
    common.save(fig, EXPERIMENT)
    return {EXPERIMENT: tables.table(rows)}


def row(label: str, strength: str, tuning: dict, lines: list[dict], grpo: dict) -> tuple:
    ends = learning_curves.end(lines)
    last = max((line["step"] for line in lines), default=0)
    cells = [tuning, ends, stats.by_seed(lines, "pass_rate", step=last)]
    texts = [stats.interval(list(cell.values())) for cell in cells]
    return label, strength, *texts, stats.interval(stats.paired(grpo, ends))


if __name__ == "__main__":
    controls.CONTROLS |= rivals.changes()
    common.main(EXPERIMENT, __doc__, jobs(), run, draw)
