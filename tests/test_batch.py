"""From episodes to one Batch, and from a Batch to micro-batches."""

from dataclasses import fields, replace

import pytest
import torch

from echo_min.batch import Batch, make_batch
from echo_min.config import Config
from echo_min.echo import observation_mask, observation_weights, predictable
from echo_min.masking import Role
from echo_min.rollout import Episode, StopReason
from echo_min.tasks import Task

LENGTHS = [5, 9, 2, 7, 7, 1, 30]
DTYPES = {
    torch.int64: ("ids", "targets", "groups", "lengths"),
    torch.bool: ("action_mask", "observation_mask"),
    torch.float32: ("action_weights", "observation_weights", "sampler_logprobs", "advantages", "rewards"),
}


def episode(*segments, reward=0.0, group=0, stop=StopReason.DONE):
    """segments: (role, number of tokens); tokens count up from 10."""
    e, at = Episode(Task("t", "", "", ""), group, reward=reward, stop=stop), 10
    for role, n in segments:
        ids = list(range(at, at + n))
        e.transcript.append(role, ids, [-0.5 * i for i in ids] if role is Role.ACTION else None)
        at += n
    return e


PROMPT, ACTION, OUTPUT, WARNING, SCAFFOLD = Role
TIMEOUT, FAILED = StopReason.AGENT_TIMEOUT, StopReason.INFRA_ERROR  # not valid
EPISODES = [  # 9 tokens, 8, 5, two that are not valid, 3
    episode((PROMPT, 2), (ACTION, 2), (SCAFFOLD, 1), (OUTPUT, 3), (ACTION, 1), reward=1.0, group=4),
    episode((PROMPT, 2), (ACTION, 1), (SCAFFOLD, 1), (WARNING, 2), (OUTPUT, 2), group=4),
    episode((PROMPT, 1), (ACTION, 4), group=7, stop=StopReason.MAX_TURNS),
    episode((PROMPT, 1), (ACTION, 1), (OUTPUT, 9), reward=1.0, group=7, stop=TIMEOUT),
    episode((PROMPT, 1), (ACTION, 1), (OUTPUT, 9), reward=float("nan"), group=4, stop=FAILED),
    episode((PROMPT, 1), (ACTION, 1), (OUTPUT, 1), group=7, stop=StopReason.CONTEXT_FULL),
]
VALID = [0, 1, 2, 5]


def test_every_field_has_the_shape_and_dtype_that_it_says():
    batch = make_batch(EPISODES, Config())
    assert {f.name for f in fields(Batch)} == {name for names in DTYPES.values() for name in names}
    for dtype, name in ((dtype, name) for dtype, names in DTYPES.items() for name in names):
        value = getattr(batch, name)
        one = name in ("advantages", "rewards", "groups", "lengths")
        assert value.dtype == dtype and value.shape == ((4,) if one else (4, 9)), name
    assert len(batch) == 4


def test_what_a_batch_holds_of_its_episodes():
    batch = make_batch(EPISODES, Config())
    for row, number in enumerate(VALID):  # invalid episodes are left out, the others keep their order
        transcript = EPISODES[number].transcript
        n = len(transcript)
        assert batch.lengths[row] == n
        assert batch.ids[row, :n].tolist() == transcript.ids and not batch.ids[row, n:].any()
        assert torch.equal(batch.targets[row], batch.ids[row])
        assert batch.action_mask[row, :n].tolist() == [role == ACTION for role in transcript.roles]
        assert batch.observation_mask[row, :n].tolist() == [role == OUTPUT for role in transcript.roles]
        assert batch.sampler_logprobs[row, :n].tolist() == transcript.logprobs
        padding = batch.action_mask, batch.observation_mask, batch.action_weights, batch.observation_weights
        assert not any(value[row, n:].any() for value in padding)
    assert batch.rewards.tolist() == [1, 0, 0, 0] and batch.groups.tolist() == [4, 4, 7, 7]
    root = 0.5**0.5  # what is not valid is in no group's mean, std or count
    assert batch.advantages.tolist() == pytest.approx([root, -root, 0, 0], abs=2e-6)


def row_weights(**settings):
    """-> per rollout: the weight of an action, of a target (0 if it has none)."""
    batch = make_batch(EPISODES, replace(Config(), **settings))
    both = batch.action_weights, batch.observation_weights
    return [[row.max().item() for row in weights] for weights in both]


def test_a_batch_reads_the_settings_of_the_objective():
    actions, targets = row_weights()
    assert actions == pytest.approx([1 / (4 * 3), 1 / (4 * 1), 1 / (4 * 4), 1 / (4 * 1)])
    assert targets == pytest.approx([1 / (4 * 3), 1 / (4 * 4), 0, 1 / (4 * 1)])
    assert row_weights(policy_norm="token")[0] == pytest.approx([1 / (2 * 4)] * 2 + [1 / (2 * 5)] * 2)
    assert row_weights(observation_norm="selected")[1] == pytest.approx([1 / 12, 1 / 8, 0, 1 / 4])
    assert row_weights(observation_norm="global")[1] == pytest.approx([1 / 6, 1 / 6, 0, 1 / 6])
    assert row_weights(observation_norm="global", parsed_only=True)[1] == pytest.approx([1 / 4, 0, 0, 1 / 4])
    everything = row_weights(observation_norm="global", warnings_as_targets=True)
    assert everything[1] == pytest.approx([1 / 8, 1 / 8, 0, 1 / 8])
    assert make_batch(EPISODES, Config(warnings_as_targets=True)).observation_mask.sum() == 8


@pytest.mark.parametrize("norm", ["selected", "global"])
def test_what_is_left_of_the_targets_weighs_as_much_as_all_of_them(norm):
    roles = torch.tensor([[0, 2, 2, 4], [3, 2, 2, 2], [1, 2, 4, 4]], dtype=torch.int8)
    parsed = observation_mask(roles, parsed_only=True)
    assert parsed.tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    weights = observation_weights(roles, parsed, norm)
    assert not weights[1].any()  # a malformed reply: none of the rollout's targets
    if norm == "global":
        assert weights.sum().item() == pytest.approx(1)
        assert weights[parsed].tolist() == pytest.approx([1 / 3] * 3)
    else:
        assert weights.sum(1).tolist() == pytest.approx([1 / 3, 0, 1 / 3])


# ---- micro-batches ----


def batch_of(lengths):
    numbered = enumerate(lengths)
    return make_batch([episode((PROMPT, n - 1), (OUTPUT, 1), group=i) for i, n in numbered], Config())


@pytest.mark.parametrize("tokens", [1, 9, 14, 20, 29, 30, 60, 209, 210, 10**6])
def test_micro_batches_hold_every_rollout_once_within_the_budget(tokens):
    parts = list(batch_of(LENGTHS).micro_batches(tokens))
    rows = [row for part in parts for row in part.groups.tolist()]
    assert sorted(rows) == list(range(7))
    for part in parts:
        width = max(LENGTHS[row] for row in part.groups.tolist())
        assert part.ids.shape == (len(part), width)  # no padding that none of them needs
        assert len(part) == 1 or len(part) * width <= tokens
    if tokens >= 7 * 30:  # one part will do: then the rollouts keep their order
        assert rows == list(range(7)) and len(parts) == 1
    else:
        assert [LENGTHS[row] for row in rows] == sorted(LENGTHS, reverse=True)
    if tokens == 20:
        assert [part.lengths.tolist() for part in parts] == [[30], [9, 7], [7, 5], [2, 1]]
    if tokens == 14:  # exactly full
        assert [part.lengths.tolist() for part in parts] == [[30], [9], [7, 7], [5, 2], [1]]


def test_a_part_is_the_same_rows_of_every_field():
    batch = make_batch(EPISODES, Config())
    part = batch.part([3, 1])
    for f in fields(Batch):
        whole, cut = getattr(batch, f.name), getattr(part, f.name)
        assert torch.equal(cut, whole[[3, 1], :8] if whole.dim() == 2 else whole[[3, 1]]), f.name
        assert cut.dtype == whole.dtype
    moved = batch.part([0], "meta")
    assert {getattr(moved, f.name).device.type for f in fields(Batch)} == {"meta"}
    assert {part.ids.device.type for part in batch.micro_batches(9, "meta")} == {"meta"}


def test_predictable_output():
    """Mean nats per token below 0.1, row by row; a rollout without targets is not predictable."""
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 0], [0, 0, 1], [1, 0, 0]], dtype=torch.bool)
    logprobs = -torch.tensor([0.05, 0.14, 0.05, 0.14, 0.12, 0.1, 0.0])
    assert predictable(logprobs, mask).tolist() == [True, False, False, False, True]
    assert predictable(torch.empty(0), torch.zeros(2, 3, dtype=torch.bool)).tolist() == [False, False]
