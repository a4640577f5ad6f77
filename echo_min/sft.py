"""Supervised training on recorded episodes: the weak base policy, and any floor to compare against."""

import random
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from echo_min import harness
from echo_min.checkpoint import publish
from echo_min.config import Config, RunEnded
from echo_min.echo import echo_loss
from echo_min.masking import (
    Role,
    Transcript,
    micro_batches,
    observation_targets,
    observation_weights,
    pad,
    policy_weights,
)
from echo_min.optimizer import make_optimizer, optimizer_step
from echo_min.policy import enough_memory, load_policy, segment_logprobs, tiny_model, tiny_tokenizer
from echo_min.rollout import Episode, Script, StopReason, rollout
from echo_min.tasks import Task, World


@enough_memory("rollout")
def record(tokenizer, scripts: list[tuple[Task, list[str]]], config: Config) -> list[Episode]:
    """Play (task, commands) pairs in real terminals. -> one episode each. Raises RunEnded if one fails."""
    episodes = []
    with tqdm(total=len(scripts), desc="demonstrations", disable=None) as bar:
        for start in range(0, len(scripts), config.terminals):
            part = scripts[start : start + config.terminals]
            agent = Script(tokenizer, [commands for _, commands in part], config.harness)
            episodes += rollout(agent, tokenizer, [Episode(task, 0) for task, _ in part], config)
            if failed := [e for e in episodes[start:] if e.stop is StopReason.INFRA_ERROR]:
                what = f"{len(failed)} of {len(part)} scripted episodes failed"
                raise RunEnded(f"{what}: {failed[0].error}")
            bar.update(len(part))
    return episodes


@enough_memory("supervised stage")
def supervise(model, transcripts: list[Transcript], config: Config, action_weight: float = 1.0) -> None:
    """Minimise action_weight * CE(actions) + base_observation_weight * CE(observations), in place.

    base_steps of AdamW on base_batch transcripts, in forward passes of at most prefill_tokens; the learning
    rate rises for a tenth of the steps, then falls. Raises RunEnded if memory runs out or the gradient is
    not finite.
    """
    rng = random.Random(f"supervise {config.seed}")
    optimizer = make_optimizer(model, config)
    bar = tqdm(range(config.base_steps), desc="supervised", disable=None)
    for step in bar:
        done = (step + 1) / config.base_steps
        learning_rate = config.base_learning_rate * min(10 * done, (1 - done) / 0.9)
        batch = rng.choices(transcripts, k=config.base_batch)
        ids, roles, _ = pad(batch)  # [B, T]
        one_group = torch.zeros(len(ids), dtype=torch.int64)
        # masks and weights, each [B, T]; the weights hold the whole batch's normaliser, so parts add up
        masks = roles == Role.ACTION, observation_targets(roles)
        whole = ids, *masks, policy_weights(roles, one_group), observation_weights(roles)
        total = [0.0, 0.0]
        for rows in micro_batches([len(t) for t in batch], config.prefill_tokens):
            T = max(len(batch[row]) for row in rows)
            i, a, o, w_a, w_o = (x[sorted(rows), :T].to(model.device) for x in whole)
            action, observation = segment_logprobs(model, i, i, a, o, logit_mb=config.logit_mb)
            action_ce, observation_ce = echo_loss(action, w_a[a]), echo_loss(observation, w_o[o])
            (action_weight * action_ce + config.base_observation_weight * observation_ce).backward()
            total = [total[0] + action_ce.item(), total[1] + observation_ce.item()]
        if not torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).isfinite():
            raise RunEnded(f"supervised step {step + 1}: gradient not finite; lower base_learning_rate")
        optimizer_step(optimizer, learning_rate, seed=config.seed * 1_000_003 + step)
        bar.set_postfix_str(f"action CE {total[0]:.2f}, observation CE {total[1]:.2f}")


def make_base(config: Config, world: World, folder: Path) -> None:
    """The base policy, written to `folder`: supervised on weak demonstrations, it knows the world's form and
    none of its facts. config.model tiny is made from scratch, its tokenizer trained on the tasks' words and
    some demonstrations; another model is loaded.
    """
    rng = random.Random(f"base {config.seed}")
    demonstrations = [world.weak(rng) for _ in range(config.base_demonstrations)]
    if config.model == "tiny":
        tokenizer = trained_tokenizer(demonstrations[:200], world, config)
        model = tiny_model(tokenizer, config.seed).to(config.device)
    else:
        settings = config.device, config.dtype, config.gradient_checkpointing
        model, tokenizer = load_policy(config.model, *settings)
    supervise(model, [e.transcript for e in record(tokenizer, demonstrations, config)], config)
    publish(model, tokenizer, folder, config)


def trained_tokenizer(demonstrations: list[tuple[Task, list[str]]], world: World, config: Config):
    by_byte, roomy = tiny_tokenizer([]), replace(config, context=1 << 20)
    texts = [by_byte.decode(e.transcript.ids) for e in record(by_byte, demonstrations, roomy)]
    texts += [harness.warning_block(warning) for warning in harness.WARNINGS[config.harness]] * 20
    texts += [text for task in world.train + world.held_out for text in (task.instruction, task.solution)]
    return tiny_tokenizer(texts)
