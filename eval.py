"""How good is a policy? pass@1 and pass@k, stop reasons, observation CE, and transcripts shaded by surprise.

python eval.py runs/tiny/echo --tasks world:tool -k 5 --show 3
"""

import argparse
import random
import sys
from dataclasses import replace
from math import isnan
from pathlib import Path

import torch

from echo_min import checkpoint, report
from echo_min.config import Config, RunStopped
from echo_min.masking import Role, Transcript, observation_targets, pad
from echo_min.policy import load_policy, on_this_machine, segment_logprobs
from echo_min.rollout import Episode, StopReason, sample_episodes
from echo_min.sft import record
from echo_min.tasks import Task, World
from echo_min.worlds import load_world


@torch.no_grad()
def observation_logprobs(model, transcripts: list[Transcript]) -> list[dict[int, float]]:
    """-> for each transcript: position of an observation token -> its log-probability, nats."""
    out = []
    for start in range(0, len(transcripts), 64):
        ids, roles, _ = pad(transcripts[start : start + 64])
        observations = observation_targets(roles)
        ids = ids.to(model.device)
        _, logps = segment_logprobs(model, ids, ids, torch.zeros_like(observations), observations)
        rows = [{} for _ in ids]
        for (b, t), logp in zip(observations.nonzero().tolist(), logps.tolist(), strict=True):
            rows[b][t] = logp
        out += rows
    return out


def observation_ce(model, transcripts: list[Transcript]) -> float:
    """Mean cross-entropy of all observation tokens, nats per token; nan if there are none."""
    logps = [logp for row in observation_logprobs(model, transcripts) for logp in row.values()]
    return -sum(logps) / len(logps) if logps else float("nan")


def expert_transcripts(tokenizer, world: World, config: Config) -> list[Transcript]:
    """The scripted expert on the held-out tasks: trajectories of a stronger policy, never trained on."""
    rng = random.Random("expert")
    scripts = [(task, world.expert(task, rng)) for task in world.held_out[: config.eval_tasks]]
    return [e.transcript for e in record(tokenizer, scripts, config)]


def evaluate(
    model, tokenizer, tasks: list[Task], expert: list[Transcript], config: Config, step: int
) -> dict:
    """One sampled and one greedy rollout of each task, and observation CE on the expert's trajectories."""
    result = {"expert_ce": observation_ce(model, expert)}
    for name, key in (("pass_rate", (2, config.seed, step)), ("pass_rate_greedy", None)):
        rewards = graded(sample_episodes(model, tokenizer, tasks, 1, config, key))
        result |= {name: sum(rewards) / len(rewards), "eval_tasks": len(rewards)}
    return result


def graded(episodes: list[Episode]) -> list[float]:
    """The rewards without the infrastructure's failures. Raises RunStopped if nothing else is left."""
    rewards = [e.reward for e in episodes if not isnan(e.reward)]
    if not rewards:
        raise RunStopped(f"no episode could be graded: {episodes[0].error}")
    return rewards


def cli(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or an arm's folder: its newest one")
    parser.add_argument("--tasks", default="world:tool", help="world:NAME (its held-out tasks)")
    parser.add_argument("-k", type=int, default=1, help="sampled rollouts per task")
    parser.add_argument("--limit", type=int, default=200, help="tasks at most")
    parser.add_argument("--temperature", type=float, help="sampling temperature [as trained]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N transcripts in colour")
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError, RunStopped, KeyboardInterrupt) as error:
        sys.exit(f"eval.py: {str(error) or 'interrupted'}")


def run(args: argparse.Namespace) -> None:
    if min(args.k, args.limit) < 1:
        raise ValueError("-k and --limit must be at least 1")
    folder = found[1] if (found := checkpoint.latest(args.checkpoint)) else args.checkpoint
    settings = folder / "echo_min.json"
    config = on_this_machine(Config.load(settings) if settings.exists() else Config())
    if args.temperature is not None:
        config = replace(config, temperature=args.temperature)
    model, tokenizer = load_policy(folder, config.device)
    tasks = load_world(args.tasks.removeprefix("world:")).held_out[: args.limit]
    episodes = sample_episodes(model, tokenizer, tasks, args.k, config, (3, args.seed))
    summarise(episodes, sample_episodes(model, tokenizer, tasks, 1, config, None), args.k)
    ce = observation_ce(model, [e.transcript for e in episodes])
    print(f"observation CE   {ce:.3f} nats/token (own episodes)")
    shown = episodes[: args.show]
    for episode, logps in zip(shown, observation_logprobs(model, [e.transcript for e in shown]), strict=True):
        tokens = report.tokens_with_surprise(tokenizer, episode.transcript, logps)
        print(f"\n--- {episode.task.name}: reward {episode.reward:g}, {episode.stop}\n{report.ansi(tokens)}")


def summarise(episodes: list[Episode], greedy: list[Episode], k: int) -> None:
    """Print what was measured; infrastructure errors are counted apart and are in no rate."""
    by_task: dict[str, list[float]] = {}
    for e in episodes:
        if not isnan(e.reward):
            by_task.setdefault(e.task.name, []).append(e.reward)
    graded(episodes)
    full = [rewards for rewards in by_task.values() if len(rewards) == k]
    mean, half = report.mean_interval([sum(r) / len(r) for r in by_task.values()])
    print(f"pass@1 sampled   {mean:.3f} +- {half:.3f}   ({len(by_task)} tasks x {k})")
    passes = {f"pass@{k} sampled": [max(r) for r in full]} if k > 1 and full else {}
    for name, passed in (passes | {"pass@1 greedy": graded(greedy)}).items():
        low, high = report.wilson_interval(int(sum(passed)), len(passed))
        print(f"{name:16} {sum(passed) / len(passed):.3f} [{low:.3f}, {high:.3f}]")
    n = len(episodes)
    stops = ", ".join(f"{reason} {sum(e.stop is reason for e in episodes) / n:.1%}" for reason in StopReason)
    print(f"stops            {stops}")
    print(f"turns            {sum(e.turns for e in episodes) / n:.2f}")
    for role in (Role.ACTION, Role.OBSERVATION):
        print(f"{role.name.lower() + ' tokens':18} {sum(e.transcript.count(role) for e in episodes) / n:.1f}")


if __name__ == "__main__":
    cli()
