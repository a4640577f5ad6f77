"""Rivals of ECHO: other ways to learn from what a failed attempt shows. As a control (controls.py), each is a
change to every batch; rival_curves.py runs them.
"""

from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from statistics import fmean

import controls
import torch

from echo_min import harness
from echo_min.batch import Batch, make_batch
from echo_min.checkpoint import load_policy, publish
from echo_min.config import Config
from echo_min.evaluate import observation_logprobs
from echo_min.machine import on_this_machine
from echo_min.masking import Role, Transcript, encode
from echo_min.rollout import Episode, Noise, StopReason, sample_episodes
from echo_min.sft import supervise
from echo_min.worlds.registry import load_tasks
from train import Context, pick_tasks

STRENGTHS = {  # the three tried on the development seed
    "process": (1.0, 3.0, 10.0),  # advantage for all words right
    "curiosity": (0.3, 1.0, 3.0),  # advantage for a nat of surprise
    "imitate": (5, 10, 20),  # steps' worth of rollouts
    "hindsight": (0.05, 0.2, 1.0),  # as lambda
}

IMITATION = {"base_steps": 50, "base_learning_rate": 1e-3, "base_observation_weight": 1.0}


def process(batch: Batch, context: Context, strength: float) -> Batch:
    """Adds strength times the share of the solution's words that stand in their places in a command, the best
    one of the episode."""

    def right(episode: Episode) -> float:
        words = episode.task.solution.split()
        pairs = (zip_longest(words, command.split()) for command in episode.commands)
        return max((fmean(a == b for a, b in zipped) for zipped in pairs), default=0.0)

    return rewarded(batch, strength * torch.tensor([right(episode) for episode in context.episodes]))


def curiosity(batch: Batch, context: Context, strength: float) -> Batch:
    """Adds strength times the surprise at what the commands printed, nats a token."""
    transcripts = [episode.transcript for episode in context.episodes]
    found = observation_logprobs(context.model, transcripts, context.config)
    nats = [-fmean(one.values()) if one else 0.0 for one in found]
    return rewarded(batch, strength * torch.tensor(nats))


def rewarded(batch: Batch, bonus: torch.Tensor) -> Batch:
    """The bonus, less its group's mean, is added to the advantage. Within the reward it would be divided by
    the group's spread, and where no rollout passes, as nearly always at first, no strength would act."""
    sums, counts = (torch.zeros(int(batch.groups.max()) + 1) for _ in range(2))
    sums.index_add_(0, batch.groups, bonus)
    counts.index_add_(0, batch.groups, torch.ones_like(bonus))
    means = (sums / counts)[batch.groups]
    return replace(batch, advantages=batch.advantages + bonus - means)


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


def imitated(config: Config, runs: Path, steps: int) -> Path:
    """-> the base, supervised on its own rollouts of so many steps."""
    config = on_this_machine(config)
    model, tokenizer = load_policy(config.model)
    tasks, played = load_tasks(config.tasks, config.allow_network, config.seed).train, []
    for step in range(steps):
        chosen, key = pick_tasks(tasks, step, config), (Noise.SHOWING, config.seed, step)
        played += sample_episodes(model, tokenizer, chosen, config.group_size, config, key)
    supervise(model, [e for e in played if e.valid], replace(config, **IMITATION))
    folder = runs / "imitated" / f"{steps}-{config.seed}"
    publish(model, tokenizer, folder, config)
    return folder


def changes() -> dict:
    """What train.py is handed, by the names that runs have for it."""
    found = {"hindsight": hindsight}
    for name, rival in {"process": process, "curiosity": curiosity}.items():
        found |= {f"{name}={strength:g}": partial(rival, strength=strength) for strength in STRENGTHS[name]}
    return found
