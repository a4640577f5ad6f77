"""GRPO and ECHO on terminal tasks, top to bottom. `python train.py --help` lists every setting.

    for each step:
        a group of rollouts for each of a few tasks           rollout.py: policy <-> terminal, reward 0 or 1
        advantage = (reward - group mean) / group std         grpo.py
        who wrote which token -> each token's weight          masking.py
        one forward pass -> logprobs of both segments         kernels/segment_logprob.py
        loss = GRPO(actions) + env_weight * CE(observations)  grpo.py, echo.py
        one optimizer step

Not here, as in the paper: KL, reference model, critic, entropy bonus, a second update a batch.
"""

import random
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

from echo_min import checkpoint, report
from echo_min.config import Config, RunEnded, parse_args
from echo_min.echo import echo_loss, exchanged_targets, permuted_targets
from echo_min.estimate import report as estimate_report
from echo_min.grpo import group_advantages, grpo_loss
from echo_min.masking import (
    Role,
    micro_batches,
    observation_targets,
    observation_weights,
    pad,
    policy_weights,
)
from echo_min.optimizer import make_optimizer, optimizer_step
from echo_min.policy import enough_memory, load_policy, on_this_machine, segment_logprobs
from echo_min.rollout import Episode, batch_metrics, sample_episodes
from echo_min.sft import make_base
from echo_min.tasks import Task, World
from echo_min.worlds.registry import load_tasks
from eval import evaluate, expert_transcripts

TRIVIAL = 0.1  # nats per token: output that the policy knew beforehand


def pick_tasks(tasks: list[Task], step: int, config: Config) -> list[Task]:
    """The step's tasks: every epoch in a new order, a function of (seed, epoch) alone."""
    first, picked = step * config.tasks_per_step, []
    for i in range(first, first + config.tasks_per_step):
        epoch, position = divmod(i, len(tasks))
        order = list(range(len(tasks)))
        random.Random(f"{config.seed} {epoch}").shuffle(order)
        picked.append(tasks[order[position]])
    return picked


def update(model, optimizer, episodes: list[Episode], arm: str, step: int, config: Config, words=()) -> dict:
    """One optimizer step on a batch of episodes. -> metrics. words: ids that arm placebo_words exchanges.

    Raises RunEnded if a loss is not finite.
    """
    episodes = [e for e in episodes if e.valid]
    groups = torch.tensor([e.group for e in episodes])  # [B]
    rewards = torch.tensor([e.reward for e in episodes])  # [B]
    advantages = group_advantages(rewards, groups)  # [B]
    ids, roles, old_logprobs = pad([e.transcript for e in episodes])  # [B, T]
    actions = roles == Role.ACTION  # [B, T]
    observations = observation_targets(roles, config.warnings_as_targets)  # [B, T]
    # weights hold each term's normaliser over the whole batch, so micro-batches simply add up
    action_weights = policy_weights(roles, groups, config.policy_norm)  # [B, T]
    env_weights = observation_weights(roles, config.observation_norm, config.warnings_as_targets)  # [B, T]
    env_weight = 0.0 if arm == "grpo" else config.env_weight
    if config.parsed_only:
        observations &= ~(roles == Role.WARNING).any(1, keepdim=True)
    targets, generator = ids, torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    if arm == "placebo":
        targets = permuted_targets(ids, observations, generator)
    elif arm == "placebo_words":
        targets = permuted_targets(ids, observations & torch.isin(ids, torch.tensor(words)), generator)
    elif arm == "placebo_outputs":
        targets, observations = exchanged_targets(ids, observations, generator)

    per_token = (ids, targets, actions, observations, action_weights, env_weights, old_logprobs)
    whole = (*per_token, advantages[:, None].expand_as(ids))
    keys = "policy_loss", "env_loss", "observation_ce", "mismatch", "ratio", "trivial_failures"
    total = dict.fromkeys(keys, 0.0)
    n_actions, n_observations = (max(int(mask.sum()), 1) for mask in (actions, observations))
    for rows in micro_batches([len(e.transcript) for e in episodes], config.micro_batch_tokens):
        T = max(len(episodes[row].transcript) for row in rows)
        # ids, targets, both masks, both weights, old logprobs, advantages: each [rows, T]
        i, y, a, o, w_a, w_o, old, adv = (x[rows, :T].to(config.device) for x in whole)
        head = config.temperature, config.observation_temperature, config.logit_mb
        logp_action, logp_observation = segment_logprobs(model, i, y, a, o, *head)  # [Na], [No]
        policy_loss = grpo_loss(logp_action, old[a], adv[a], w_a[a], config.clip_low, config.clip_high)
        env_loss = echo_loss(logp_observation, w_o[o])
        (config.policy_weight * policy_loss + env_weight * env_loss).backward()

        change = logp_action.detach() - old[a]
        total["policy_loss"] += policy_loss.item()
        total["env_loss"] += env_loss.item()
        total["observation_ce"] -= logp_observation.sum().item() / n_observations
        total["mismatch"] += change.abs().sum().item() / n_actions
        total["ratio"] += change.exp().sum().item() / n_actions
        ce = torch.zeros_like(y, dtype=torch.float32).masked_scatter(o, -logp_observation.detach())
        trivial = (ce.sum(1) < TRIVIAL * o.sum(1)) & (rewards[rows].to(o.device) == 0)  # [rows]
        total["trivial_failures"] += trivial.sum().item() / len(episodes)

    total["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item()
    if not torch.tensor(list(total.values())).isfinite().all():
        raise RunEnded(f"step {step}: a loss or gradient is not finite: {total}")
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    optimizer_step(optimizer, config.learning_rate * warm, seed=config.seed * 1_000_003 + step)
    return total | {"learning_share": (advantages != 0).float().mean().item()}


def train_arm(arm: str, config: Config, world: World, folder: Path, stop: threading.Event, track) -> None:
    """Train one arm from the base, or from its newest checkpoint, to the last step or until `stop` is set.
    track: called with each line of metrics."""
    metrics = folder / "metrics.jsonl"
    found = checkpoint.latest(folder / arm)
    first, path = found or (-1, folder / "base" if config.makes_base else config.model)
    model, tokenizer = load_policy(path, config.device, config.dtype, config.gradient_checkpointing)
    optimizer = make_optimizer(model, config)
    if found:
        checkpoint.restore_optimizer(path, optimizer)
    checkpoint.truncate_metrics(metrics, lambda r: r.get("arm") != arm or r["step"] <= first)
    if first == config.steps:
        return
    history = [r for r in report.read(metrics) if r.get("arm") == arm and "reward" in r]
    expert = expert_transcripts(tokenizer, world, config)
    held_out = world.held_out[: config.eval_tasks]
    words = [i for word in world.decisive for form in (word, f" {word}") for i in tokenizer.encode(form)]
    last = {}

    def measure(step: int) -> None:
        with enough_memory("rollout"):
            last.update(evaluate(model, tokenizer, held_out, expert, config, step))
        report.log(metrics, {"arm": arm, "step": step, **last}, track)

    if first == -1:  # nothing is saved yet
        measure(0)
        checkpoint.save(folder / arm, first := 0, model, tokenizer, optimizer, config)
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, desc=arm, unit="step")
    for step in bar:
        started = time.perf_counter()
        tasks = pick_tasks(world.train, step, config)
        with enough_memory("rollout"):
            key = 1, config.seed, step
            episodes = sample_episodes(model, tokenizer, tasks, config.group_size, config, key)
        record = batch_metrics(episodes)
        sampled = time.perf_counter()
        with enough_memory("update"):
            record |= update(model, optimizer, episodes, arm, step, config, words)
        ended = time.perf_counter()
        record |= {"rollout_seconds": sampled - started, "update_seconds": ended - sampled}
        history.append(record)
        if alarm := report.collapse_alarm(history):
            record["alarm"] = alarm
            tqdm.write(f"warning, {arm}, step {step + 1}: {alarm}", file=sys.stderr)
        report.log(metrics, {"arm": arm, "step": step + 1, **record}, track)
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            measure(step + 1)
            report.write_transcripts(
                folder / "transcripts" / f"{arm}-{step + 1:06d}.txt", tokenizer, episodes[:8]
            )
        stopping = stop.is_set() and step + 1 < config.steps
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps or stopping:
            checkpoint.save(folder / arm, step + 1, model, tokenizer, optimizer, config)
        bar.set_postfix_str(
            f"pass {last.get('pass_rate', 0):.2f}, reward {record['reward']:.2f}, "
            f"CE {record['observation_ce']:.2f}, {len(episodes) / (ended - started):.0f} rollouts/s"
        )
        if stopping:
            raise RunEnded(f"stopped after step {step + 1}, as you asked")


def main(config: Config, folder: Path, stop: threading.Event | None = None) -> None:
    """Base policy, every arm, one picture. A folder that holds a part of the same run is continued.

    stop: set it to end after the step at work. Raises RunEnded, or ValueError for a wrong folder.
    """
    world = load_tasks(config.tasks, config.allow_network)
    with checkpoint.only_writer(folder):
        config.claim(folder)
        config = on_this_machine(config)
        report.tracker_package(config)
        if config.makes_base and not (folder / "base").exists():
            make_base(config, world, folder / "base")
        for arm in config.arms.split(","):
            with report.tracker(config, arm) as track:
                train_arm(arm, config, world, folder, stop or threading.Event(), track)
        report.draw_curves(report.read(folder / "metrics.jsonl"), folder / "curves.png")
    print(f"{folder}: curves.png, metrics.jsonl, transcripts/ and a checkpoint of each arm")


def cli(argv: list[str] | None = None) -> None:
    config, folder, estimate = parse_args(argv)
    stop = threading.Event()

    def on_interrupt(*_) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nends after this step; Ctrl-C once more ends now", file=sys.stderr)

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        if estimate:
            return print(estimate_report(config))
        main(config, folder, stop)
    except (ValueError, OSError, RunEnded, KeyboardInterrupt) as error:
        hint = f"\nWhat is saved stays: python train.py --resume {folder}"
        saved = any(checkpoint.latest(arm) for arm in folder.glob("*")) or (folder / "base").exists()
        saved |= isinstance(error, RunEnded) and (folder / "config.json").exists()  # to be edited
        sys.exit(f"train.py: {str(error) or 'interrupted'}{hint if saved else ''}")
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    cli()
