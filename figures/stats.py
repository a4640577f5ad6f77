"""Numbers over seeds: lines of figures/data picked, averaged, compared."""

import random
from math import atan2, cos, isnan, nan, pi, sin
from statistics import correlation, fmean, stdev

import numpy as np

from echo_min.report import student


def pick(lines: list[dict], **wanted) -> list[dict]:
    return [line for line in lines if all(line.get(k) == v for k, v in wanted.items())]


def of(lines: list[dict], *parts: str) -> list[dict]:
    """The lines whose key begins with these parts."""
    return [line for line in lines if line["key"].startswith("/".join(parts) + "/")]


def by_seed(lines: list[dict], key: str, **wanted) -> dict[int, float]:
    """seed -> value; several lines of a seed are averaged."""
    found: dict[int, list[float]] = {}
    for line in pick(lines, **wanted):
        if key in line:
            found.setdefault(line["seed"], []).append(line[key])
    return {seed: fmean(values) for seed, values in sorted(found.items())}


def between(lines: list[dict], steps: int) -> dict[int, float]:
    """seed -> mean pass rate over steps 25, 50, ... `steps`, on the straight lines between evaluations."""
    found = {}
    for seed in sorted({line["seed"] for line in lines}):
        mine = [line for line in pick(lines, seed=seed) if "pass_rate" in line]
        own = sorted((line["step"], line["pass_rate"]) for line in mine)
        found[seed] = float(np.interp(range(25, steps + 1, 25), *zip(*own, strict=True)).mean())
    return found


def mean_interval(values: list[float]) -> tuple[float, float]:
    """-> (mean, half-width of its 95 % interval). One value has no interval: (value, nan)."""
    n = len(values)
    return fmean(values), student(n) * stdev(values) / n**0.5 if n > 1 else float("nan")


def pooled_halves(groups: list[list[float]]) -> list[float]:
    """Half-width of the 95 % interval of each group's mean, by the one spread that all groups are taken to
    have: a few seeds a group tell it badly, all together well. nan for a group without values."""
    freedom = sum(len(group) - 1 for group in groups if group)
    if freedom < 1:
        return [nan] * len(groups)
    squares = sum((value - fmean(group)) ** 2 for group in groups if group for value in group)
    half = student(freedom + 1) * (squares / freedom) ** 0.5
    return [half / len(group) ** 0.5 if group else nan for group in groups]


def interval(values: list[float]) -> str:
    """mean ± half-width of the 95 % interval; one seed has none."""
    if len(values) < 2:
        return f"{values[0]:.3f} (one seed)" if values else "–"
    return "{:.3f} ± {:.3f}".format(*mean_interval(values))


def share_text(whole: list[float], part: list[float]) -> str:
    """part / whole [95 % interval, in percent], paired: the shares from -1000 to 1000 from which the part is
    not told (Fieller). A whole that is not told from 0 has none."""
    if len(whole) < 2 or mean_interval(whole)[0] <= mean_interval(whole)[1]:
        return "–"
    told = []
    for percent in range(-1000, 1001):
        mean, half = mean_interval([p - percent / 100 * w for p, w in zip(part, whole, strict=True)])
        told += [percent] * (abs(mean) <= half)
    share = f"{fmean(part) / fmean(whole):.0%}"
    return f"{share} [{told[0]}, {told[-1]}]" if told and told[0] > -1000 and told[-1] < 1000 else share


def p_text(p: float) -> str:
    return "–" if isnan(p) else "< .001" if p < 0.001 else f"{p:.3f}"


def difference(a: dict[int, float], b: dict[int, float]) -> dict[int, float]:
    """seed -> b - a, for the seeds that both have."""
    return {seed: b[seed] - a[seed] for seed in a if seed in b}


def paired(a: dict[int, float], b: dict[int, float]) -> list[float]:
    return list(difference(a, b).values())


def two_sided_p(t: float, freedom: int) -> float:
    """How likely |T| > |t| is for Student's t with so many degrees of freedom. Exact: a finite series in the
    angle whose tangent is t / sqrt(freedom)."""
    angle = atan2(abs(t), freedom**0.5)
    cosine, term, total = cos(angle), 1.0, 0.0
    if freedom % 2:
        for k in range(1, freedom, 2):  # cos + 2/3 cos^3 + 2/3 4/5 cos^5 + ...
            term *= cosine if k == 1 else (k - 1) / k * cosine**2
            total += term
        return max(0.0, 1 - 2 / pi * (angle + sin(angle) * total))
    for k in range(0, freedom, 2):  # 1 + 1/2 cos^2 + 1/2 3/4 cos^4 + ...
        term *= (k - 1) / k * cosine**2 if k else 1.0
        total += term
    return max(0.0, 1 - sin(angle) * total)


def paired_p(differences: list[float]) -> float:
    """Paired t-test: how likely a mean difference at least this far from 0 is if the true one is 0. Fewer
    than two seeds say nothing: nan."""
    n = len(differences)
    if n < 2:
        return nan
    mean, error = fmean(differences), stdev(differences) / n**0.5
    if error == 0:
        return 0.0 if mean else 1.0
    return two_sided_p(mean / error, n - 1)


def holm(p: dict[str, float]) -> dict[str, float]:
    """Holm's correction for all the comparisons that were planned; one without data (nan) counts, too."""
    known = sorted((name for name in p if not isnan(p[name])), key=p.__getitem__)
    corrected, largest = dict.fromkeys(p, nan), 0.0
    for i, name in enumerate(known):
        largest = max(largest, min(1.0, (len(p) - i) * p[name]))
        corrected[name] = largest
    return corrected


def ranks(values: list[float]) -> list[float]:
    """1 for the smallest; equal values share the mean of their ranks."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def spearman(pairs: list[tuple[float, float]]) -> float:
    """Rank correlation; nan where one side does not vary."""
    x, y = (ranks(list(side)) for side in zip(*pairs, strict=True))
    return correlation(x, y) if len(set(x)) > 1 < len(set(y)) else nan


def rank_text(pairs: list[tuple[float, float]], draws: int = 2000) -> str:
    """Spearman's correlation [95 % interval of a bootstrap over the pairs]; needs three, which vary."""
    if len(pairs) < 3 or isnan(spearman(pairs)):
        return "–"
    rng = random.Random(1)
    found = (spearman(rng.choices(pairs, k=len(pairs))) for _ in range(draws))
    drawn = sorted(value for value in found if not isnan(value))
    low, high = (drawn[int(share * len(drawn))] for share in (0.025, 0.975))
    return f"{spearman(pairs):.2f} [{low:.2f}, {high:.2f}]"
