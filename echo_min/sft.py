"""Supervised training on recorded episodes: the weak base policy, and any floor to compare against."""

import random
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from echo_min.checkpoint import publish
from echo_min.config import Config
from echo_min.echo import echo_loss
from echo_min.masking import Role, Transcript, observation_targets, observation_weights, pad, policy_weights
from echo_min.policy import load_policy, segment_logprobs, tiny_model, tiny_tokenizer
from echo_min.rollout import Episode, StopReason, scripted_episodes
from echo_min.tasks import Task
from echo_min.worlds import World


def record(tokenizer, scripts: list[tuple[Task, list[str]]], config: Config) -> list[Episode]:
    """Play (task, commands) pairs in real terminals. -> one episode each. Raises RuntimeError if a terminal
    fails."""
    episodes = []
    with tqdm(total=len(scripts), desc="demonstrations", disable=None) as bar:
        for start in range(0, len(scripts), config.terminals):
            tasks, commands = zip(*scripts[start : start + config.terminals], strict=True)
            episodes += scripted_episodes(tokenizer, list(tasks), list(commands), config)
            bar.update(len(tasks))
    if failed := [e for e in episodes if e.stop is StopReason.INFRA_ERROR]:
        raise RuntimeError(f"{len(failed)} of {len(episodes)} scripted episodes failed: {failed[0].error}")
    return episodes


def supervise(model, transcripts: list[Transcript], config: Config, action_weight: float = 1.0) -> None:
    """base_steps of AdamW on action_weight * CE(actions) + base_observation_weight * CE(observations), in
    place.

    Each step draws base_batch transcripts; the learning rate rises for a tenth of the steps, then falls to
    zero.
    """
    rng = random.Random(f"supervise {config.seed}")
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
    )
    bar = tqdm(range(config.base_steps), desc="supervised", disable=None)
    for step in bar:
        done = (step + 1) / config.base_steps
        optimizer.param_groups[0]["lr"] = config.base_learning_rate * min(10 * done, (1 - done) / 0.9)
        ids, roles, _ = pad(rng.choices(transcripts, k=config.base_batch))  # [B, T]
        actions, observations = roles == Role.ACTION, observation_targets(roles)
        ids = ids.to(model.device)
        action, observation = segment_logprobs(model, ids, ids, actions, observations)
        one_group = torch.zeros(len(ids), dtype=torch.int64)
        action_ce = echo_loss(action, policy_weights(roles, one_group)[actions].to(model.device))
        observation_ce = echo_loss(observation, observation_weights(roles)[observations].to(model.device))
        optimizer.zero_grad()
        (action_weight * action_ce + config.base_observation_weight * observation_ce).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        bar.set_postfix_str(f"action CE {action_ce.item():.2f}, observation CE {observation_ce.item():.2f}")


def make_base(config: Config, world: World, folder: Path) -> None:
    """A weak base policy from scratch, written to `folder`: it has seen the world's form and none of its
    facts.

    Its tokenizer is trained on the tasks' words and on some demonstrations, its weights on
    base_demonstrations.
    """
    rng = random.Random(f"base {config.seed}")
    demonstrations = [world.weak(rng) for _ in range(config.base_demonstrations)]
    by_byte = tiny_tokenizer([])
    sample = record(
        by_byte, demonstrations[:200], replace(config, context=1 << 20, max_action_tokens=1 << 10)
    )
    texts = [by_byte.decode(e.transcript.ids) for e in sample]
    texts += [text for task in world.train + world.held_out for text in (task.instruction, task.solution)]
    tokenizer = tiny_tokenizer(texts)
    model = tiny_model(tokenizer, config.seed).to(config.device)
    supervise(model, [e.transcript for e in record(tokenizer, demonstrations, config)], config)
    publish(model, tokenizer, folder, config)


def load_base(config: Config, folder: Path):
    """-> (model, tokenizer) that every arm starts from."""
    return load_policy(folder if config.model == "tiny" else config.model, config.device)
