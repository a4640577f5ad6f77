"""Numbers over seeds: lines of figures/data picked, averaged, compared."""

from statistics import fmean, stdev

from echo_min.report import student


def pick(lines: list[dict], **wanted) -> list[dict]:
    return [line for line in lines if all(line.get(k) == v for k, v in wanted.items())]


def by_seed(lines: list[dict], key: str, **wanted) -> dict[int, float]:
    """seed -> value; several lines of a seed are averaged."""
    found: dict[int, list[float]] = {}
    for line in pick(lines, **wanted):
        if key in line:
            found.setdefault(line["seed"], []).append(line[key])
    return {seed: fmean(values) for seed, values in sorted(found.items())}


def mean_interval(values: list[float]) -> tuple[float, float]:
    """-> (mean, half-width of its 95 % interval). One value has no interval: (value, nan)."""
    n = len(values)
    return fmean(values), student(n) * stdev(values) / n**0.5 if n > 1 else float("nan")


def interval(values: list[float]) -> str:
    """mean ± half-width of the 95 % interval; one seed has none."""
    if len(values) < 2:
        return f"{values[0]:.3f} (one seed)" if values else "–"
    return "{:.3f} ± {:.3f}".format(*mean_interval(values))


def paired(a: dict[int, float], b: dict[int, float]) -> list[float]:
    """b - a for the seeds that both have."""
    return [b[seed] - a[seed] for seed in a if seed in b]
