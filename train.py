"""GRPO and ECHO on terminal tasks, top to bottom. `python train.py --help` lists every setting.

    for each step:
        a group of rollouts for each of a few tasks           rollout.py: policy <-> terminal, then a reward
        advantage = (reward - group mean) / group std         grpo.py
        who wrote which token -> masks and weights            masking.py, batch.py
        one forward pass -> logprobs of both segments         policy.py, kernels/segment_logprob.py
        loss = GRPO(actions) + env_weight * CE(observations)  grpo.py, echo.py
        one optimizer step                                    optimizer.py

Not here, as in the paper: KL, reference model, critic, entropy bonus, a second update a batch.
"""

from echo_min import cli

if __name__ == "__main__":  # before torch, which takes seconds to load
    config, folder = cli.parse_args()

import random
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from echo_min import checkpoint, page, ranks, report
from echo_min.batch import Batch, make_batch
from echo_min.config import Config, RunEnded
from echo_min.echo import echo_loss, predictable
from echo_min.evaluate import Examination
from echo_min.grpo import grpo_loss
from echo_min.machine import enough_memory, on_this_machine, others_alive
from echo_min.optimizer import optimizer_step
from echo_min.policy import segment_logprobs
from echo_min.rollout import Episode, Noise, batch_metrics, sample_episodes
from echo_min.sft import make_base
from echo_min.tasks import Task, World
from echo_min.worlds.registry import load_tasks


@dataclass
class Context:
    """What an experiment's change to every batch may look at: control(batch, context) -> batch."""

    episodes: list[Episode]  # in the batch's order
    model: torch.nn.Module
    tokenizer: object
    step: int
    config: Config
    telling: tuple[str, ...]  # words of an observation that tell what to do, as the world names them
    metrics: dict  # the step's line of metrics.jsonl, to which a control may add


def pick_tasks(tasks: list[Task], step: int, config: Config) -> list[Task]:
    """The step's tasks: every epoch in a new order, a function of (seed, epoch) alone."""
    picked = []
    for i in range(step * config.tasks_per_step, (step + 1) * config.tasks_per_step):
        epoch, position = divmod(i, len(tasks))
        order = list(tasks)
        random.Random(f"{config.seed} {epoch}").shuffle(order)
        picked.append(order[position])
    return picked


def update(model, optimizer, batch: Batch, arm: str, step: int, config: Config) -> dict:
    """One optimizer step on a batch. -> metrics. Raises RunEnded if a loss is not finite."""
    env_weight = 0.0 if arm == "grpo" else config.env_weight  # lambda
    all_actions = max(int(batch.action_mask.sum()), 1)
    all_observations = max(int(batch.observation_mask.sum()), 1)
    clip, metrics = (config.clip_low, config.clip_high), defaultdict(float)
    for part in ranks.share([*batch.micro_batches(config.micro_batch_tokens, config.device)]):
        actions, observations = part.action_mask, part.observation_mask  # [b, t]
        action_logprobs, observation_logprobs = segment_logprobs(  # [Na], [No]
            model, part.ids, part.targets, actions, observations,
            config.logit_mb, config.temperature, config.observation_temperature,
        )  # fmt: skip
        sampler_logprobs = part.sampler_logprobs[actions]  # [Na]
        advantages = part.advantages[:, None].expand_as(actions)[actions]  # [Na]
        weights = part.action_weights[actions]  # [Na]
        policy_loss = grpo_loss(action_logprobs, sampler_logprobs, advantages, weights, *clip)
        env_loss = echo_loss(observation_logprobs, part.observation_weights[observations])
        (config.policy_weight * policy_loss + env_weight * env_loss).backward()

        log_ratio = action_logprobs.detach() - sampler_logprobs  # rounding, and weights that have moved on
        known = predictable(observation_logprobs, observations) & (part.rewards == 0)
        metrics["policy_loss"] += policy_loss.item()
        metrics["env_loss"] += env_loss.item()
        metrics["observation_ce"] -= observation_logprobs.sum().item() / all_observations
        metrics["mismatch"] += log_ratio.abs().sum().item() / all_actions
        metrics["ratio"] += log_ratio.exp().sum().item() / all_actions
        metrics["trivial_failures"] += known.sum().item() / len(batch)
    metrics = ranks.add_up(model, metrics)
    metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item()
    if not torch.tensor(list(metrics.values())).isfinite().all():
        raise RunEnded(f"step {step}: a loss or gradient is not finite: {dict(metrics)}")
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    optimizer_step(optimizer, config.learning_rate * warm, seed=config.seed * 1_000_003 + step)
    return {**metrics, "learning_share": (batch.advantages != 0).float().mean().item()}


def train_step(model, optimizer, tokenizer, world: World, arm: str, step: int, config: Config, control):
    """Rollouts, then one update on them. -> (episodes, metrics)"""
    started = time.perf_counter()
    tasks = pick_tasks(world.train, step, config)
    key = Noise.TRAINING, config.seed, step
    with ranks.whole(model):
        episodes = sample_episodes(model, tokenizer, tasks, config.group_size, config, key)
    metrics, sampled = batch_metrics(episodes), time.perf_counter()
    batch = make_batch(episodes, config)
    if control:
        valid = [episode for episode in episodes if episode.valid]
        batch = control(batch, Context(valid, model, tokenizer, step, config, world.telling, metrics))
    metrics |= update(model, optimizer, batch, arm, step, config)
    if batch.targets is not batch.ids:  # a control's: what is said of them says nothing of the terminal
        metrics["control_ce"] = metrics.pop("observation_ce")
        del metrics["trivial_failures"]
    ended = time.perf_counter()
    return episodes, metrics | {"rollout_seconds": sampled - started, "update_seconds": ended - sampled}


def train_arm(arm: str, config: Config, world: World, folder: Path, interrupted, control) -> None:
    """Train one arm from the base, or from its newest checkpoint, to the last step or until `interrupted`."""
    with checkpoint.in_turn():
        done, model, tokenizer, optimizer = checkpoint.restore(folder, arm, config)
    if done == config.steps:
        return
    examination = Examination(model, tokenizer, world, config)
    with report.metrics_log(folder / "metrics.jsonl", arm, config) as log:
        if done is None:  # nothing is saved yet
            log(0, examination.results(0))
            page.add(folder, arm, 0, examination.point)
            checkpoint.save(folder / arm, done := 0, model, tokenizer, optimizer, config)
        for step in (bar := tqdm(range(done, config.steps), arm, initial=done, disable=ranks.RANK > 0)):
            episodes, metrics = train_step(model, optimizer, tokenizer, world, arm, step, config, control)
            log(step + 1, metrics)
            last = step + 1 == config.steps
            if last or (step + 1) % config.eval_every == 0:
                log(step + 1, examination.results(step + 1))
                page.add(folder, arm, step + 1, examination.point)
                path = folder / "transcripts" / f"{arm}-{step + 1:06d}.txt"
                report.write_transcripts(path, tokenizer, episodes[:8])
            ending = any(ranks.gather([interrupted.is_set()]))  # all ranks end after the same step
            if last or (step + 1) % config.save_every == 0 or ending:
                checkpoint.save(folder / arm, step + 1, model, tokenizer, optimizer, config)
            bar.set_postfix_str(report.progress(metrics, examination.last, len(episodes)))
            if ending and not last:
                raise RunEnded(f"ended after step {step + 1}, as you asked")


def main(config: Config, folder: Path, interrupted: threading.Event | None = None, control=None) -> None:
    """Base policy, every arm, one picture. A folder that holds a part of the same run is continued.

    interrupted: set it to end after the step at work. control: an experiment's change to every batch, named
    by config.control. Raises RunEnded, or ValueError for a wrong folder.
    """
    if bool(config.control) != bool(control):
        raise ValueError(f"this run has the control {config.control!r}: python figures/controls.py --help")
    world = load_tasks(config.tasks, config.allow_network, config.seed)
    with checkpoint.only_writer(folder), enough_memory(), others_alive():
        checkpoint.claim(folder, config)
        config = on_this_machine(config)
        ranks.start(config.device)
        report.tracker_package(config)
        with checkpoint.in_turn():
            if config.makes_base and not (folder / "base").exists():
                make_base(config, world, folder / "base")
        for arm in config.arms.split(","):
            train_arm(arm, config, world, folder, interrupted or threading.Event(), control)
        records = report.read(folder / "metrics.jsonl")
        report.draw_curves(records, folder / "curves.png")
    if ranks.RANK == 0:
        print(report.seen(records, folder))


if __name__ == "__main__":
    cli.run(main, config, folder)
