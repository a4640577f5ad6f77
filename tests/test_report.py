"""Numbers and text that a person will read."""

import pytest

from echo_min import report


def test_intervals():
    mean, half = report.mean_interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.303 / 3**0.5))
    _, wide = report.mean_interval([float(i % 2) for i in range(11)])
    assert wide == pytest.approx(2.228 * 0.5222 / 11**0.5, rel=0.01)
    low, high = report.wilson_interval(0, 20)
    assert low == 0 and high == pytest.approx(0.161, abs=0.001)


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
