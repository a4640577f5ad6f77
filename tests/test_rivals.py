"""The rivals of ECHO: what each makes of a batch, number by number."""

import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "figures"))

import rival_curves  # noqa: E402
import rivals  # noqa: E402

import train  # noqa: E402
from echo_min.batch import make_batch  # noqa: E402
from echo_min.config import Config  # noqa: E402
from echo_min.evaluate import observation_logprobs  # noqa: E402
from echo_min.masking import Role, Transcript, encode  # noqa: E402
from echo_min.rollout import Episode, StopReason  # noqa: E402
from echo_min.tasks import Task  # noqa: E402

CONFIG = Config(device="cpu", arms="echo", env_weight=1.0)
TYPED = ["tk align -k acorn", "tk align -z acorn", "ls -k", ""]  # shares of right words: 1, 3/4, 0, none
TOLD = ["ok acorn\n", "usage: tk align -k FILE\n", "ls: cannot access\n", ""]


@pytest.fixture
def context(model, tokenizer):
    """One group of four: a pass, a usage line, another error, no command."""
    episodes = []
    for command, output in zip(TYPED, TOLD, strict=True):
        transcript = Transcript()
        for role, text in ((Role.PROMPT, "align acorn"), (Role.ACTION, command), (Role.OBSERVATION, output)):
            ids = encode(tokenizer, role, text) if text else []
            transcript.append(role, ids, [-1.0] * len(ids) if role == Role.ACTION else None)
        task = Task("task", "align acorn", "exit 1", "tk align -k acorn")
        found = {"reward": float(output.startswith("ok")), "stop": StopReason.MAX_TURNS}
        episodes.append(Episode(task, 0, transcript, commands=[command] if command else [], **found))
    return train.Context(episodes, model, tokenizer, 0, CONFIG, (), {})


def advantages(rewards, bonus):
    r, bonus = torch.tensor(rewards), torch.tensor(bonus)
    return (r - r.mean()) / (r.std() + 1e-6) + bonus - bonus.mean()


def test_right_words_are_rewarded(context):
    batch = make_batch(context.episodes, CONFIG)
    after = rivals.process(batch, context, strength=0.5)
    torch.testing.assert_close(after.advantages, advantages([1.0, 0, 0, 0], [0.5, 0.375, 0.0, 0.0]))
    context.episodes[3].commands = ["tk align -z cedar", "tk align -k cedar too"]  # 2/4, 3/5
    after = rivals.process(batch, context, strength=0.5)
    torch.testing.assert_close(after.advantages, advantages([1.0, 0, 0, 0], [0.5, 0.375, 0.0, 0.3]))
    assert torch.equal(after.rewards, batch.rewards) and after.targets is after.ids is batch.ids


def test_surprise_is_rewarded(context):
    batch = make_batch(context.episodes, CONFIG)
    found = observation_logprobs(context.model, [e.transcript for e in context.episodes], CONFIG)
    nats = [-fmean(one.values()) if one else 0.0 for one in found]
    after = rivals.curiosity(batch, context, strength=0.1)
    expected = advantages([1.0, 0, 0, 0], [0.1 * nat for nat in nats])
    assert min(nats[:3]) > 1 and nats[3] == 0
    torch.testing.assert_close(after.advantages, expected)


def test_a_bonus_is_compared_within_its_group_and_its_strength_counts(context):
    batch = make_batch(context.episodes, CONFIG)
    groups = torch.tensor([5, 5, 2, 2])
    batch = replace(batch, groups=groups, advantages=torch.zeros(4))
    for strength in (1.0, 10.0):
        after = rivals.rewarded(batch, strength * torch.tensor([1.0, 2.0, 7.0, 7.0]))
        torch.testing.assert_close(after.advantages, strength * torch.tensor([-0.5, 0.5, 0.0, 0.0]))


def test_the_printed_line_is_typed(context, tokenizer):
    batch = make_batch(context.episodes, CONFIG)
    after = rivals.hindsight(batch, context)
    assert torch.equal(after.advantages, torch.cat([batch.advantages, torch.zeros(1)]))
    width = batch.ids.shape[1]
    assert torch.equal(after.action_mask[:4, :width], batch.action_mask)
    assert not after.action_mask[4].any() and not after.observation_mask[:4].any()
    typed = after.targets[4][after.observation_mask[4]].tolist()
    assert tokenizer.decode(typed) == "tk align -k acorn<|im_end|>"
    before = tokenizer.decode(after.ids[4, : int(after.observation_mask[4].int().argmax())])
    assert before == "<|im_start|>user\nalign acorn<|im_end|>\n<|im_start|>assistant\n"
    weights = after.observation_weights[4][after.observation_mask[4]]
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / (4 * len(typed))))  # a share of B rows
    context.episodes.pop(1)
    batch = make_batch(context.episodes, CONFIG)
    assert rivals.hindsight(batch, context) is batch


def test_every_job_has_its_change_and_its_rollouts():
    found, jobs = rivals.changes(), rival_curves.jobs()
    assert len(jobs) == 12 + 3 * len(rival_curves.BEST)
    for key, (arm, control, config) in jobs.items():
        name, strength, _ = key.split("/")
        assert control == "" if name == "imitate" else control in found
        assert arm == ("echo" if name == "hindsight" else "grpo")
        assert name != "hindsight" or config.env_weight == float(strength)
        assert name != "imitate" or config.steps + int(strength) == (100 if config.seed == 101 else 150)
