"""What else could be learned from a failed attempt? Four rivals of ECHO in the hard tool, at equal rollouts.

python figures/rivals.py          redraws the picture and prints the table, from figures/data
python figures/rivals.py --run    makes the runs that are missing

process: GRPO whose reward grows with the share of right words. curiosity: with the surprise at the output.
imitate: supervised on the base's own rollouts, actions and outputs alike, then GRPO. hindsight: the usage
line that a wrong call printed is typed as the reply, supervised beside GRPO. Each has a strength, chosen on
a development seed; GRPO and ECHO are the runs of learning_curves.py.
"""

from dataclasses import replace
from functools import partial
from itertools import zip_longest
from statistics import fmean

import common
import controls
import learning_curves
import matplotlib.pyplot as plt
import recipe
import stats
import style
import tables
import torch

from echo_min import harness
from echo_min.batch import Batch, make_batch
from echo_min.checkpoint import load_policy, publish
from echo_min.config import Config
from echo_min.evaluate import observation_logprobs
from echo_min.grpo import group_advantages
from echo_min.machine import on_this_machine
from echo_min.masking import Role, Transcript, encode
from echo_min.rollout import Episode, Noise, StopReason, sample_episodes
from echo_min.sft import supervise
from train import Context, pick_tasks

EXPERIMENT = "rivals"
TUNING, SEEDS = 101, (1, 2, 3)
STRENGTHS = {  # the three tried on the development seed
    "process": (0.1, 0.3, 1.0),  # of the share of right words, in rewards
    "curiosity": (0.01, 0.03, 0.1),  # of a nat of surprise
    "imitate": (5, 10, 20),  # steps' worth of rollouts
    "hindsight": (0.05, 0.2, 1.0),  # as lambda
}
BEST: dict[str, float] = {}  # what the development seed said
IMITATION = {"base_steps": 50, "base_learning_rate": 1e-3, "base_observation_weight": 1.0}
LABELS = {
    "process": "reward for right words", "curiosity": "reward for surprise",
    "imitate": "own rollouts imitated first", "hindsight": "printed line typed as reply",
}  # fmt: skip
REFERENCES = "grpo", "echo 0.05", "echo"  # of learning_curves.py


def process(batch: Batch, context: Context, strength: float) -> Batch:
    """Raises the reward by strength times the share of the solution's words that stand in their places in a
    command, the best one of the episode."""

    def right(episode: Episode) -> float:
        words = episode.task.solution.split()
        pairs = (zip_longest(words, command.split()) for command in episode.commands)
        return max((fmean(a == b for a, b in zipped) for zipped in pairs), default=0.0)

    return rewarded(batch, strength * torch.tensor([right(episode) for episode in context.episodes]))


def curiosity(batch: Batch, context: Context, strength: float) -> Batch:
    """Raises the reward by strength times the surprise at what the commands printed, nats a token."""
    transcripts = [episode.transcript for episode in context.episodes]
    found = observation_logprobs(context.model, transcripts, context.config)
    nats = [-fmean(one.values()) if one else 0.0 for one in found]
    return rewarded(batch, strength * torch.tensor(nats))


def rewarded(batch: Batch, bonus: torch.Tensor) -> Batch:
    return replace(batch, advantages=group_advantages(batch.rewards + bonus, batch.groups))


def hindsight(batch: Batch, context: Context) -> Batch:
    """Each usage line that a command printed, typed as the reply to its task: supervised with ECHO's weight
    and normaliser, in place of the outputs."""
    told, tokenizer = [], context.tokenizer
    for episode in context.episodes:
        t = episode.transcript
        printed = [i for i, role in zip(t.ids, t.roles, strict=True) if role == Role.OBSERVATION]
        line = tokenizer.decode(printed).split("\n")[0]
        if line.startswith("usage: "):
            file = episode.task.instruction.split()[-1]
            command = line.removeprefix("usage: ").replace("FILE", file)
            typed = Transcript()
            for role, segment in harness.prompt(episode.task, context.config.harness):
                typed.append(role, encode(tokenizer, role, segment))
            end = tokenizer.convert_tokens_to_ids(harness.END)
            typed.append(Role.OBSERVATION, [*encode(tokenizer, Role.ACTION, command), end])
            told.append(replace(episode, transcript=typed, stop=StopReason.DONE))
    if not told:
        return batch
    other = make_batch(told, context.config)
    weights = other.observation_weights * (len(told) / len(batch))
    return controls.instead(batch, replace(other, observation_weights=weights))


def changes() -> dict:
    """What train.py is handed, by the names that runs have for it."""
    found = {"hindsight": hindsight}
    for name, rival in {"process": process, "curiosity": curiosity}.items():
        found |= {f"{name}={strength:g}": partial(rival, strength=strength) for strength in STRENGTHS[name]}
    return found


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
    controls.CONTROLS |= changes()
    common.main(EXPERIMENT, __doc__, jobs(), run, draw)
