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
        replies = []
        for episode in episodes:
            text = harness.reply(next(self.scripts[episode], harness.DONE), self.style)
            ids = encode(self.tokenizer, Role.ACTION, text)
            ids.append(self.tokenizer.convert_tokens_to_ids(harness.END))
            replies.append((ids, [0.0] * len(ids)))
        return replies


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


def supervise(model, episodes: list[Episode], config: Config, action_weight: float = 1.0) -> None:
    """Minimise action_weight * CE(actions) + base_observation_weight * CE(observations), in place.

    base_steps of AdamW on base_batch episodes, in forward passes of at most prefill_tokens; the learning
    rate rises for a tenth of the steps, then falls, and is never 0.
    Raises RunEnded if the gradient is not finite.
    """
    rng = random.Random(f"supervise {config.seed}")
    optimizer = make_optimizer(model, config)
    plain = {"policy_norm": "sequence", "observation_norm": "observation"}  # whatever RL is told to try
    objective = replace(config, **plain, parsed_only=False, warnings_as_targets=False)
    bar = tqdm(range(config.base_steps), desc="supervised", disable=None)
    for step in bar:
        done = (step + 0.5) / config.base_steps
        learning_rate = config.base_learning_rate * min(10 * done, (1 - done) / 0.9)
        batch = make_batch(rng.choices(episodes, k=config.base_batch), objective)
        total_action_ce = total_observation_ce = 0.0
        for part in batch.micro_batches(config.prefill_tokens, model.device):
            masks = part.action_mask, part.observation_mask
            action, observation = segment_logprobs(model, part.ids, part.ids, *masks, config.logit_mb)
            action_ce = echo_loss(action, part.action_weights[part.action_mask])
            observation_ce = echo_loss(observation, part.observation_weights[part.observation_mask])
            (action_weight * action_ce + config.base_observation_weight * observation_ce).backward()
            total_action_ce += action_ce.item()
            total_observation_ce += observation_ce.item()
        if not torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).isfinite():
            raise RunEnded(f"supervised step {step + 1}: gradient not finite; lower base_learning_rate")
        optimizer_step(optimizer, learning_rate, seed=config.seed * 1_000_003 + step)
        bar.set_postfix_str(f"action CE {total_action_ce:.2f}, observation CE {total_observation_ce:.2f}")


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
        checkpointing = config.gradient_checkpointing
        model, tokenizer = load_policy(config.model, config.device, config.dtype, checkpointing)
    supervise(model, record(tokenizer, demonstrations, config), config)
    publish(model, tokenizer, folder, config)


def trained_tokenizer(demonstrations: list[tuple[Task, list[str]]], world: World, config: Config):
    by_byte, roomy = tiny_tokenizer([]), replace(config, context=1 << 20)
    texts = [by_byte.decode(e.transcript.ids) for e in record(by_byte, demonstrations, roomy)]
    texts += [harness.warning_block(warning) for warning in harness.warnings(config.harness)] * 20
    texts += [text for task in world.train + world.held_out for text in (task.instruction, task.solution)]
    return tiny_tokenizer(texts)
