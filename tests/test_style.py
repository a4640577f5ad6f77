"""Colours that a reader who does not see red or green tells apart, and that mean one thing everywhere."""

import sys
from itertools import combinations
from math import atan2, cos, degrees, exp, hypot, radians, sin
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "figures"))

import style  # noqa: E402

from echo_min import page, report  # noqa: E402

MACHADO = {  # Machado, Oliveira and Fernandes 2009, table 1, severity 1; of linear RGB
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
               [-0.011820, 0.042940, 0.968881]],
    "full sight": np.eye(3),
}  # fmt: skip
SHARMA = [  # some of the pairs of Sharma, Wu and Dalal 2005, with their difference
    ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425), ((50, -1.3802, -84.2814), (50, 0, -82.7485), 1.0),
    ((50, 0, 0), (50, -1, 2), 2.3669), ((50, 2.49, -0.001), (50, -2.49, 0.0009), 7.1792),
    ((50, 2.49, -0.001), (50, -2.49, 0.0011), 7.2195), ((50, -0.001, 2.49), (50, 0.0009, -2.49), 4.8045),
    ((50, -0.001, 2.49), (50, 0.0011, -2.49), 4.7461), ((50, 2.5, 0), (73, 25, -18), 27.1492),
    ((50, 2.5, 0), (61, -5, 29), 22.8977), ((50, 2.5, 0), (56, -27, -3), 31.9030),
    ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ((22.7233, 20.0904, -46.6940), (23.0331, 14.9730, -42.5619), 2.0373),
    ((90.8027, -2.0831, 1.4410), (91.1528, -1.6435, 0.0447), 1.4441), ((2.0776, 0.0795, -1.1350),
    (0.9033, -0.0636, -0.5514), 0.9082),
]  # fmt: skip


def lab(colour: str, matrix) -> tuple[float, float, float]:
    """CIE L*a*b*, D65, of a colour #rrggbb as seen through the matrix."""
    srgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(matrix) @ linear, 0, 1)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
              [0.0193339, 0.1191920, 0.9503041]]  # fmt: skip
    x, y, z = (np.array(to_xyz) @ seen) / (0.95047, 1.0, 1.08883)
    fx, fy, fz = (v ** (1 / 3) if v > 216 / 24389 else (24389 / 27 * v + 16) / 116 for v in (x, y, z))
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


def ciede2000(one, other) -> float:
    (l1, a1, b1), (l2, a2, b2) = one, other
    mean_c = (hypot(a1, b1) + hypot(a2, b2)) / 2
    g = 0.5 * (1 - (mean_c**7 / (mean_c**7 + 25**7)) ** 0.5)
    (c1, h1), (c2, h2) = (
        (hypot((1 + g) * a, b), degrees(atan2(b, (1 + g) * a)) % 360) for a, b in ((a1, b1), (a2, b2))
    )
    dh = 0 if c1 * c2 == 0 else (h2 - h1 + 180) % 360 - 180
    turn = 2 * (c1 * c2) ** 0.5 * sin(radians(dh) / 2)
    light, chroma = (l1 + l2) / 2, (c1 + c2) / 2
    hue = h1 + h2 if c1 * c2 == 0 else (h1 + dh / 2) % 360
    t = 1 - 0.17 * cos(radians(hue - 30)) + 0.24 * cos(radians(2 * hue))
    t += 0.32 * cos(radians(3 * hue + 6)) - 0.20 * cos(radians(4 * hue - 63))
    sl = 1 + 0.015 * (light - 50) ** 2 / (20 + (light - 50) ** 2) ** 0.5
    sc, sh = 1 + 0.045 * chroma, 1 + 0.015 * chroma * t
    rotation = 2 * (chroma**7 / (chroma**7 + 25**7)) ** 0.5
    rotation *= -sin(radians(60 * exp(-(((hue - 275) / 25) ** 2))))
    parts = (l2 - l1) / sl, (c2 - c1) / sc, turn / sh
    return (sum(part**2 for part in parts) + rotation * parts[1] * parts[2]) ** 0.5


@pytest.mark.parametrize("one, other, difference", SHARMA)
def test_the_difference_is_the_published_one(one, other, difference):
    assert ciede2000(one, other) == pytest.approx(difference, abs=1e-4)
    assert ciede2000(other, one) == pytest.approx(difference, abs=1e-4)


@pytest.mark.parametrize("sight", MACHADO)
def test_any_two_colours_are_told_apart(sight):
    seen = {name: lab(colour, MACHADO[sight]) for name, colour in style.COLOURS.items()}
    close = {
        (a, b): round(ciede2000(seen[a], seen[b]), 1)
        for a, b in combinations(seen, 2)
        if ciede2000(seen[a], seen[b]) < 20
    }
    assert len(seen) >= 8 and not close


def test_a_colour_means_one_thing_everywhere():
    assert len(set(style.COLOURS.values())) == len(style.COLOURS)
    for arm, colour in report.COLOURS.items():
        assert style.COLOURS[arm] == colour
    assert f"['base', '{style.COLOURS['base']}'" in page.SCRIPT


def test_curves_show_every_seed_and_a_band_that_ends_where_a_rate_can():
    lines = [{"seed": seed, "step": step, "rate": rate} for seed, step, rate in
             [(1, 25, 0.9), (2, 25, 0.1), (1, 0, 0.2), (2, 0, 0.0), (2, 50, 1.0), (1, 50, 0.8)]]  # fmt: skip
    _, ax = plt.subplots()
    style.curves(ax, [*lines, {"seed": 1, "step": 30}], "rate", "#000000", "name", top=1)
    first, second, mean = ([*map(tuple, line.get_xydata())] for line in ax.lines)
    assert first == [(0, 0.2), (25, 0.9), (50, 0.8)] and second == [(0, 0.0), (25, 0.1), (50, 1.0)]
    assert mean == [(0, pytest.approx(0.1)), (25, pytest.approx(0.5)), (50, pytest.approx(0.9))]
    heights = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert heights.min() == 0 and heights.max() == 1
    assert ax.get_legend_handles_labels()[1] == ["name"]
    style.curves(ax, [], "rate", "#000000", "nothing")
    assert len(ax.lines) == 3
    plt.close()


@pytest.mark.parametrize(
    "seeds, said", [([3], "seed 3"), ([2, 1, 3], "seeds 1 to 3"), ([1, 3], "seeds 1, 3")]
)
def test_a_title_names_the_seeds(seeds, said):
    assert style.seeds([{"seed": seed} for seed in seeds]) == said
