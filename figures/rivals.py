"""Rivals of ECHO: other ways to learn from what a failed attempt shows. As a control (controls.py), each is a
change to every batch; rival_curves.py runs them.
"""

from dataclasses import replace
from functools import partial
from itertools import zip_longest
from statistics import fmean

import controls
import torch

from echo_min import harness
from echo_min.batch import Batch, make_batch
from echo_min.evaluate import observation_logprobs
from echo_min.grpo import group_advantages
from echo_min.masking import Role, Transcript, encode
from echo_min.rollout import Episode, StopReason
from train import Context

STRENGTHS = {  # the three tried on the development seed
    "process": (0.1, 0.3, 1.0),  # of the share of right words, in rewards
    "curiosity": (0.01, 0.03, 0.1),  # of a nat of surprise
    "imitate": (5, 10, 20),  # steps' worth of rollouts
    "hindsight": (0.05, 0.2, 1.0),  # as lambda
}


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
