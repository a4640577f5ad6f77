"""One episode of the scripted expert, each terminal token shaded by the surprise of base, GRPO and ECHO.

python figures/surprise.py             redraws the picture from figures/data
python figures/surprise.py --run RUN   scores an episode with the checkpoints of a finished run, base, grpo
                                       and echo, and draws it there: RUN/surprise.json, RUN/surprise.png
"""

import argparse
import json
import os
import sys
from pathlib import Path

import common
import matplotlib
import matplotlib.pyplot as plt

from echo_min import checkpoint, report
from echo_min.checkpoint import load_policy
from echo_min.config import Config
from echo_min.evaluate import expert_transcripts, observation_logprobs
from echo_min.masking import Role

TITLES = {"base": "base policy", "grpo": "after GRPO", "echo": "after ECHO"}


def score(folder: Path) -> None:
    """Writes surprise.json to the run's folder. Raises ValueError if it has no such checkpoints."""
    config = Config.load(folder / "config.json")
    world = common.world_of(config)
    made = f"seed {config.seed}, {config.steps} steps, lambda {config.env_weight:g}"
    panels = {"about": f"{config.tasks}, {made}"}
    for title in TITLES:
        found = checkpoint.latest(folder / title)
        model, tokenizer = load_policy(found[1] if found else folder / title)
        transcript = max(expert_transcripts(tokenizer, world, config)[:20], key=len)  # in which a call fails
        (logprobs,) = observation_logprobs(model, [transcript], config)
        tokens = report.tokens_with_surprise(tokenizer, transcript, logprobs)
        panels[title] = [(text, int(role), round(nats, 3)) for text, role, nats in tokens]
    (folder / "surprise.json").write_text(json.dumps(panels) + "\n")


def draw(panels: dict[str, list[report.Token]], about: str, path: Path, columns: int = 60) -> None:
    """The picture that explains ECHO: title -> transcript; observations are shaded by surprise."""
    laid_out = {title: _layout(tokens, columns) for title, tokens in panels.items()}
    width = max(column + len(text) for cells in laid_out.values() for _, column, text, _, _ in cells)
    height = max(line for cells in laid_out.values() for line, *_ in cells) + 1
    top = max(nats for tokens in panels.values() for _, role, nats in tokens if role is Role.OBSERVATION)
    size = (0.09 * (width + 2) * len(panels) + 0.8, 0.22 * height + 0.8)
    fig, axes = plt.subplots(1, len(panels), figsize=size, constrained_layout=True, squeeze=False)
    shade = matplotlib.colormaps["Reds"]
    inks = {Role.PROMPT: "black", Role.ACTION: "#0b4f8a", Role.WARNING: "#b8860b", Role.SCAFFOLD: "#aaaaaa"}
    for ax, (title, cells) in zip(axes[0], laid_out.items(), strict=True):
        for line, start, text, role, nats in cells:
            face, ink = "#d6e8f7" if role is Role.ACTION else "none", inks.get(role, "black")
            if role is Role.OBSERVATION:
                level = max(nats, 0) / top
                face, ink = shade(0.08 + 0.72 * level), "white" if level > 0.6 else "black"
            if text:
                corner, width_of = (start + 0.05, line - 0.42), len(text) - 0.1
                ax.add_patch(plt.Rectangle(corner, width_of, 0.84, color=face, lw=0))
            for i, character in enumerate(text):  # a cell each: alignment must not hang on the font
                where = (start + i + 0.5, line)
                ax.text(*where, character, color=ink, family="monospace", size=8, ha="center", va="center")
        ax.set(xlim=(0, width), ylim=(height - 0.3, -0.7))
        printed = sum(nats for _, role, nats in panels[title] if role is Role.OBSERVATION)
        ax.set_title(f"{title}: {printed:.1f} nats at what was printed", fontsize=9)
        ax.axis("off")
    bar = fig.colorbar(plt.cm.ScalarMappable(plt.Normalize(0, top), shade), ax=axes, fraction=0.02, pad=0.01)
    bar.set_label("surprise (nats)", fontsize=8)
    said = "An expert's episode as three policies read it; blue: typed, red: printed"
    fig.suptitle(f"{said}. {about}", fontsize=9)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def _layout(tokens: list[report.Token], columns: int) -> list[tuple[int, int, str, Role, float]]:
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, metavar="RUN", help="a finished run with base, grpo and echo")
    args = parser.parse_args()
    try:
        if args.run:
            score(args.run)
        data = (args.run or common.DATA) / "surprise.json"
        saved = json.loads(data.read_text())
    except (OSError, ValueError) as error:
        sys.exit(f"surprise.py: {error}")
    about, panels = saved.pop("about"), {}
    for name, tokens in saved.items():
        panels[TITLES[name]] = [(text, Role(role), nats) for text, role, nats in tokens]
    picture = (args.run or common.PNG) / "surprise.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(panels, about, picture, columns=40)
    print(os.path.relpath(picture))


if __name__ == "__main__":
    main()
