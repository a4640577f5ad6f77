"""One style for every picture: a colour means one arm everywhere.

Any two of the colours differ by a CIEDE2000 of 20 at least, also for a reader who does not see red, or green
(tests/test_style.py). Lines that are no arms are black, told apart by their dashes.
"""

import stats

from echo_min import report

COLOURS = report.COLOURS | {  # echo is ECHO at the lambda that was tuned
    "echo 0.05": "#e0c438",
    "lying": "#3870e0",
    "code": "#70c4fc",
    "placebo_words": "#001ca8",
    "elsewhere": "#003838",
    "base": "#a8a88c",
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
