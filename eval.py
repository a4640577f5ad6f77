"""How good is a policy? pass@1 and pass@k, stop reasons, observation CE, and transcripts shaded by surprise.

python eval.py runs/tiny/echo --tasks world:tool -k 5 --show 3
python eval.py runs/tiny/echo --tasks FOLDER --backend docker -k 5 --out runs/eval
python eval.py --agent oracle --tasks FOLDER --backend docker
"""

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import isnan
from pathlib import Path

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
from echo_min.worlds.registry import load_world


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


def cli(argv: list[str] | None = None) -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="or an arm's folder: its newest")
    parser.add_argument("--preset", choices=PRESETS, help="settings for a model that train.py did not write")
    parser.add_argument("--agent", choices=["policy", "oracle", "noop"], default="policy", help="[policy]")
    parser.add_argument("--tasks", default="world:tool", help="world:NAME (held out), or a folder of tasks")
    parser.add_argument("--backend", choices=["sandbox", "docker"], default="sandbox", help="[sandbox]")
    parser.add_argument("--allow_network", action="store_true", help="for tasks that ask for a network")
    parser.add_argument("-k", type=int, default=1, help="sampled rollouts per task")
    parser.add_argument("--limit", type=int, default=200, help="tasks at most")
    parser.add_argument("--terminals", type=int, help="in use at one time [as trained; 4 for docker]")
    parser.add_argument("--max_turns", type=int, help="commands per episode [as trained]")
    parser.add_argument("--temperature", type=float, help="sampling temperature [as trained]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for trials and transcripts; a second run goes on")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N transcripts in colour")
    parser.add_argument("--html", type=Path, metavar="FILE", help="a page of the first 20 trials played now")
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError, RunEnded, KeyboardInterrupt) as error:
        sys.exit(f"eval.py: {str(error) or 'interrupted'}")


def run(args: argparse.Namespace) -> None:
    if min(args.k, args.limit) < 1:
        raise ValueError("-k and --limit must be at least 1")
    if (args.agent == "policy") != (args.checkpoint is not None):
        raise ValueError("name a checkpoint, or pass --agent oracle or noop, which take none")
    if args.html and args.agent != "policy":
        raise ValueError("--html shows what surprises a policy: name a checkpoint")
    config = Config()
    if args.agent == "policy":
        folder = found[1] if (found := checkpoint.latest(args.checkpoint)) else args.checkpoint
        saved = folder / "echo_min.json"
        if saved.exists() and args.preset:
            raise ValueError(f"{folder} has settings of its own: remove --preset")
        if saved.exists():
            config = Config.load(saved)
        elif args.preset:
            config = Config(**PRESETS[args.preset])
        else:
            lacks = f"{folder}: no echo_min.json says how to prompt it and what fits its context"
            raise ValueError(f"{lacks}; pass --preset, one of {', '.join(PRESETS)}")
        config = on_this_machine(replace(config, device="auto"))
        model, tokenizer = checkpoint.load_policy(folder, config.device, config.dtype)
    world = args.tasks.startswith("world:")
    if world:
        tasks = load_world(args.tasks.removeprefix("world:"), config.seed).held_out[: args.limit]
    else:
        tasks = harbor_tasks(Path(args.tasks), args.allow_network)[: args.limit]
    if args.agent == "oracle" and (lacking := [task.name for task in tasks if not task.solution]):
        raise ValueError(f"no solution for an oracle to run: {', '.join(lacking)}")
    given = {name: getattr(args, name) for name in ("temperature", "max_turns", "terminals")}
    if args.backend == "docker" and args.terminals is None:
        given["terminals"] = 4
    config = replace(config, backend=args.backend, **{k: v for k, v in given.items() if v is not None})

    settings = {name: str(getattr(args, name)) for name in ("agent", "tasks", "allow_network", "seed")}
    settings |= {"checkpoint": str(folder)} if args.agent == "policy" else {}
    counted = "backend temperature max_turns harness context max_action_tokens output_chars dtype".split()
    settings |= {name: getattr(config, name) for name in counted}
    trials, shown, points = kept_trials(args.out, settings), [], []
    have = {(record["task"], record["member"]) for record in trials}
    members = [*range(args.k), *(["greedy"] if args.agent == "policy" and world else [])]
    rows = [(i, m) for m in members for i in range(len(tasks)) if (tasks[i].name, m) not in have]
    if args.html and not rows:
        raise ValueError(f"--html shows trials as they are played; {args.out} holds them all: remove --out")
    if args.html:
        args.html.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(rows), desc=args.agent, disable=None, unit="trial") as bar:
        while rows:
            key = None if rows[0][1] == "greedy" else (Noise.SCORING, args.seed)
            part = [row for row in rows if (row[1] == "greedy") == (key is None)][: config.terminals]
            if args.agent == "policy":
                with enough_memory("pass a lower --terminals"):
                    episodes = sample_episodes(model, tokenizer, tasks, args.k, config, key, part)
                    logps = observation_logprobs(model, [e.transcript for e in episodes], config)
                texts = [report.transcript_text(tokenizer, e) for e in episodes]
                for e, row in list(zip(episodes, logps, strict=True))[: max(0, args.show - len(shown))]:
                    shown.append((e, report.tokens_with_surprise(tokenizer, e.transcript, row)))
            else:
                with ThreadPoolExecutor(config.terminals) as pool:
                    ended = pool.map(lambda row: scripted(args.agent, tasks[row[0]], config.backend), part)
                episodes, texts = zip(*ended, strict=True)
                logps = [{} for _ in episodes]
            for (_, member), e, row, text in zip(part, episodes, logps, texts, strict=True):
                trials.append(trial(e, member, -sum(row.values())))
                if args.html and len(points) < 20:
                    tokens = report.tokens_with_surprise(tokenizer, e.transcript, row)
                    points.append(page.point(e, tokens, arm="policy", step=len(points), member=member))
                if args.out:
                    path = args.out / "transcripts" / f"{e.task.name}-{member}.txt"
                    path.parent.mkdir(exist_ok=True)
                    path.write_text(report.printable(text))
                    report.log(args.out / "trials.jsonl", trials[-1])
            if args.html:
                page.write(args.html, f"{folder}, {args.tasks}", points)
            rows = rows[len(part) :]
            bar.update(len(part))
    summarise(trials, args.k)
    for episode, tokens in shown:
        print(f"\n--- {episode.task.name}: reward {episode.reward:g}, {episode.stop}\n{report.ansi(tokens)}")


def trial(e: Episode, member: int | str, nats: float) -> dict:
    """A line of trials.jsonl. reward: null where the infrastructure failed. seconds: in the terminal."""
    return {
        "task": e.task.name,
        "member": member,
        "reward": None if isnan(e.reward) else e.reward,
        "stop": str(e.stop),
        "turns": e.turns,
        "action_tokens": e.transcript.count(Role.ACTION),
        "observation_tokens": e.transcript.count(Role.OBSERVATION),
        "observation_nats": nats,
        "seconds": e.seconds,
        "error": e.error,
    }


def kept_trials(folder: Path | None, settings: dict) -> list[dict]:
    """The trials of an interrupted evaluation, without those in which the infrastructure failed.

    Raises ValueError if the folder holds another evaluation.
    """
    if folder is None:
        return []
    path, trials = folder / "settings.json", folder / "trials.jsonl"
    if path.exists() and (old := json.loads(path.read_text())) != settings:
        changed = [name for name in settings | old if old.get(name) != settings.get(name)]
        raise ValueError(f"{folder} holds an evaluation with another {', '.join(changed)}: pass a new --out")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1) + "\n")
    checkpoint.truncate_metrics(trials, lambda record: record["reward"] is not None)
    return report.read(trials)


def summarise(trials: list[dict], k: int) -> None:
    """Print what was measured. Passed is a reward of 1; infrastructure errors are in no rate."""
    valid = [t for t in trials if t["reward"] is not None]
    if failed := [t for t in trials if t["reward"] is None]:
        print(f"infra errors     {len(failed)} of {len(trials)} trials, in no rate: {failed[0]['error']}")
    if not valid:
        raise RunEnded("no trial could be graded; the reason stands above")
    by_task: dict[str, list[float]] = {}
    for t in valid:
        if t["member"] != "greedy":
            by_task.setdefault(t["task"], []).append(t["reward"])
    mean, half = report.mean_interval([sum(r) / len(r) for r in by_task.values()])
    print(f"pass@1 sampled   {mean:.3f} +- {half:.3f}   ({len(by_task)} tasks x {k})")
    best = [max(rewards) for rewards in by_task.values() if len(rewards) == k > 1]
    greedy = [t["reward"] for t in valid if t["member"] == "greedy"]
    for name, rewards in ((f"pass@{k} sampled", best), ("pass@1 greedy", greedy)):
        if not rewards:
            continue
        passed = sum(reward >= 1 for reward in rewards)
        low, high = report.wilson_interval(passed, len(rewards))
        print(f"{name:16} {passed / len(rewards):.3f} [{low:.3f}, {high:.3f}]")
    sampled = [t for t in trials if t["member"] != "greedy"]
    n = len(sampled)
    stops = (f"{reason} {sum(t['stop'] == reason for t in sampled) / n:.1%}" for reason in StopReason)
    print(f"stops            {', '.join(stops)}")
    for name in ("turns", "action_tokens", "observation_tokens", "seconds"):
        print(f"{name.replace('_', ' '):18} {sum(t[name] for t in sampled) / n:.2f}")
    if tokens := sum(t["observation_tokens"] for t in sampled):
        ce = sum(t["observation_nats"] for t in sampled) / tokens
        print(f"observation CE   {ce:.3f} nats/token (own episodes)")


if __name__ == "__main__":
    cli()
