"""Numbers over seeds, against published values and against simulation."""

import random
import sys
from math import isnan, nan
from pathlib import Path
from statistics import fmean, stdev

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "figures"))

import stats


def test_mean_interval():
    mean, half = stats.mean_interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.303 / 3**0.5))
    _, wide = stats.mean_interval([float(i % 2) for i in range(11)])
    assert wide == pytest.approx(2.228 * 0.5222 / 11**0.5, rel=0.01)


@pytest.mark.parametrize("freedom, t, p", [
    (1, 12.706, 0.05), (1, 63.657, 0.01), (1, 1.0, 0.5), (2, 4.303, 0.05), (2, 9.925, 0.01), (2, 0.816, 0.5),
    (3, 3.182, 0.05), (3, 12.924, 0.001), (4, 2.776, 0.05), (4, 8.610, 0.001), (5, 2.571, 0.05),
    (6, 2.447, 0.05), (9, 2.262, 0.05), (10, 4.587, 0.001), (29, 2.045, 0.05), (60, 2.000, 0.05),
])  # fmt: skip
def test_p_values_are_those_of_the_printed_table(freedom, t, p):
    assert stats.two_sided_p(t, freedom) == pytest.approx(p, rel=0.004)
    assert stats.two_sided_p(-t, freedom) == stats.two_sided_p(t, freedom)


def test_p_of_nothing_is_one_and_of_much_is_small():
    for freedom in range(1, 12):
        assert stats.two_sided_p(0.0, freedom) == 1.0
        assert 0 <= stats.two_sided_p(1e5, freedom) < 1e-5
    assert stats.two_sided_p(3.0, 2) == pytest.approx(1 - 3 / 11**0.5)  # a closed form


def test_paired_p_is_student_s():
    differences = [0.1, 0.3, 0.2, 0.05, 0.25]
    t = fmean(differences) / (stdev(differences) / 5**0.5)
    assert stats.paired_p(differences) == stats.two_sided_p(t, 4)
    mean, half = stats.mean_interval(differences)
    at_the_edge = [d - mean + half for d in differences]  # the 95 % interval just reaches 0
    assert stats.paired_p(at_the_edge) == pytest.approx(0.05, abs=1e-4)
    assert isnan(stats.paired_p([0.1])) and isnan(stats.paired_p([]))
    assert stats.paired_p([0.0, 0.0]) == 1.0 and stats.paired_p([0.1, 0.1]) == 0.0


def test_under_no_difference_one_in_twenty_is_significant():
    rng = random.Random(1)
    runs = [stats.paired_p([rng.gauss(0, 1) for _ in range(5)]) for _ in range(4000)]
    assert fmean(p < 0.05 for p in runs) == pytest.approx(0.05, abs=0.011)


def test_holm_by_hand():
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    assert stats.holm(p) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert stats.holm({"a": 0.9, "b": 0.6}) == {"a": 1.0, "b": 1.0}
    some = stats.holm({"a": 0.01, "b": nan, "c": 0.2})
    assert some["a"] == pytest.approx(0.03) and some["c"] == pytest.approx(0.4) and isnan(some["b"])


def test_rank_correlation():
    assert stats.ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]
    assert stats.spearman([(1, 10), (2, 20), (3, 15), (4, 90)]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert stats.spearman([(1, 9), (2, 4), (3, 1)]) == pytest.approx(-1)
    assert isnan(stats.spearman([(1, 2), (1, 3)])) and stats.rank_text([(1, 2), (2, 3)]) == "–"
    assert stats.rank_text([(1, 2), (2, 2), (3, 2)]) == "–"
    rng = random.Random(2)
    pairs = [(i, i + rng.gauss(0, 4)) for i in range(20)]
    text = stats.rank_text(pairs)
    value, low, high = (float(part.strip("[],")) for part in text.split())
    assert value == round(stats.spearman(pairs), 2) and 0 < low < value < high <= 1
    assert stats.rank_text(pairs) == text  # drawn with a seed of its own


def test_a_share_is_of_means_and_its_interval_fiellers():
    whole, part = [0.5, 0.5, 0.4], [0.4, 0.4, 0.3]
    text = stats.share_text(whole, part)
    assert text.startswith("79% [")
    low, high = map(int, text[5:-1].split(","))
    for percent, inside in ((low, True), (low - 1, False), (high, True), (high + 1, False)):
        mean, half = stats.mean_interval([p - percent / 100 * w for p, w in zip(part, whole, strict=True)])
        assert (abs(mean) <= half) == inside
    assert low < 79 < high
    assert stats.share_text([0.3, 0.3, 0.3], [20, 20, 21]) == "6778%"  # beyond what is looked through
    assert stats.share_text([0.5, -0.5, 0.4], part) == stats.share_text([0.5], [0.4]) == "–"


def test_a_curve_is_read_between_its_evaluations():
    lines = [{"seed": 1, "step": step, "pass_rate": rate} for step, rate in ((20, 0.0), (45, 0.5), (50, 0.7))]
    lines += [{"seed": 1, "step": 30, "few": 1.0}, {"seed": 2, "step": 0, "pass_rate": 0.9}]
    assert stats.between(lines[:4], 50) == {1: pytest.approx((0.1 + 0.7) / 2)}
    whole = [{"seed": 3, "step": step, "pass_rate": step / 100} for step in (0, 25, 50)]
    assert stats.between(whole, 50) == {3: pytest.approx(0.375)} and stats.between([], 50) == {}
