"""What a run leaves to look at: metrics.jsonl, a progress bar, curves.png, transcripts in text and colour."""

import json
import os
import sys
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from math import comb
from pathlib import Path
from statistics import fmean, variance

from tqdm import tqdm

from echo_min import ranks
from echo_min.config import Config, RunEnded
from echo_min.masking import Role, Transcript

Token = tuple[str, Role, float]  # text, who wrote it, surprise in nats (0 outside observations)
LEGEND = "blue: the policy; red: the terminal, brighter where it surprised the policy; yellow: a warning"
COLOURS = {"grpo": "#707070", "echo": "#c4001c"}  # told apart without red, or green: tests/test_style.py


def first_alone(function):
    """Only the first rank does it; on the others it does nothing."""

    @wraps(function)
    def maybe(*args, **kwargs):
        return function(*args, **kwargs) if ranks.RANK == 0 else None

    return maybe


@first_alone
def log(path: Path, record: dict) -> None:
    """Append one JSON line, at once on disk; floats keep six digits."""
    record = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in record.items()}
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())  # a checkpoint must not outlive the lines of its steps


def tracker_package(config: Config):
    """trackio or wandb, whose calls are the same, or None. Raises ValueError if it can't be had."""
    if config.tracker == "none":
        return None
    try:
        package = find_spec(config.tracker) and import_module(config.tracker)
    except Exception as error:  # of another's code
        raise ValueError(f"tracker: {config.tracker} can't be imported: {error!r}") from error
    if not hasattr(package, "init"):  # what is there may be a folder of its logs
        raise ValueError(f"tracker: pip install {config.tracker}; it is not here")
    return package


@contextmanager
def metrics_log(path: Path, arm: str, config: Config):
    """-> log(step, record): a line of metrics.jsonl, its numbers to the tracker, an alarm if there is one."""
    package = tracker_package(config)
    try:
        run = (
            package
            and not ranks.RANK
            and package.init(project="echo_min", name=f"{config.name}-{arm}", config=asdict(config))
        )
    except Exception as error:  # of another's network, account or disk
        raise RunEnded(f"tracker: {config.tracker} does not start: {error}") from None
    history = [r for r in read(path) if r.get("arm") == arm and "reward" in r]

    def write(step: int, numbers: dict) -> None:
        record = {"arm": arm, "step": step, **numbers}
        if "reward" in record:
            history.append(record)
            if alarm := collapse_alarm(history):
                record["alarm"] = alarm
                tqdm.write(f"warning, {arm}, step {step}: {alarm}", file=sys.stderr)
        log(path, record)
        if run:
            run.log({k: v for k, v in numbers.items() if isinstance(v, int | float)}, step=step)

    try:
        yield write
    finally:
        if run:
            run.finish()


def progress(metrics: dict, results: dict, episodes: int) -> str:
    """Of the bar: what the step and the last evaluation gave."""
    speed = episodes / (metrics["rollout_seconds"] + metrics["update_seconds"])
    ce = metrics.get("observation_ce", metrics.get("control_ce", 0))
    shown = f"pass {results.get('pass_rate', 0):.2f}, reward {metrics['reward']:.2f}"
    return f"{shown}, CE {ce:.2f}, {speed:.0f} rollouts/s"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def student(n: int) -> float:
    """Standard errors from the mean of n > 1 values to the end of its 95 % interval: Student's t."""
    few = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262
    return few[n - 2] if n - 2 < len(few) else 1.96 + 2.5 / (n - 1)


def pass_at_k(passed: int, trials: int, k: int) -> float:
    """Chance that k of a task's trials hold one that passed (Chen et al. 2021: no bias). trials >= k."""
    return 1 - comb(trials - passed, k) / comb(trials, k)


def rate_interval(rates: list[float], draws: int) -> tuple[float, float, float]:
    """-> (mean, low, high): the mean over tasks of a rate in [0, 1], and its 95 % interval over tasks.

    Wilson's, in [0, 1] and of some width even where all pass, of as many trials as would vary like these
    tasks: at least one a task, at most `draws`, the independent ones behind the rates. One task says nothing.
    """
    n, mean = len(rates), fmean(rates)
    if n == 1:
        return mean, 0.0, 1.0
    alike = n if mean in (0, 1) else draws  # all passed, or none: no sign that tasks do not differ
    trials = min(max(n * mean * (1 - mean) / spread, n), draws) if (spread := variance(rates)) else alike
    z2 = student(n) ** 2 / trials
    half = (z2 * mean * (1 - mean) + z2 * z2 / 4) ** 0.5
    low, high = ((mean + z2 / 2 + sign * half) / (1 + z2) for sign in (-1, 1))
    return mean, max(low, 0.0), min(high, 1.0)


def seen(records: list[dict], folder: Path) -> str:
    """What a run showed, in three sentences, and how to go on."""
    evaluated = [r for r in records if "pass_rate" in r]
    first, last = ({r["arm"]: r for r in some} for some in (evaluated[::-1], evaluated))
    ce = {arm: (first[arm]["expert_ce"], r["expert_ce"]) for arm, r in last.items()}
    rates = " and ".join(f"{arm} passes {r['pass_rate']:.0%}" for arm, r in last.items())
    surprise = " and ".join(f"{old:.2f} to {new:.2f} under {arm}" for arm, (old, new) in ce.items())
    end = last[evaluated[0]["arm"]]
    return (
        f"After {end['step']} steps {rates} of {end['eval_tasks']} held-out tasks.\n"
        f"The surprise at what the terminal prints (cross-entropy, nats a token) went from {surprise}.\n"
        f"Look at {folder}/index.html in a browser, then try other settings: source .venv/bin/activate, and"
        " python train.py --help."
    )


@first_alone
def draw_curves(records: list[dict], path: Path) -> None:
    """Each arm's pass rates and observation CE at the evaluations."""
    from matplotlib.figure import Figure  # takes a second to load, and only the end of a run draws

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines = (left, "pass_rate", "-"), (left, "pass_rate_greedy", ":"), (right, "expert_ce", "-")
    for arm in dict.fromkeys(r["arm"] for r in records):
        points = [r for r in records if r["arm"] == arm and "pass_rate" in r]
        steps = [r["step"] for r in points]
        for ax, key, line in lines:
            ax.plot(steps, [r[key] for r in points], line, color=COLOURS[arm], label=f"{arm} {key}")
    left.set(xlabel="step", title="held-out tasks", ylim=(0, 1.02))
    right.set(xlabel="step", title="the expert's observations, nats/token", ylim=(0, None))
    for ax in (left, right):
        ax.legend()
    figure.savefig(path, dpi=150)


def collapse_alarm(history: list[dict], window: int = 20) -> str | None:
    """A warning when observation CE and command diversity have both fallen by a third over `window` steps
    while the reward has not risen: the policy may be choosing commands whose output is trivial to predict
    (paper, section 4)."""
    recent, keys = history[-2 * window :], ("observation_ce", "command_diversity", "reward")
    if len(recent) < 2 * window or any("observation_ce" not in r for r in recent):  # a control's run
        return None
    before, now = ([fmean(r[k] for r in part) for k in keys] for part in (recent[:window], recent[window:]))
    if all(now[i] < 2 / 3 * before[i] for i in (0, 1)) and now[2] <= before[2]:
        return "observation CE and command diversity fall together while reward does not rise: collapse?"


def printable(text: str) -> str:
    """Control characters as dots: terminal output must not act on the reader's screen."""
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in text)


def tokens_with_surprise(tokenizer, transcript: Transcript, logprobs: dict[int, float]) -> list[Token]:
    """logprobs: position -> nats. A character split over several tokens shows as one mark a token."""
    texts = [printable(tokenizer.decode([i])) for i in transcript.ids]
    nats = [round(0.0 - logprobs.get(t, 0.0), 3) for t in range(len(transcript))]
    return list(zip(texts, map(Role, transcript.roles), nats, strict=True))


def ansi(tokens: list[Token]) -> str:
    """A transcript for a terminal, in the colours of LEGEND."""
    styles, shown = {Role.ACTION: "1;34", Role.WARNING: "33", Role.SCAFFOLD: "2"}, ""
    for text, role, nats in tokens:
        style = styles.get(role, "0")
        if role is Role.OBSERVATION:
            style = f"48;2;{50 + int(205 * min(1.0, nats / 5))};0;0;38;2;255;255;255"
            text = text.replace("\n", "⏎\n")
        shown += f"\x1b[{style}m{text}\x1b[0m"
    return shown


@first_alone
def write_transcripts(path: Path, tokenizer, episodes: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(transcript_text(tokenizer, e) for e in episodes))


def transcript_text(tokenizer, e) -> str:
    """Plain text, with the reward and what ended it."""
    head = f"=== {e.task.name}: reward {e.reward:g}, {e.stop}, {e.turns} turns {e.error}\n"
    return f"{head}{printable(tokenizer.decode(e.transcript.ids))}\n"
