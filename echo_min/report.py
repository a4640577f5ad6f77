"""What a run leaves to look at: metrics.jsonl, a progress bar, curves.png, transcripts in text and colour."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from echo_min.masking import Role, Transcript

Token = tuple[str, Role, float]  # text, who wrote it, surprise in nats (0 outside observations)
COLOURS = {"grpo": "#777777", "echo": "#d1495b", "placebo": "#3d6c9e"}


def log(path: Path, record: dict) -> None:
    """Append one JSON line, whole or not at all."""
    with open(path, "a") as file:
        file.write(
            json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in record.items()}) + "\n"
        )


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def mean_interval(values: list[float]) -> tuple[float, float]:
    """-> (mean, half-width of its 95 % interval, Student's t). One value has no interval: (value, nan)."""
    t95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return mean, float("nan")
    variance = sum((v - mean) ** 2 for v in values) / (n - 1)
    return mean, t95.get(n - 1, 1.96) * (variance / n) ** 0.5


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a pass rate from n independent trials (Wilson score)."""
    z, p = 1.96, successes / n
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def draw_curves(records: list[dict], path: Path) -> None:
    """Pass rate on held-out tasks and observation CE over steps, one line an arm."""
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
    axes[1].set(xlabel="step", ylabel="observation CE, expert's episodes (nats/token)", ylim=(0, None))
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

    def mean(records: list[dict], key: str) -> float:
        return sum(r[key] for r in records) / len(records)

    fell = all(mean(now, key) < 2 / 3 * mean(before, key) for key in ("observation_ce", "command_diversity"))
    if fell and mean(now, "reward") <= mean(before, "reward"):
        return "observation CE and command diversity fall together while reward does not rise: collapse?"


def tokens_with_surprise(tokenizer, transcript: Transcript, logprobs: dict[int, float]) -> list[Token]:
    """logprobs: position -> nats. Control characters become dots, or they would act on the screen."""

    def shown(i: int) -> str:
        return "".join(c if c.isprintable() or c == "\n" else "·" for c in tokenizer.decode([i]))

    return [
        (shown(i), Role(role), -logprobs.get(t, 0.0))
        for t, (i, role) in enumerate(zip(transcript.ids, transcript.roles, strict=True))
    ]


def ansi(tokens: list[Token]) -> str:
    """A transcript for a terminal: actions bold, scaffold dim, observations on red, deeper for surprise."""
    out = []
    for text, role, nats in tokens:
        style = {Role.ACTION: "1;36", Role.WARNING: "33", Role.SCAFFOLD: "2"}.get(role, "0")
        if role is Role.OBSERVATION:
            r = min(1.0, nats / 5)
            style = f"48;2;{90 + int(165 * r)};{int(90 * (1 - r))};{int(90 * (1 - r))};38;2;255;255;255"
            text = text.replace("\n", "⏎")
        out.append(f"\x1b[{style}m{text}\x1b[0m")
    return "".join(out)


def write_transcripts(path: Path, tokenizer, episodes: list) -> None:
    """Plain text, one episode after the other, with the reward and what ended it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [
        f"=== {e.task.name}: reward {e.reward:g}, {e.stop}, {e.turns} turns {e.error}\n"
        f"{tokenizer.decode(e.transcript.ids)}\n"
        for e in episodes
    ]
    path.write_text("\n".join(parts))


def draw_transcripts(panels: dict[str, list[Token]], path: Path, columns: int = 60) -> None:
    """The picture that explains ECHO: title -> transcript; observations are shaded by surprise."""
    laid_out = {title: _layout(tokens, columns) for title, tokens in panels.items()}
    width = max(column + len(text) for cells in laid_out.values() for _, column, text, _, _ in cells)
    height = max(line for cells in laid_out.values() for line, *_ in cells) + 1
    size = (0.09 * (width + 2) * len(panels) + 0.8, 0.22 * height + 0.5)
    fig, axes = plt.subplots(1, len(panels), figsize=size, constrained_layout=True, squeeze=False)
    shade = matplotlib.colormaps["Reds"]
    inks = {Role.PROMPT: "black", Role.ACTION: "#0b4f8a", Role.WARNING: "#b8860b", Role.SCAFFOLD: "#aaaaaa"}
    for ax, (title, cells) in zip(axes[0], laid_out.items(), strict=True):
        for line, start, text, role, nats in cells:
            face, ink = "#d6e8f7" if role is Role.ACTION else "none", inks.get(role, "black")
            if role is Role.OBSERVATION:
                level = min(nats / 5, 1.0)
                face, ink = shade(0.08 + 0.72 * level), "white" if level > 0.6 else "black"
            if text:
                corner, width_of = (start + 0.05, line - 0.42), len(text) - 0.1
                ax.add_patch(plt.Rectangle(corner, width_of, 0.84, color=face, lw=0))
            for i, character in enumerate(text):  # a cell each: alignment must not hang on the font
                where = (start + i + 0.5, line)
                ax.text(*where, character, color=ink, family="monospace", size=8, ha="center", va="center")
        ax.set(xlim=(0, width), ylim=(height - 0.3, -0.7))
        ax.set_title(title, fontsize=9)
        ax.axis("off")
    bar = fig.colorbar(plt.cm.ScalarMappable(plt.Normalize(0, 5), shade), ax=axes, fraction=0.02, pad=0.01)
    bar.set_label("surprise (nats)", fontsize=8)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def _layout(tokens: list[Token], columns: int) -> list[tuple[int, int, str, Role, float]]:
    """-> (line, column, text, role, nats) of each token, a token with a line break as several."""
    cells, line, column = [], 0, 0
    for text, role, nats in tokens:
        for piece in text.splitlines(keepends=True):
            shown = piece.rstrip("\n") + "⏎" * (role is Role.OBSERVATION and piece.endswith("\n"))
            if column + len(shown) > columns:
                line, column = line + 1, 0
            cells.append((line, column, shown, role, nats))
            column += len(shown)
            if piece.endswith("\n"):
                line, column = line + 1, 0
    return cells
