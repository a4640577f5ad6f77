"""A score that tells beforehand, from the base's own rollouts, whether ECHO will help; and what came of it.

python figures/linkage.py          redraws the picture and prints the tables, from figures/data
python figures/linkage.py --run    makes the scores that are missing; then the runs of doses.py and
                                   learning_curves.py with which they are compared must be there

linkage: copies of the base are fitted for the same steps on the same outputs; one reads prompt and commands,
from another both are cut out. By how many nats a token the first is better on episodes kept aside.
by_command: the same where the commands alone are cut out; little where the prompt names what the output
follows from. alignment: cosine of the two terms' gradients at the base, summed over the batches in which some
group has passes and failures; none if there is no such batch. observed: what the copy that reads all gains in
pass rate.

Fixed before the runs: a condition is predicted to gain where linkage is above LINKED and alignment above 0.
Lying and code are linked and useless by design: there linkage alone must fail.
"""

from dataclasses import replace
from math import isnan, nan
from statistics import fmean

import common
import doses
import learning_curves
import matplotlib.pyplot as plt
import recipe
import stats
import style
import tables
import torch

from echo_min.batch import make_batch
from echo_min.checkpoint import load_policy
from echo_min.config import Config
from echo_min.echo import echo_loss
from echo_min.evaluate import cross_entropy, graded, observation_logprobs
from echo_min.grpo import grpo_loss
from echo_min.machine import on_this_machine
from echo_min.masking import Role, Transcript
from echo_min.policy import segment_logprobs
from echo_min.rollout import Episode, Noise, sample_episodes
from echo_min.sft import supervise
from train import pick_tasks

EXPERIMENT = "linkage"
BATCHES, ASIDE = 10, 3  # of the base's rollouts, a step's each: to fit on, to measure on
# of a development seed: with 2e-4 the fit was as linked and gained nothing
FIT = {"base_steps": 50, "base_learning_rate": 1e-3, "base_observation_weight": 1.0}
CUT = {"ce_blind": (Role.PROMPT, Role.ACTION), "ce_prompt": (Role.ACTION,), "ce_seeing": ()}  # of the copies
LINKED = 0.1  # nats a token
DOSES = sorted({doses.cell(dial, value) for dial, (values, _) in doses.DIALS.items() for value in values})
OTHERS = {  # condition -> (world, arm of learning_curves.py), on as many of its seeds
    "lying": ("hard", "lying"), "code": ("hard", "code"), "gnu": ("gnu", "echo 0.05"),
    "file": ("file", "echo 0.05"),
}  # fmt: skip


def jobs() -> common.Jobs:
    found = {}
    for condition in DOSES:
        dials = "" if condition == "plain" else f",{condition}"
        for seed in doses.SEEDS:
            found[f"{condition}/{seed}"] = "echo", "", recipe.config("hard", 0.05, seed, dials)
    for condition, (world, arm) in OTHERS.items():
        for seed in learning_curves.SEEDS[: len(doses.SEEDS)]:
            dials = learning_curves.ARMS[arm][2]
            found[f"{condition}/{seed}"] = "echo", "", recipe.config(world, 0.05, seed, dials)
    return found


def run(key: str, arm: str, control: str, config: Config) -> list[dict]:
    config = on_this_machine(common.from_base(config))
    world = common.world_of(config)
    model, tokenizer = load_policy(config.model)
    played = []
    for step in range(BATCHES + ASIDE):
        noise = Noise.TRAINING, config.seed, step
        tasks = pick_tasks(world.train, step, config)
        played.append(sample_episodes(model, tokenizer, tasks, config.group_size, config, noise))
    found = {"alignment": alignment(model, played[:BATCHES], config)}
    before = passed(model, tokenizer, world, config)
    fit, aside = (
        [episode for batch in some for episode in batch if episode.valid]
        for some in (played[:BATCHES], played[BATCHES:])
    )
    for name, roles in CUT.items():
        copy, _ = load_policy(config.model)
        supervise(copy, [without(e, roles) for e in fit], replace(config, **FIT), action_weight=0.0)
        transcripts = [without(episode, roles).transcript for episode in aside]
        found[name] = cross_entropy(observation_logprobs(copy, transcripts, config))
    found["observed"] = passed(copy, tokenizer, world, config) - before
    about = {"key": key, "config": common.digest(config), "arm": arm, "seed": config.seed, "step": 0}
    found["linkage"] = found["ce_blind"] - found["ce_seeing"]
    found["by_command"] = found["ce_prompt"] - found["ce_seeing"]
    return [about | {name: round(value, 5) for name, value in found.items() if not isnan(value)}]


def passed(model, tokenizer, world, config: Config) -> float:
    noise = Noise.EVALUATION, config.seed, 0
    tasks = world.held_out[: config.eval_tasks]
    return fmean(reward >= 1 for reward in graded(sample_episodes(model, tokenizer, tasks, 1, config, noise)))


def without(episode: Episode, roles: tuple[Role, ...]) -> Episode:
    """The same outputs, but what has these roles is cut out."""
    t = episode.transcript
    kept = [i for i, role in enumerate(t.roles) if role not in roles]
    cut = Transcript(*([values[i] for i in kept] for values in (t.ids, t.roles, t.logprobs)))
    return replace(episode, transcript=cut)


def alignment(model, batches: list[list[Episode]], config: Config) -> float:
    """Cosine of the gradients of policy loss and observation CE. At the base, where the ratio is 1 and
    nothing is clipped."""
    total = []
    for which in (0, 1):
        model.zero_grad()
        for episodes in batches:
            batch = make_batch(episodes, config)
            if not batch.advantages.any():
                continue
            for part in batch.micro_batches(config.prefill_tokens):
                loss(model, part, config)[which].backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        total.append(torch.cat(grads) if grads else torch.zeros(1))
    model.zero_grad()
    norms = total[0].norm() * total[1].norm()
    return (total[0] @ total[1] / norms).item() if norms else nan


def loss(model, part, config: Config):
    """-> policy loss, observation CE, as in train.update."""
    actions, observations = part.action_mask, part.observation_mask
    args = model, part.ids, part.targets, actions, observations, config.logit_mb
    logprobs = segment_logprobs(*args, config.temperature, config.observation_temperature)
    advantages = part.advantages[:, None].expand_as(actions)[actions]
    sampler, weights = part.sampler_logprobs[actions], part.action_weights[actions]
    policy = grpo_loss(logprobs[0], sampler, advantages, weights, config.clip_low, config.clip_high)
    return policy, echo_loss(logprobs[1], part.observation_weights[observations])


# ---- comparison ----


def gains() -> dict[str, list[float]]:
    """condition -> what ECHO 0.05 gained on GRPO, mean over the curve, a number a seed."""
    lines = {}
    for script in (doses, learning_curves):
        lines[script] = common.load(script.EXPERIMENT, common.as_asked(script.jobs()))
    found = {}
    for dial, (values, _) in doses.DIALS.items():
        for value in values:
            found[doses.cell(dial, value)] = doses.gain(lines[doses], dial, value, "echo 0.05")
    for condition, (world, arm) in OTHERS.items():
        rates = [stats.of(lines[learning_curves], world, name) for name in ("grpo", arm)]
        found[condition] = stats.paired(*map(learning_curves.end, rates))
    return {condition: own for condition, own in found.items() if own}


def predicted(linkage: float, alignment: float) -> bool:
    return linkage > LINKED and alignment > 0


def means(lines: list[dict]) -> dict[str, dict[str, float]]:
    """condition -> name of a number -> its mean over seeds; nan if no seed has it."""
    found = {}
    for condition in (*DOSES, *OTHERS):
        if mine := stats.of(lines, condition):
            names = "linkage", "by_command", "alignment", "observed"
            own = {name: stats.by_seed(mine, name).values() for name in names}
            found[condition] = {name: fmean(values) if values else nan for name, values in own.items()}
    return found


def draw(lines: list[dict]) -> dict[str, str]:
    gained, scores = gains(), means(lines)
    both = [condition for condition in scores if condition in gained]
    table_of = {condition: scores[condition] | {"gain": fmean(gained[condition])} for condition in both}
    fig, axes = plt.subplots(1, 4, figsize=(18, 5.2))
    rows = [("score", "of", "rank correlation [95 % interval]")]
    pairs = [(score, "gain") for score in ("linkage", "by_command", "alignment")] + [("linkage", "observed")]
    names = {"gain": "gain of ECHO 0.05 on GRPO", "observed": "gain from observations alone"}
    for ax, (score, outcome) in zip(axes, pairs, strict=True):
        points = {c: (own[score], own[outcome]) for c, own in table_of.items() if not isnan(own[score])}
        for condition, (x, y) in points.items():
            ax.plot(x, y, "o", color="black", ms=4)
            ax.annotate(condition, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=8)
        ax.axhline(0, color="black", lw=0.7)
        style.axes(ax, xlabel=score, ylabel=names[outcome])
        rows.append((score, names[outcome], stats.rank_text(list(points.values()))))
    right = sum(predicted(o["linkage"], o["alignment"]) == (o["gain"] > 0) for o in table_of.values())
    said = f"linkage and alignment together name the sign of ECHO's gain in {right} of {len(both)} conditions"
    fig.suptitle(f"{said}\nmeans over {len(doses.SEEDS)} seeds a condition; the scores are of the base alone")
    fig.tight_layout()
    common.save(fig, EXPERIMENT)
    return {EXPERIMENT: condition_table(table_of, gained), "linkage_ranks": tables.table(rows)}


def condition_table(table_of: dict, gained: dict) -> str:
    rows = [("condition", "linkage", "by command", "alignment", "predicted", "ECHO 0.05 – GRPO, curve",
             "observed alone")]  # fmt: skip
    for condition, own in sorted(table_of.items(), key=lambda item: -item[1]["linkage"]):
        says = "gain" if predicted(own["linkage"], own["alignment"]) else "none"
        row = [condition, *(f"{own[name]:.3f}" for name in ("linkage", "by_command", "alignment")), says]
        rows.append([*row, stats.interval(gained[condition]), f"{own['observed']:+.3f}"])
    return tables.table(rows)


if __name__ == "__main__":
    common.main(EXPERIMENT, __doc__, jobs(), run, draw)
