"""How good is a policy? pass@1 and pass@k, stop reasons, observation CE, and transcripts shaded by surprise.

python eval.py runs/tiny/echo --tasks world:tool -k 5 --show 3
python eval.py runs/tiny/echo --tasks FOLDER --backend docker -k 5 --out runs/eval
python eval.py --agent check --tasks FOLDER --backend docker     is every task sound?
"""

from echo_min.cli import eval_args

if __name__ == "__main__":  # before torch, which takes seconds to load
    eval_args(__doc__)

import sys
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from echo_min import checkpoint, page, report
from echo_min.config import Config, RunEnded
from echo_min.evaluate import observation_logprobs
from echo_min.machine import enough_memory, on_this_machine
from echo_min.presets import PRESETS
from echo_min.rollout import Episode, Noise, StopReason, sample_episodes
from echo_min.tasks import Task
from echo_min.terminal import TerminalDied, open_terminal
from echo_min.trials import keep, kept_trials, soundness, summary, trial
from echo_min.worlds.harbor import harbor_tasks
from echo_min.worlds.registry import load_tasks


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
    trials = kept_trials(args, config, folder) if args.out else []
    have = {(t.task, t.member) for t in trials}
    greedy = ["greedy"] if folder and args.tasks.startswith("world:") else []
    members = ["oracle", "noop"] if args.agent == "check" else [*range(args.k), *greedy]
    rows = [(i, m) for m in members for i in chosen if (tasks[i].name, m) not in have]
    if args.html:
        if not rows:
            has = f"{args.out} holds them all"
            raise ValueError(f"--html shows trials as they are played; {has}: remove --out")
        args.html.parent.mkdir(parents=True, exist_ok=True)
    policy = checkpoint.load_policy(folder, config.device, config.dtype) if folder and rows else (None, None)
    shown, points = [], []
    with tqdm(desc=args.agent, total=len(rows), disable=None, unit="trial") as bar:

        def ended(episode: Episode, member: int | str, text: str, logprobs: dict) -> None:
            tokens = report.tokens_with_surprise(policy[1], episode.transcript, logprobs)
            trials.append(trial(episode, member, logprobs))
            if args.out:
                keep(args.out, trials[-1], text, episode.verifier_output)
            if tokens and len(shown) < args.show:
                title = f"{episode.task.name}: reward {episode.reward:g}, {episode.stop}"
                shown.append(f"\n--- {title}\n{report.ansi(tokens)}")
            if args.html and len(points) < 20:
                points.append(page.point(episode, tokens, arm="policy", step=len(points), member=member))
                page.write(args.html, f"{folder}, {args.tasks}", points)
            bar.update()

        play(*policy, tasks, rows, args, config, ended)
    names = {tasks[i].name for i in chosen}  # --out may hold more
    found = [t for t in trials if t.task in names]
    print(*(soundness(found) if args.agent == "check" else summary(found, args.k, len(names))), sep="\n")
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
    lacking = [tasks[i].name for i in chosen if not tasks[i].solution]
    if lacking and args.agent in ("oracle", "check"):
        raise ValueError(f"no solution for an oracle to run: {', '.join(lacking)}")
    return tasks, chosen


def play(model, tokenizer, tasks: list[Task], rows: list[tuple], args, config: Config, ended) -> None:
    """Each (index of a task, member), by the policy, or by args.agent if there is none: as many at a time as
    there are terminals. ended(episode, member, text to keep, log-probabilities of its observations)."""
    if not model:
        with ThreadPoolExecutor(config.terminals) as pool:
            agents = [member if args.agent == "check" else args.agent for _, member in rows]
            trials = zip(agents, rows, strict=True)
            members = {pool.submit(scripted, a, tasks[i], config): member for a, (i, member) in trials}
            for done in as_completed(members):
                episode, said = done.result()
                ended(episode, members[done], said, {})
        return
    for greedy in False, True:
        part = [row for row in rows if (row[1] == "greedy") == greedy]

        def score(i: int, episode: Episode, part=part) -> None:
            (logprobs,) = observation_logprobs(model, [episode.transcript], config)
            ended(episode, part[i][1], report.transcript_text(tokenizer, episode), logprobs)

        if part:
            with enough_memory("pass a lower --terminals"):
                key = None if greedy else (Noise.SCORING, config.seed)
                sample_episodes(model, tokenizer, tasks, args.k, config, key, part, score)


def scripted(agent: str, task: Task, config: Config) -> tuple[Episode, str]:
    """The task's own solution (oracle) or nothing (noop) instead of a policy. -> episode, what it printed."""
    episode, said, started = Episode(task, 0, stop=StopReason.DONE), "", time.monotonic()
    try:
        with open_terminal(task, config.backend, at_once=config.terminals) as terminal:
            if agent == "oracle":
                if task.environment:
                    terminal.copy_in(task.environment.folder / "solution", "/solution")
                output = terminal.run(task.solution, timeout=task.limits.agent_seconds)
                said = f"{output.text}\n(exit_code={output.exit_code})"
                if output.timed_out:
                    episode.stop = StopReason.AGENT_TIMEOUT
            try:
                episode.reward = terminal.verify()
            finally:
                episode.verifier_output = terminal.verifier_output
    except TerminalDied as error:
        episode.stop, episode.error = StopReason.INFRA_ERROR, str(error)
    episode.seconds = time.monotonic() - started
    return episode, said


if __name__ == "__main__":
    cli()
