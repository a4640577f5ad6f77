"""One whole training step of ours beside the same in TRL: `python figures/trl_speed.py`, 10 minutes.

A step: 64 rollouts in real bash, their rewards, the update. Both sides have the same model, tasks, limits and
terminals in the same threads (trl_echo.py is TRL's side); neither logs, saves nor evaluates. They take turns in one
process with one torch thread; ratios are taken within a round, so that other work on the machine matters less.
The learning rate is small: both policies keep sampling what the base would.
"""

import argparse
import inspect
import json
import sys
import tempfile
import threading
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

import common
import numpy as np
import torch
import trl_echo
from transformers import TrainerCallback

import train
from echo_min.config import Config
from echo_min.masking import Role
from echo_min.policy import load_policy, marker_ids
from echo_min.rollout import batch_metrics, sample_episodes
from echo_min.sampler import Sampler
from echo_min.worlds import load_world

AGENTS = {"TRL": trl_echo.Generate, "TRL, cache kept": trl_echo.GenerateOn}
OURS = "ours"


def clock() -> np.ndarray:
    """Seconds of the wall and of this process's own work on the CPU (not of the terminals' processes)."""
    return np.array([time.perf_counter(), time.process_time()])


def counts(episodes) -> dict:
    roles = {f"{role.name.lower()}_tokens": role for role in (Role.ACTION, Role.OBSERVATION)}
    tokens = {name: sum(e.transcript.count(role) for e in episodes) for name, role in roles.items()}
    return {"episodes": len(episodes), "turns": sum(e.turns for e in episodes)} | tokens


def our_step(model, tokenizer, optimizer, tasks, step: int, config: Config) -> dict:
    """What train_arm does each step, but for its logs, checkpoints and bar."""
    started = time.perf_counter()
    key = 1, config.seed, step
    episodes = sample_episodes(model, tokenizer, tasks, config.group_size, config, key)
    record = batch_metrics(episodes)
    sampled = time.perf_counter()
    record |= train.update(model, optimizer, episodes, "echo", step, config)
    return counts(episodes) | {"rollout_seconds": sampled - started, "grad_norm": record["grad_norm"]}


class Rounds(TrainerCallback):
    """Called after each of TRL's steps: measures it, prepares the next, and ends a round with a step of ours."""

    def __init__(self, sides: list[str], ours, path: Path, about: dict):
        self.sides, self.ours, self.path, self.about = sides, ours, path, about
        self.lines = []

    def on_train_begin(self, *_, **__):
        self.started = clock()

    def on_step_end(self, args, state, *_, **__):
        number, turn = divmod(state.global_step - 1, len(self.sides))
        rollouts = self.trainer.rollout_func
        grad_norm = self.trainer.grad_norm.item()
        record = {"rollout_seconds": rollouts.seconds, "grad_norm": grad_norm, **counts(rollouts.episodes)}
        self.note(number, self.sides[turn], record)
        rollouts.agent = AGENTS[self.sides[(turn + 1) % len(self.sides)]]
        if turn == len(self.sides) - 1:
            self.started = clock()
            self.note(number, OURS, self.ours(number))
        self.started = clock()

    def note(self, number: int, side: str, record: dict):
        seconds, cpu = (clock() - self.started).tolist()
        record |= {"seconds": seconds, "cpu_seconds": cpu, "update_seconds": seconds - record["rollout_seconds"]}
        assert torch.get_num_threads() == 1 and 0 < record["grad_norm"] < float("inf"), record
        if number:  # the first round warms up
            self.lines.append(self.about | {"round": number, "side": side} | record)
            with open(self.path, "a") as file:
                file.write(json.dumps(self.lines[-1]) + "\n")


def check(trainer, base: Path, prompts: list[str], config: Config) -> None:
    """The loss and the whole gradient of both sides on the same episodes, which our sampler plays in TRL."""
    noise = np.random.default_rng(0).random((len(prompts), config.max_turns * config.max_action_tokens))
    stops = set(marker_ids(trainer.processing_class))
    trainer.rollout_func.agent = lambda trainer: Sampler(trainer.model, stops, config.temperature, noise)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # as train() would set it
    batch = trainer._generate_and_score_completions([{"prompt": p} for p in prompts])
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    theirs = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    trainer.model.zero_grad()
    ce = -(trainer.logprobs * (batch["env_weights"] > 0)).sum().item() / (batch["env_weights"] > 0).sum().item()

    model, _ = load_policy(base)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.zero_grad = lambda: None  # the gradient stays to be read
    unclipped = replace(config, grad_clip=1e9)
    record = train.update(model, optimizer, trainer.rollout_func.episodes, "echo", 0, unclipped)
    ours = torch.cat([p.grad.flatten() for p in model.parameters()])
    our_loss = record["policy_loss"] + config.env_weight * record["env_loss"]
    print(
        f"the same {len(prompts)} episodes: loss {our_loss:.6f}, TRL {loss.item():.6f}; observation CE"
        f" {record['observation_ce']:.6f}, TRL {ce:.6f} nats; gradient norm {ours.norm():.5f}, TRL"
        f" {theirs.norm():.5f}, difference {((ours - theirs).norm() / ours.norm()).item():.1e} of it"
        f" (rewards that teach: {record['learning_share']:.0%})\n"
    )


def measure(config: Config, rounds: int, path: Path) -> list[dict]:
    base = common.base(config, config.seed)
    world = load_world(config.tasks.removeprefix("world:"))
    sides = list(AGENTS) if config.max_turns > 1 else list(AGENTS)[:1]  # one turn leaves nothing to keep
    rows = [train.pick_tasks(world.train, step, config) for step in range(rounds + 1)]  # one more to warm up
    prompts = [task.instruction for row in rows for _ in sides for task in row]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_echo.trl_trainer(base, prompts, trl_echo.Rollouts(world.train, config), config, folder)
        check(trainer, base, [task.instruction for task in rows[0] for _ in range(config.group_size)], config)
        trainer.rollout_func.agent = AGENTS[sides[0]]
        model, tokenizer = load_policy(base)
        betas = config.beta1, config.beta2
        optimizer = torch.optim.AdamW(model.parameters(), betas=betas, weight_decay=config.weight_decay)
        step = lambda n: our_step(model, tokenizer, optimizer, rows[n], n, config)  # noqa: E731
        callback = Rounds(sides, step, path, {"world": config.tasks, "max_turns": config.max_turns})
        callback.trainer = trainer
        trainer.add_callback(callback)
        trainer.train()
    return callback.lines


def shown(values: list[float], digits: int = 2) -> str:
    return f"{median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def table(lines: list[dict]) -> None:
    print(
        "| turns | side | s a step | rollout | update | / ours, by the clock | / ours, CPU time | sampled tokens"
        " | observed tokens |\n|--:|---|--:|--:|--:|--:|--:|--:|--:|"
    )
    for turns in sorted({line["max_turns"] for line in lines}, reverse=True):
        for side in (OURS, *AGENTS):
            mine = common.pick(lines, max_turns=turns, side=side)
            ours = common.pick(lines, max_turns=turns, side=OURS)
            if not mine:
                continue
            values = [[line[f"{part}seconds"] for line in mine] for part in ("", "rollout_", "update_")]
            for unit in "seconds", "cpu_seconds":
                values.append([a[unit] / b[unit] for a, b in zip(mine, ours, strict=True)])
            tokens = (f"{median(line[f'{r}_tokens'] for line in mine):.0f}" for r in ("action", "observation"))
            print("|", " | ".join([str(turns), side, *map(shown, values), *tokens]), "|")
    print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    path = common.DATA / "trl_speed.jsonl"
    path.write_text("")
    sizes = {"base_demonstrations": 400, "base_steps": 150}
    for turns in 3, 1:
        table(measure(Config(device="cpu", learning_rate=1e-6, max_turns=turns, **sizes), rounds, path))
