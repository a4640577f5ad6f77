"""How a policy is examined, in training and by eval.py: rollouts of held-out tasks, and observation CE."""

import random
from math import isnan
from statistics import fmean

import torch

from echo_min import page, ranks, report
from echo_min.batch import pad
from echo_min.config import Config, RunEnded
from echo_min.echo import observation_mask
from echo_min.masking import Transcript
from echo_min.policy import segment_logprobs
from echo_min.rollout import Episode, Noise, sample_episodes
from echo_min.sft import record
from echo_min.tasks import World


class Examination:
    """Of one policy in training. The scripted expert's trajectories on the held-out tasks, those of a
    stronger policy, are never trained on; how well they are predicted is measured at every evaluation."""

    def __init__(self, model, tokenizer, world: World, config: Config):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.tasks = world.held_out[: config.eval_tasks]
        self.expert = expert_transcripts(tokenizer, world, config)
        early = range(min(20, len(self.expert)))
        self.shown = max(early, key=lambda i: len(self.expert[i]))  # its task is on the page: a call fails
        self.last: dict = {}  # results
        self.point: dict = {}  # of the page

    def results(self, step: int) -> dict:
        """A sampled and a greedy rollout of each task, and observation CE on the expert's trajectories."""
        with ranks.whole(self.model):
            return self._results(step)

    def _results(self, step: int) -> dict:
        found = observation_logprobs(self.model, self.expert, self.config)
        self.last = {"expert_ce": cross_entropy(found)}
        key = Noise.EVALUATION, self.config.seed, step
        for way, noise in (("", key), ("_greedy", None)):
            episodes = sample_episodes(self.model, self.tokenizer, self.tasks, 1, self.config, noise)
            rewards = graded(episodes)
            passed, mean = sum(reward >= 1 for reward in rewards) / len(rewards), fmean(rewards)
            self.last |= {f"pass_rate{way}": passed, f"mean_reward{way}": mean, "eval_tasks": len(rewards)}
        greedy, i = episodes[self.shown], self.shown
        (logprobs,) = observation_logprobs(self.model, [greedy.transcript], self.config)
        own = report.tokens_with_surprise(self.tokenizer, greedy.transcript, logprobs)
        expert = report.tokens_with_surprise(self.tokenizer, self.expert[i], found[i])
        self.point = page.point(greedy, own, expert=expert)
        return self.last


@torch.no_grad()
def observation_logprobs(model, transcripts: list[Transcript], config: Config) -> list[dict[int, float]]:
    """-> for each transcript: position of an observation token -> its log-probability, nats."""
    out: list[dict[int, float]] = []
    while part := transcripts[len(out) : len(out) + 64]:
        while len(part) > 1 and len(part) * max(map(len, part)) > config.prefill_tokens:
            part.pop()
        ids, roles, _ = pad(part)
        ids, observations = ids.to(model.device), observation_mask(roles)
        nothing = torch.zeros_like(observations)
        _, logprobs = segment_logprobs(model, ids, ids, nothing, observations, config.logit_mb)
        found: list[dict[int, float]] = [{} for _ in part]
        for (b, t), logprob in zip(observations.nonzero().tolist(), logprobs.tolist(), strict=True):
            found[b][t] = logprob
        out += found
    return out


def cross_entropy(found: list[dict[int, float]]) -> float:
    """Mean over all observation tokens, nats per token; nan if there are none."""
    logprobs = [logprob for positions in found for logprob in positions.values()]
    return -sum(logprobs) / len(logprobs) if logprobs else float("nan")


def expert_transcripts(tokenizer, world: World, config: Config) -> list[Transcript]:
    """The scripted expert on the held-out tasks."""
    rng = random.Random("expert")
    scripts = [(task, world.expert(task, rng)) for task in world.held_out[: config.eval_tasks]]
    return [e.transcript for e in record(tokenizer, scripts, config)]


def graded(episodes: list[Episode]) -> list[float]:
    """The rewards without the infrastructure's failures. Raises RunEnded if nothing else is left."""
    rewards = [e.reward for e in episodes if not isnan(e.reward)]
    if not rewards:
        raise RunEnded(f"no episode could be graded: {episodes[0].error}")
    return rewards
