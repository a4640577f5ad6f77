"""Supervised training on recorded episodes: the weak base policy, and any floor to compare against."""

import random
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from echo_min import harness
from echo_min.batch import make_batch
from echo_min.checkpoint import load_policy, publish
from echo_min.config import Config, RunEnded
from echo_min.echo import echo_loss
from echo_min.masking import Role, encode
from echo_min.optimizer import make_optimizer, optimizer_step
from echo_min.policy import segment_logprobs
from echo_min.rollout import Episode, StopReason, rollout
from echo_min.sampler import Reply
from echo_min.tasks import Task, World
from echo_min.tiny import tiny_model, tiny_tokenizer


class Script:
    """A scripted agent behind the Sampler's interface: each episode types its own list of commands."""

    def __init__(self, tokenizer, scripts: list[list[str]], style: str = "plain"):
        self.tokenizer, self.style = tokenizer, style
        self.scripts = [iter(script) for script in scripts]

    def reply(self, episodes: list[int], new_ids: list[list[int]], max_new: int) -> list[Reply]:
        end = self.tokenizer.convert_tokens_to_ids(harness.END)
        typed = (harness.reply(next(self.scripts[episode], harness.DONE), self.style) for episode in episodes)
        replies = [[*encode(self.tokenizer, Role.ACTION, text), end] for text in typed]
        return [(ids, [0.0] * len(ids)) for ids in replies]


def record(tokenizer, scripts: list[tuple[Task, list[str]]], config: Config) -> list[Episode]:
    """Play (task, commands) pairs in real terminals. -> one episode each. Raises RunEnded if one fails."""
    episodes = []
    for start in tqdm(range(0, len(scripts), config.terminals), "demonstrations", disable=None):
        part = scripts[start : start + config.terminals]
        agent = Script(tokenizer, [commands for _, commands in part], config.harness)
        episodes += rollout(agent, tokenizer, [Episode(task, 0) for task, _ in part], config)
        if failed := [e for e in episodes[start:] if e.stop is StopReason.INFRA_ERROR]:
            what = f"{len(failed)} of {len(part)} scripted episodes failed"
            raise RunEnded(f"{what}: {failed[0].error}")
    return episodes


def supervise(model, episodes: list[Episode], config: Config, action_weight: float = 1.0) -> None:
    """Minimise action_weight * CE(actions) + base_observation_weight * CE(observations), in place.

    base_steps of AdamW on base_batch episodes, in forward passes of at most prefill_tokens; the learning rate
    rises for a tenth of the steps, then falls, and is never 0. Raises RunEnded if a gradient is not finite.
    """
    rng = random.Random(f"supervise {config.seed}")
    optimizer = make_optimizer(model, config)
    plain = {"policy_norm": "sequence", "observation_norm": "observation"}  # whatever RL is told to try
    objective = replace(config, **plain, parsed_only=False, warnings_as_targets=False)
    for step in (bar := tqdm(range(config.base_steps), "supervised", disable=None)):
        done = (step + 0.5) / config.base_steps
        learning_rate = config.base_learning_rate * min(10 * done, (1 - done) / 0.9)
        batch = make_batch(rng.choices(episodes, k=config.base_batch), objective)
        action_total = observation_total = 0.0
        for part in batch.micro_batches(config.prefill_tokens, model.device):
            actions, observations = part.action_mask, part.observation_mask
            logprobs = segment_logprobs(model, part.ids, part.ids, actions, observations, config.logit_mb)
            action_ce = echo_loss(logprobs[0], part.action_weights[actions])
            observation_ce = echo_loss(logprobs[1], part.observation_weights[observations])
            (action_weight * action_ce + config.base_observation_weight * observation_ce).backward()
            action_total += action_ce.item()
            observation_total += observation_ce.item()
        if not torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).isfinite():
            raise RunEnded(f"supervised step {step + 1}: gradient not finite; lower base_learning_rate")
        optimizer_step(optimizer, learning_rate, seed=config.seed * 1_000_003 + step)
        bar.set_postfix_str(f"action CE {action_total:.2f}, observation CE {observation_total:.2f}")


def make_base(config: Config, world: World, folder: Path) -> None:
    """The base policy, written to `folder`: supervised on weak demonstrations, it knows the world's form and
    none of its facts. The tiny model is made from scratch, with a tokenizer of its own; another is loaded."""
    rng = random.Random(f"base {config.seed}")
    demonstrations = [world.weak(rng) for _ in range(config.base_demonstrations)]
    if config.model == "tiny":
        tokenizer = trained_tokenizer(demonstrations[:200], world, config)
        model = tiny_model(tokenizer, config.seed).to(config.device)
    else:
        made_as = config.device, config.dtype, config.gradient_checkpointing
        model, tokenizer = load_policy(config.model, *made_as)
    supervise(model, record(tokenizer, demonstrations, config), config)
    publish(model, tokenizer, folder, config)


def trained_tokenizer(demonstrations: list[tuple[Task, list[str]]], world: World, config: Config):
    by_byte, roomy = tiny_tokenizer([]), replace(config, context=1 << 20)
    texts = [by_byte.decode(e.transcript.ids) for e in record(by_byte, demonstrations, roomy)]
    texts += [harness.warning_block(warning) for warning in harness.warnings(config.harness)] * 20
    texts += [text for task in world.train + world.held_out for text in (task.instruction, task.solution)]
    return tiny_tokenizer(texts)
