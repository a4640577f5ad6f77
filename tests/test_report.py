"""Numbers and text that a person will read."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from echo_min import report


@pytest.mark.parametrize("k", range(1, 7))
@pytest.mark.parametrize("passed", range(7))
def test_pass_at_k_is_the_share_of_k_trials_that_hold_a_passed_one(passed, k):
    draws = list(combinations([True] * passed + [False] * (6 - passed), k))
    assert report.pass_at_k(passed, 6, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_rate_interval_at_the_edges_and_between():
    assert report.rate_interval([1.0], 5) == (1.0, 0.0, 1.0)
    t2 = 2.365**2  # 7 degrees of freedom
    assert report.rate_interval([1.0] * 8, 40) == (1.0, pytest.approx(1 / (1 + t2 / 8)), 1.0)
    assert report.rate_interval([0.0] * 8, 8) == (0.0, 0.0, pytest.approx(t2 / 8 / (1 + t2 / 8)))

    def wilson(p, n):
        root = (t2 * (p * (1 - p) / n + t2 / (4 * n * n))) ** 0.5
        return pytest.approx((p, *((p + t2 / (2 * n) + s * root) / (1 + t2 / n) for s in (-1, 1))))

    assert report.rate_interval([0.5] * 8, 32) == wilson(0.5, 32)  # alike: every trial counts
    assert report.rate_interval([0.0, 1.0] * 4, 32) == wilson(0.5, 8)  # as unlike as can be: every task does
    assert report.rate_interval([0.0, 0.5, 1.0, 0.5] * 2, 32) == wilson(0.5, 8 * 0.25 / (1 / 7))


@pytest.mark.parametrize("tasks, trials", [(8, 1), (8, 5), (16, 1), (16, 5), (89, 1), (89, 5)])
@pytest.mark.parametrize("concentration", [None, 20, 5, 1], ids="alike beta20 beta5 beta1".split())
def test_rate_interval_covers(tasks, trials, concentration):
    """95 % intervals hold the true rate in at least 90 % of 500 evaluations, near the edge, too; difficulties
    of tasks alike or drawn from a beta distribution."""
    draw = np.random.default_rng(0)
    for k, truth in ((1, 0.05), (1, 0.95), (trials, 0.05)):
        held = 0
        for _ in range(500):
            spread = concentration and (truth * concentration, (1 - truth) * concentration)
            chances = draw.beta(*spread, tasks) if spread else np.full(tasks, truth)
            passed = draw.binomial(trials, chances)
            _, low, high = report.rate_interval(
                [report.pass_at_k(int(c), trials, k) for c in passed], tasks * (trials // k)
            )
            assert 0 <= low < high <= 1
            held += low <= at_least_one(spread, truth, k) <= high
        assert held >= 450, (k, truth, held)


def at_least_one(spread, chance, k):
    """True pass@k: of chances from beta(*spread), or alike."""
    if not spread:
        return 1 - (1 - chance) ** k
    a, b = spread
    return 1 - np.prod([(b + i) / (a + b + i) for i in range(k)])


def line(ce, diversity, reward):
    return {"observation_ce": ce, "command_diversity": diversity, "reward": reward}


@pytest.mark.parametrize(
    "before, now, alarmed",
    [
        (line(2.0, 0.8, 0.3), line(0.5, 0.2, 0.3), True),
        (line(2.0, 0.8, 0.3), line(0.5, 0.2, 0.6), False),  # it learns
        (line(2.0, 0.8, 0.3), line(0.5, 0.7, 0.3), False),  # still varied
        (line(2.0, 0.8, 0.3), line(1.9, 0.2, 0.3), False),  # still surprised
        (line(0.0, 0.0, 0.0), line(0.0, 0.0, 0.0), False),
    ],
)
def test_collapse_alarm(before, now, alarmed):
    history = [before] * 20 + [now] * 20
    assert (report.collapse_alarm(history) is not None) == alarmed
    assert report.collapse_alarm(history[1:]) is None


def test_terminal_output_cannot_act_on_the_screen(tokenizer, tmp_path):
    from echo_min.masking import Role, Transcript, encode
    from echo_min.rollout import Episode
    from echo_min.tasks import Task

    transcript = Transcript()
    transcript.append(Role.OBSERVATION, encode(tokenizer, Role.OBSERVATION, "a\x1b]0;x\x07\nb"))
    shown = report.tokens_with_surprise(tokenizer, transcript, {})
    assert "".join(text for text, _, _ in shown) == "a·]0;x·\nb"
    report.write_transcripts(tmp_path / "t.txt", tokenizer, [Episode(Task("t", "", "", ""), 0, transcript)])
    assert "\x1b" not in (tmp_path / "t.txt").read_text()


def test_a_run_ends_with_what_was_seen():
    runs = ("grpo", 0, 0.01, 0.9), ("grpo", 100, 0.28, 2.084), ("echo", 0, 0.01, 0.9)
    names = "arm", "step", "pass_rate", "expert_ce", "eval_tasks"
    runs += (("echo", 100, 0.7, 0.28),)
    lines = [dict(zip(names, (*run, 200), strict=True)) for run in runs] + [{"arm": "echo", "reward": 1.0}]
    rates, surprise, further = report.seen(lines, Path("runs/x")).splitlines()
    assert rates == "After 100 steps grpo passes 28% and echo passes 70% of 200 held-out tasks."
    assert surprise.endswith("from 0.90 to 2.08 under grpo and 0.90 to 0.28 under echo.")
    assert "runs/x/index.html" in further and "source .venv/bin/activate" in further


def test_a_line_keeps_six_digits(tmp_path):
    report.log(tmp_path / "m.jsonl", {"a": 0.123456789, "n": 7, "arm": "echo"})
    assert report.read(tmp_path / "m.jsonl") == [{"a": 0.123457, "n": 7, "arm": "echo"}]
