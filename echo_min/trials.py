"""The trials of an evaluation: kept in --out as they end, and what they say together."""

import json
from argparse import Namespace
from collections import Counter, namedtuple
from math import isnan
from pathlib import Path
from statistics import fmean

from echo_min import checkpoint, report
from echo_min.config import Config, RunEnded
from echo_min.masking import Role
from echo_min.rollout import Episode, StopReason

# Of trials.jsonl. member: a sampled one's number, "greedy", or the agent that was checked; reward: null where
# the infrastructure failed.
COLUMNS = "task member reward stop turns action_tokens observation_tokens observation_nats seconds error"
Trial = namedtuple("Trial", COLUMNS)


def trial(episode: Episode, member: int | str, logprobs: dict[int, float]) -> Trial:
    """logprobs: of its observations, by position."""
    reward, count = None if isnan(episode.reward) else episode.reward, episode.transcript.count
    counts = count(Role.ACTION), count(Role.OBSERVATION), -sum(logprobs.values())
    ended = str(episode.stop), episode.turns, *counts, episode.seconds, episode.error
    return Trial(episode.task.name, member, reward, *ended)


def keep(out: Path, ended: Trial, text: str, verifier_output: str) -> None:
    """Write a trial down, its transcript, and what its verifier printed."""
    path = out / "transcripts" / f"{ended.task}-{ended.member}.txt"
    path.write_text(report.printable(text))
    if verifier_output:
        path.with_suffix(".verifier.txt").write_text(report.printable(verifier_output))
    report.log(out / "trials.jsonl", ended._asdict())


def kept_trials(args: Namespace, config: Config, checkpoint_folder: Path | None) -> list[Trial]:
    """What --out holds of an interrupted evaluation, without the trials in which the infrastructure failed.
    Raises ValueError if it holds another evaluation, or a file that can't be read."""
    now = {name: str(getattr(args, name)) for name in ("agent", "tasks", "allow_network")}
    now |= {"checkpoint": str(checkpoint_folder)} if checkpoint_folder else {}
    counted = "seed backend temperature max_turns harness context max_action_tokens output_chars dtype"
    now |= {name: getattr(config, name) for name in counted.split()}
    path = args.out / "settings.json"
    try:
        old = dict(json.loads(path.read_bytes())) if path.exists() else now
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not the settings of an evaluation ({error}): pass a new --out") from None
    if changed := [name for name in now | old if old.get(name) != now.get(name)]:
        raise ValueError(f"{path}: an evaluation with another {', '.join(changed)}: pass a new --out")
    (args.out / "transcripts").mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(now, indent=1) + "\n")
    path.with_suffix(".tmp").replace(path)
    graded = checkpoint.truncate_metrics(args.out / "trials.jsonl", lambda t: Trial(**t).reward is not None)
    return [Trial(**record) for record in graded]


def summary(trials: list[Trial], k: int, tasks: int) -> list[str]:
    """What was measured, a line each. tasks: how many were to be played."""
    sampled = [t for t in trials if t.member != "greedy"]
    graded = [t for t in sampled if t.reward is not None]
    greedy = [t for t in trials if t.member == "greedy" and t.reward is not None]
    rows = {}
    if errors := [t.error for t in trials if t.reward is None]:
        rows["infra errors"] = f"{len(errors)} of {len(trials)} trials, in no rate: {errors[0]}"
    if not graded:
        raise RunEnded(f"no trial could be graded: {errors[0]}")
    for name, some, of in (("1 sampled", graded, 1), (f"{k} sampled", graded, k), ("1 greedy", greedy, 1)):
        if some:
            rows[f"pass@{name}"] = pass_rate(some, of, tasks)
    stops = Counter(t.stop for t in sampled)
    rows["stops"] = ", ".join(f"{reason} {stops[reason] / len(sampled):.1%}" for reason in StopReason)
    for name in ("reward", "turns", "action_tokens", "observation_tokens", "seconds"):
        rows[f"mean {name.replace('_', ' ')}"] = f"{fmean(getattr(t, name) for t in graded):.3f}"
    if tokens := sum(t.observation_tokens for t in graded):
        nats = sum(t.observation_nats for t in graded)
        rows["observation CE"] = f"{nats / tokens:.3f} nats/token (own episodes)"
    return [f"{name:25}{text}" for name, text in rows.items()]


def soundness(trials: list[Trial]) -> list[str]:
    """A task is sound if its own solution earns the whole reward, and nothing at all none of it."""
    found: dict[str, dict] = {}
    for t in sorted(trials, key=lambda t: (t.task, t.member == "noop")):
        found.setdefault(t.task, {})[t.member] = t
    lines = []
    for task, by in found.items():
        got = {name: t.error if t.reward is None else f"{t.reward:g}" for name, t in by.items()}
        why = ", ".join(f"{name} {text}" for name, text in got.items())
        lines += [f"sound    {task}" if got == {"oracle": "1", "noop": "0"} else f"UNSOUND  {task}: {why}"]
    return [*lines, f"{sum(line.startswith('sound') for line in lines)} of {len(lines)} tasks are sound"]


def pass_rate(graded: list[Trial], k: int, tasks: int) -> str:
    """pass@k of the tasks with at least k graded trials. Passed is a reward of at least 1."""
    counts = {task: n for task, n in Counter(t.task for t in graded).items() if n >= k}
    passed = Counter(t.task for t in graded if t.reward >= 1)
    over = f"over {len(counts)} of {tasks} tasks, {sum(counts.values())} trials"
    if not counts:
        return over
    rates = [report.pass_at_k(passed[task], n, k) for task, n in counts.items()]
    mean, low, high = report.rate_interval(rates, sum(n // k for n in counts.values()))
    return f"{mean:.3f} [{low:.3f}, {high:.3f}] {over}"
