"""What a run leaves to look at: metrics.jsonl, a progress bar, curves.png, transcripts in text and colour."""

import json
import os
import sys
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from math import comb
from pathlib import Path
from statistics import fmean, stdev

from tqdm import tqdm

from echo_min.config import Config, RunEnded
from echo_min.masking import Role, Transcript

Token = tuple[str, Role, float]  # text, who wrote it, surprise in nats (0 outside observations)
COLOURS = {"grpo": "#777777", "echo": "#d1495b"}


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
        package = import_module(config.tracker)
    except Exception as error:  # of another's code
        if not isinstance(error, ModuleNotFoundError) or error.name != config.tracker:
            raise ValueError(f"tracker: {config.tracker} can't be imported: {error!r}") from error
        package = None
    if not hasattr(package, "init"):  # what is there may be a folder of its logs
        raise ValueError(f"tracker: pip install {config.tracker}; it is not here")
    return package


@contextmanager
def metrics_log(path: Path, arm: str, config: Config):
    """-> log(step, record): a line of metrics.jsonl, its numbers to the tracker, an alarm if there is one."""
    package, runs = tracker_package(config), []
    history = [r for r in read(path) if r.get("arm") == arm and "reward" in r]

    def write(step: int, record: dict) -> None:
        record = {"arm": arm, "step": step, **record}
        if "reward" in record:
            history.append(record)
            if alarm := collapse_alarm(history):
                record["alarm"] = alarm
                tqdm.write(f"warning, {arm}, step {step}: {alarm}", file=sys.stderr)
        log(path, record)
        if package and not runs:
            options = {"project": "echo_min", "name": f"{config.name}-{arm}", "config": asdict(config)}
            try:
                runs.append(package.init(**options))
            except Exception as error:  # of another's network, account or disk
                raise RunEnded(f"tracker: {config.tracker} does not start: {error}") from None
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        for run in runs:
            run.log(numbers, step=step)

    try:
        yield write
    finally:
        for run in runs:
            run.finish()


def progress(metrics: dict, results: dict, episodes: int) -> str:
    """Of the bar: what the step and the last evaluation gave."""
    speed = episodes / (metrics["rollout_seconds"] + metrics["update_seconds"])
    ce = metrics.get("observation_ce", metrics.get("control_ce", 0))
    return (
        f"pass {results.get('pass_rate', 0):.2f}, reward {metrics['reward']:.2f}, "
        f"CE {ce:.2f}, {speed:.0f} rollouts/s"
    )


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def mean_interval(values: list[float]) -> tuple[float, float]:
    """-> (mean, half-width of its 95 % interval, Student's t). One value has no interval: (value, nan)."""
    t95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
    n = len(values)
    if n == 1:
        return values[0], float("nan")
    return fmean(values), t95.get(n - 1, 1.96 + 2.5 / (n - 1)) * stdev(values) / n**0.5


def pass_at_k(passed: int, trials: int, k: int) -> float:
    """Chance that k of a task's trials hold one that passed (Chen et al. 2021: no bias). trials >= k."""
    return 1 - comb(trials - passed, k) / comb(trials, k)


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a pass rate from n independent trials (Wilson score)."""
    z, p = 1.96, successes / n
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def draw_curves(records: list[dict], path: Path) -> None:
    """Pass rate on held-out tasks and observation CE over steps, one line an arm."""
    import matplotlib  # takes a second to load, and only the end of a run draws

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    arms = list(dict.fromkeys(r["arm"] for r in records))
    for arm in arms:
        evals = [r for r in records if r["arm"] == arm and "pass_rate" in r]
        steps = [r["step"] for r in evals]
        colour = COLOURS[arm]
        axes[0].plot(steps, [r["pass_rate"] for r in evals], color=colour, label=f"{arm}, sampled")
        axes[0].plot(
            steps, [r["pass_rate_greedy"] for r in evals], color=colour, ls=":", label=f"{arm}, greedy"
        )
        axes[1].plot(steps, [r["expert_ce"] for r in evals], color=colour, label=arm)
    axes[0].set(xlabel="step", ylabel="pass rate, held-out tasks", ylim=(0, 1.02))
    axes[1].set(xlabel="step", ylabel="expert's observation CE (nats/token)", ylim=(0, None))
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def collapse_alarm(history: list[dict], window: int = 20) -> str | None:
    """A warning when observation CE and command diversity have both fallen by a third over `window` steps
    while the reward has not risen: the policy may be choosing commands whose output is trivial to predict
    (paper, section 4)."""
    if len(history) < 2 * window:
        return None
    before, now = history[-2 * window : -window], history[-window:]
    if any("observation_ce" not in r for r in before + now):  # a control's run: not what the terminal wrote
        return None

    def means(key: str) -> tuple[float, float]:
        return fmean(r[key] for r in before), fmean(r[key] for r in now)

    fell = all(new < 2 / 3 * old for old, new in map(means, ("observation_ce", "command_diversity")))
    old, new = means("reward")
    if fell and new <= old:
        return "observation CE and command diversity fall together while reward does not rise: collapse?"


def printable(text: str) -> str:
    """Control characters as dots: terminal output must not act on the reader's screen."""
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in text)


def tokens_with_surprise(tokenizer, transcript: Transcript, logprobs: dict[int, float]) -> list[Token]:
    """logprobs: position -> nats. A character split over several tokens shows as one mark a token."""
    texts = [printable(tokenizer.decode([i])) for i in transcript.ids]
    return [
        (text, Role(role), round(0.0 - logprobs.get(t, 0.0), 3))
        for t, (text, role) in enumerate(zip(texts, transcript.roles, strict=True))
    ]


def ansi(tokens: list[Token]) -> str:
    """A transcript for a terminal: actions bold, scaffold dim, observations on red, deeper for surprise."""
    out = []
    for text, role, nats in tokens:
        style = {Role.ACTION: "1;36", Role.WARNING: "33", Role.SCAFFOLD: "2"}.get(role, "0")
        if role is Role.OBSERVATION:
            r = min(1.0, nats / 5)
            style = f"48;2;{90 + int(165 * r)};{int(90 * (1 - r))};{int(90 * (1 - r))};38;2;255;255;255"
            text = text.replace("\n", "⏎\n")
        out.append(f"\x1b[{style}m{text}\x1b[0m")
    return "".join(out)


def write_transcripts(path: Path, tokenizer, episodes: list) -> None:
    """Plain text, one episode after the other, with the reward and what ended it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(transcript_text(tokenizer, e) for e in episodes))


def transcript_text(tokenizer, e) -> str:
    head = f"=== {e.task.name}: reward {e.reward:g}, {e.stop}, {e.turns} turns {e.error}\n"
    return f"{head}{printable(tokenizer.decode(e.transcript.ids))}\n"
