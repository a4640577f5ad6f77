"""One style for every picture: a colour means one arm everywhere."""

import stats

from echo_min import report

COLOURS = report.COLOURS | {
    "base": "#bbbbbb",
    "floor": "#2e7d5b",
    "echo 0.05": "#e8a0a8",
    "placebo": "#3d6c9e",
    "placebo_words": "#7a5aa6",
    "placebo_outputs": "#5aa6a0",
    "lying": "#c98a2b",
}


def band(ax, lines: list[dict], key: str, colour: str, label: str, **style) -> None:
    """Mean over seeds and its 95 % interval at every step."""
    steps = sorted({line["step"] for line in lines if key in line})
    points = [stats.mean_interval([x[key] for x in lines if x["step"] == s and key in x]) for s in steps]
    if not points:
        return
    ax.plot(steps, [mean for mean, _ in points], color=colour, lw=2, label=label, **style)
    low, high = ([m + sign * h for m, h in points] for sign in (-1, 1))
    ax.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)


def axes(ax, **labels) -> None:
    ax.set(**labels)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
