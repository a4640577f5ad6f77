"""How good is a policy? pass@1 and pass@k, stop reasons, observation CE, and transcripts shaded by surprise.

python eval.py runs/tiny/echo --tasks world:tool -k 5 --show 3
python eval.py runs/tiny/echo --tasks FOLDER --backend docker -k 5 --out runs/eval
python eval.py --agent oracle --tasks FOLDER --backend docker
"""

from echo_min.cli import eval_args

if __name__ == "__main__":  # before torch, which takes seconds to load
    eval_args(__doc__)

import json
import sys
import time
from argparse import Namespace
from collections import Counter, namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import isnan
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from echo_min import checkpoint, page, report
from echo_min.config import Config, RunEnded
from echo_min.evaluate import observation_logprobs
from echo_min.machine import enough_memory, on_this_machine
from echo_min.masking import Role
from echo_min.presets import PRESETS
from echo_min.rollout import Episode, Noise, StopReason, sample_episodes
from echo_min.tasks import Task
from echo_min.terminal import TerminalDied, open_terminal
from echo_min.worlds.harbor import harbor_tasks
from echo_min.worlds.registry import load_tasks

# Of trials.jsonl. member: a sampled one's number, or "greedy"; reward: null where the infrastructure failed.
COLUMNS = "task member reward stop turns action_tokens observation_tokens observation_nats seconds error"
Trial = namedtuple("Trial", COLUMNS)


def cli(argv: list[str] | None = None) -> None:
    args = eval_args(__doc__, argv)
    try:
        run(args)
    except (ValueError, OSError, RunEnded, KeyboardInterrupt) as error:
        sys.exit(f"eval.py: {str(error) or 'interrupted'}")


def run(args: Namespace) -> None:
    if args.html and not args.checkpoint:
        raise ValueError("--html shows what surprises a policy: name a checkpoint")
    config, folder = settings(args)
    tasks, chosen = load(args, config)
    trials, shown, points = kept_trials(args, config, folder) if args.out else [], [], []
    have = {(t.task, t.member) for t in trials}
    greedy = ["greedy"] if folder and args.tasks.startswith("world:") else []
    rows = [(i, m) for m in [*range(args.k), *greedy] for i in chosen if (tasks[i].name, m) not in have]
    if args.html:
        if not rows:
            has = f"{args.out} holds them all"
            raise ValueError(f"--html shows trials as they are played; {has}: remove --out")
        args.html.parent.mkdir(parents=True, exist_ok=True)
    policy = checkpoint.load_policy(folder, config.device, config.dtype) if folder and rows else (None, None)
    played = play(*policy, tasks, rows, args, config)
    for (_, member), e, text, logprobs in tqdm(played, args.agent, len(rows), disable=None, unit="trial"):
        tokens = report.tokens_with_surprise(policy[1], e.transcript, logprobs)
        reward, count = None if isnan(e.reward) else e.reward, e.transcript.count
        counts = count(Role.ACTION), count(Role.OBSERVATION), -sum(logprobs.values())
        trials.append(Trial(e.task.name, member, reward, str(e.stop), e.turns, *counts, e.seconds, e.error))
        if args.out:
            path = args.out / "transcripts" / f"{e.task.name}-{member}.txt"
            path.write_text(report.printable(text))
            report.log(args.out / "trials.jsonl", trials[-1]._asdict())
        if tokens and len(shown) < args.show:
            shown.append(f"\n--- {e.task.name}: reward {e.reward:g}, {e.stop}\n{report.ansi(tokens)}")
        if args.html and len(points) < 20:
            points.append(page.point(e, tokens, arm="policy", step=len(points), member=member))
            page.write(args.html, f"{folder}, {args.tasks}", points)
    names = {tasks[i].name for i in chosen}  # --out may hold more
    print(*summary([t for t in trials if t.task in names], args.k, len(names)), sep="\n")
    print(*[f"\n{report.LEGEND}"] * bool(shown), *shown, sep="\n")


def settings(args: Namespace) -> tuple[Config, Path | None]:
    """-> settings to play under, whose `tasks` are those that the policy was trained on; its folder."""
    config, folder = Config(), args.checkpoint
    if folder:
        folder = found[1] if (found := checkpoint.latest(folder)) else folder
        saved = folder / "echo_min.json"
        if saved.exists() and args.preset:
            raise ValueError(f"{folder} has settings of its own: remove --preset")
        if args.preset:  # trained on nothing that is here
            config = Config(**PRESETS[args.preset] | {"tasks": "world:"})
        elif saved.exists():
            config = Config.load(saved)
        else:
            lacks = f"{folder}: no echo_min.json says how to prompt it and what fits its context"
            raise ValueError(f"{lacks}; pass --preset, one of {', '.join(PRESETS)}")
        config = on_this_machine(replace(config, device="auto"))
    args.tasks = args.tasks or PRESETS.get(args.preset, {}).get("tasks") or config.tasks
    names = "backend", "terminals", "temperature", "max_turns", "seed"
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return replace(config, **({"terminals": 4} if args.backend == "docker" else {}) | given), folder


def load(args: Namespace, config: Config) -> tuple[list[Task], list[int]]:
    """-> tasks, and which of them to play: of a folder not those that the policy was trained on."""
    trained = []
    if args.tasks.startswith("world:"):
        tasks = load_tasks(args.tasks, args.allow_network, config.seed).held_out
    else:
        tasks = harbor_tasks(Path(args.tasks), args.allow_network, args.strict)
        if Path(config.tasks).is_dir():
            train = load_tasks(config.tasks, config.allow_network, config.seed).train
            folders = {task.environment.folder for task in train}
            trained = [i for i, task in enumerate(tasks) if task.environment.folder in folders]
        elif not config.tasks.startswith("world:"):
            print(f"what it was trained on is not here ({config.tasks}): plays all tasks")
    chosen = [i for i in range(len(tasks)) if args.all or i not in trained][: args.limit]
    if args.all:
        print(f"plays {len(chosen)} tasks; it was trained on {len(set(trained) & set(chosen))} of them")
    elif trained:
        print(f"plays {len(chosen)} held-out tasks, not the {len(trained)} that it was trained on (--all)")
    if not chosen:
        raise ValueError(f"{args.tasks}: it was trained on every task; --all plays them")
    if args.agent == "oracle" and (lacking := [tasks[i].name for i in chosen if not tasks[i].solution]):
        raise ValueError(f"no solution for an oracle to run: {', '.join(lacking)}")
    return tasks, chosen


def play(model, tokenizer, tasks: list[Task], rows: list[tuple], args, config: Config) -> Iterator[tuple]:
    """Each (index of a task, member), by the policy, or by args.agent if there is none: as many at a time as
    there are terminals. -> it, its episode, text to keep, log-probabilities of its observations."""
    while rows:
        greedy = rows[0][1] == "greedy"
        part = [row for row in rows if (row[1] == "greedy") == greedy][: config.terminals]
        rows = rows[len(part) :]
        if model:
            with enough_memory("pass a lower --terminals"):
                key = None if greedy else (Noise.SCORING, config.seed)
                episodes = sample_episodes(model, tokenizer, tasks, args.k, config, key, part)
                logprobs = observation_logprobs(model, [e.transcript for e in episodes], config)
            texts = [report.transcript_text(tokenizer, e) for e in episodes]
        else:
            with ThreadPoolExecutor(config.terminals) as pool:
                done = pool.map(lambda row: scripted(args.agent, tasks[row[0]], config.backend), part)
                episodes, texts = zip(*done, strict=True)
            logprobs = [{}] * len(part)
        yield from zip(part, episodes, texts, logprobs, strict=True)


def scripted(agent: str, task: Task, backend: str) -> tuple[Episode, str]:
    """The task's own solution (oracle) or nothing (noop) instead of a policy. -> episode, what it printed."""
    episode, said, started = Episode(task, 0, stop=StopReason.DONE), "", time.monotonic()
    try:
        with open_terminal(task, backend) as terminal:
            if agent == "oracle":
                if task.environment:
                    terminal.copy_in(task.environment.folder / "solution", "/solution")
                output = terminal.run(task.solution, timeout=task.limits.agent_seconds)
                said = f"{output.text}\n(exit_code={output.exit_code})"
                if output.timed_out:
                    episode.stop = StopReason.AGENT_TIMEOUT
            episode.reward = terminal.verify()
    except TerminalDied as error:
        episode.stop, episode.error = StopReason.INFRA_ERROR, str(error)
    episode.seconds = time.monotonic() - started
    return episode, said


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


if __name__ == "__main__":
    cli()
