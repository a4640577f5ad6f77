"""One whole training step of ours beside the same in TRL: `python figures/trl_speed.py`, 10 minutes.

A step: 64 rollouts in real bash, their rewards, the update. Both sides have the same model, tasks, limits and
terminals in the same threads (trl_echo.py is TRL's side); neither logs, saves nor evaluates. They take turns
in one process with one torch thread; ratios are taken within a round, so that other work on the machine
matters less. The learning rate is small: both policies go on sampling what the base would. "terminals alone"
replays our rollouts' commands without a model: what no trainer can save.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import common
import numpy as np
import stats
import torch
import trl_echo
from transformers import PrinterCallback, TrainerCallback

import train
from echo_min.batch import make_batch
from echo_min.checkpoint import load_policy
from echo_min.config import Config
from echo_min.masking import Role
from echo_min.optimizer import make_optimizer
from echo_min.policy import marker_ids
from echo_min.rollout import Episode, Noise, batch_metrics, rollout, sample_episodes
from echo_min.sampler import Sampler
from echo_min.sft import Script

AGENTS = {"TRL": trl_echo.Generate, "TRL, cache kept": trl_echo.GenerateOn}
OURS, FLOOR = "ours", "terminals alone"
SETTINGS = {"device": "cpu", "learning_rate": 1e-6, "base_demonstrations": 400, "base_steps": 150}


def clock() -> np.ndarray:
    """Seconds of the wall, and of this process's own work on the CPU (not of the terminals' processes)."""
    return np.array([time.perf_counter(), time.process_time()])


def counts(episodes: list[Episode]) -> dict:
    roles = {"action_tokens": Role.ACTION, "observation_tokens": Role.OBSERVATION}
    tokens = {name: sum(e.transcript.count(role) for e in episodes) for name, role in roles.items()}
    valid = sum(e.valid for e in episodes)
    return {"episodes": len(episodes), "valid": valid, "turns": sum(e.turns for e in episodes)} | tokens


class Ours:
    """What train_arm does each step, but for its logs, checkpoints and bar."""

    def __init__(self, base: str, tasks: list, config: Config):
        self.model, self.tokenizer = load_policy(base)
        self.tasks, self.config = tasks, config  # tasks: a list a step
        self.optimizer = make_optimizer(self.model, config)

    def step(self, n: int) -> dict:
        started, config, policy = clock(), self.config, (self.model, self.tokenizer)
        key = Noise.TRAINING, config.seed, n
        self.episodes = sample_episodes(*policy, self.tasks[n], config.group_size, config, key)
        record = batch_metrics(self.episodes)
        sampled = clock()
        batch = make_batch(self.episodes, config)
        record |= train.update(self.model, self.optimizer, batch, "echo", n, config)
        return counts(self.episodes) | {"rollout": sampled - started, "grad_norm": record["grad_norm"]}

    def replay(self) -> dict:
        started, again = clock(), [Episode(e.task, e.group) for e in self.episodes]
        script = Script(self.tokenizer, [e.commands for e in self.episodes])
        rollout(script, self.tokenizer, again, self.config)
        return counts(again) | {"rollout": clock() - started}


class Rounds(TrainerCallback):
    """Called after each of TRL's steps: measures it, and ends a round with a step of ours."""

    def __init__(self, trainer, ours: Ours, sides: list[str], path: Path, about: dict):
        self.trainer, self.ours, self.sides, self.path, self.about = trainer, ours, sides, path, about
        self.lines, self.rollouts, trainer.rollout_func = [], trainer.rollout_func, self.timed

    def timed(self, prompts: list[str], trainer) -> dict:
        started = clock()
        result = self.rollouts(prompts, trainer)
        self.spent = clock() - started
        return result

    def on_train_begin(self, *_, **__):
        self.started = clock()

    def on_step_end(self, args, state, *_, **__):
        number, turn = divmod(state.global_step - 1, len(self.sides))
        record = {"rollout": self.spent, "grad_norm": self.trainer.grad_norm.item()}
        self.note(number, self.sides[turn], record | counts(self.rollouts.episodes))
        self.rollouts.agent = AGENTS[self.sides[(turn + 1) % len(self.sides)]]
        if turn == len(self.sides) - 1:
            self.started = clock()
            self.note(number, OURS, self.ours.step(number))
            self.started = clock()
            self.note(number, FLOOR, self.ours.replay())
        self.started = clock()

    def note(self, number: int, side: str, record: dict):
        step = clock() - self.started
        rollout = record.pop("rollout")
        for part, spent in {"step": step, "rollout": rollout, "update": step - rollout}.items():
            record[f"{part}_seconds"], record[f"{part}_cpu"] = spent.round(4).tolist()
        assert torch.get_num_threads() == 1 and 0 < record.get("grad_norm", 1) < float("inf"), record
        if number:  # the first round warms up
            self.lines.append(self.about | {"round": number, "side": side} | record)
            with open(self.path, "a") as file:
                file.write(json.dumps(self.lines[-1]) + "\n")


def check(trainer, base: str, prompts: list[str], config: Config) -> None:
    """Print loss and gradient of both sides on the same episodes, which our sampler plays inside of TRL."""
    noise = [np.random.default_rng(row) for row in range(len(prompts))]
    stops = set(marker_ids(trainer.processing_class))
    trainer.rollout_func.agent = lambda trainer: Sampler(trainer.model, stops, config, noise)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # as train() will set it
    batch = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    theirs = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    trainer.model.zero_grad()
    ce = -trainer.logprobs[batch["env_weights"] > 0].mean().item()

    model, _ = load_policy(base)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.zero_grad = lambda: None  # the gradient stays to be read
    unclipped = replace(config, grad_clip=1e9)
    batch = make_batch(trainer.rollout_func.episodes, config)
    record = train.update(model, optimizer, batch, "echo", 0, unclipped)
    ours = torch.cat([p.grad.flatten() for p in model.parameters()])
    our_loss = record["policy_loss"] + config.env_weight * record["env_loss"]
    print(
        f"\n{config.max_turns} turns, the same {len(prompts)} episodes, ours and TRL: loss {our_loss:.6f},"
        f" {loss.item():.6f}; observation CE {record['observation_ce']:.6f}, {ce:.6f} nats; gradient norm"
        f" {ours.norm():.6f}, {theirs.norm():.6f}; difference / norm"
        f" {((ours - theirs).norm() / ours.norm()).item():.1e}; episodes in groups whose rewards differ"
        f" {record['learning_share']:.0%}\n"
    )


def measure(config: Config, rounds: int, path: Path) -> list[dict]:
    base, world = common.from_base(config).model, common.world_of(config)
    sides = list(AGENTS) if config.max_turns > 1 else ["TRL"]  # one turn leaves nothing to keep
    tasks = [train.pick_tasks(world.train, step, config) for step in range(rounds + 1)]  # one more to warm up
    prompts = [task.instruction for row in tasks for _ in sides for task in row]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_echo.trl_trainer(base, prompts, world.train, config, folder)
        check(trainer, base, [t.instruction for t in tasks[0] for _ in range(config.group_size)], config)
        trainer.rollout_func.agent = AGENTS[sides[0]]
        about = {"world": config.tasks, "max_turns": config.max_turns}
        callback = Rounds(trainer, Ours(base, tasks, config), sides, path, about)
        trainer.add_callback(callback)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return callback.lines


def shown(values: list[float]) -> str:
    return f"{median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def table(lines: list[dict]) -> None:
    """Medians and ranges; a ratio is to our step (or its rollouts, or its update) of the same round."""
    ratios = ["step_seconds", "rollout_seconds", "update_seconds", "step_cpu", "update_cpu"]
    named = " | ".join(f"{ratio.replace('_', ' ')} / ours" for ratio in ratios)
    print(f"| turns | side | step, s | rollout | update | {named} | sampled tokens | observed tokens |")
    print("|--:|---|" + 10 * "--:|")
    for side in (OURS, *AGENTS, FLOOR):
        mine, ours = (stats.pick(lines, side=s) for s in (side, OURS))
        if mine:
            values = [[line[key] for line in mine] for key in ratios[:3]]
            values += [[a[key] / b[key] for a, b in zip(mine, ours, strict=True)] for key in ratios]
            tokens = [f"{median(x[f'{r}_tokens'] for x in mine):.0f}" for r in ("action", "observation")]
            print("|", " | ".join([str(mine[0]["max_turns"]), side, *map(shown, values), *tokens]), "|")
    step = {s: [x["step_seconds"] for x in stats.pick(lines, side=s)] for s in (OURS, "TRL", FLOOR)}
    rounds = list(zip(*step.values(), strict=True))
    apart = [[(t - floor) / (o - floor) for o, t, floor in rounds], [t / floor for _, t, floor in rounds]]
    print(f"\nTRL / ours, both without what the terminals take: {shown(apart[0])}")
    print(f"TRL / terminals alone, which no trainer can exceed: {shown(apart[1])}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=12)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    path = common.DATA / "trl_speed.jsonl"
    path.unlink(missing_ok=True)
    for turns in 3, 1:
        table(measure(Config(max_turns=turns, **SETTINGS), rounds, path))
