"""One style for every picture: a colour means one arm everywhere.

Any two of the colours differ by a CIEDE2000 of 20 at least, also for a reader who does not see red, or green
(tests/test_style.py). Lines that are no arms are black, told apart by their dashes.
"""

from math import inf

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


def curves(
    ax, lines: list[dict], key: str, colour: str, label: str, x="step", top=inf, bottom=0.0, **style
) -> None:  # fmt: skip
    """Over x every seed thin; their mean and its 95 % interval, which ends where the number can."""
    lines = sorted((line for line in lines if key in line), key=lambda line: line[x])
    if not lines:
        return
    for seed in sorted({line["seed"] for line in lines}):
        own = [(line[x], line[key]) for line in lines if line["seed"] == seed]
        ax.plot(*zip(*own, strict=True), color=colour, **{"lw": 0.7, "alpha": 0.5} | style)
    places = sorted({line[x] for line in lines})
    points = [stats.mean_interval([line[key] for line in lines if line[x] == place]) for place in places]
    ax.plot(places, [mean for mean, _ in points], color=colour, label=label, **{"lw": 2.4} | style)
    # one seed has no interval: half is nan, and so must the ends be
    ends = [[min(top, max(bottom, mean + sign * half)) if half == half else half for mean, half in points]
            for sign in (-1, 1)]  # fmt: skip
    ax.fill_between(places, *ends, color=colour, alpha=0.1, lw=0)


def seeds(lines: list[dict]) -> str:
    """For a title, which says what stands behind a picture."""
    found = sorted({line["seed"] for line in lines})
    whole = len(found) > 1 and found == list(range(found[0], found[-1] + 1))
    text = f"{found[0]} to {found[-1]}" if whole else ", ".join(map(str, found))
    return f"seed{'s' * (len(found) > 1)} {text}"


def legend(fig, axes, room: float, **options) -> None:
    """One for all panels, below them."""
    pairs = [zip(*ax.get_legend_handles_labels(), strict=True) for ax in axes]
    named = {label: handle for panel in pairs for handle, label in panel}
    fig.legend(named.values(), named, loc="lower center", frameon=False, fontsize=10, **options)
    fig.tight_layout(rect=(0, room, 1, 1))


def axes(ax, **labels) -> None:
    ax.set(**labels)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
