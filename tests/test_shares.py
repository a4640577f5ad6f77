"""How several processes share a batch out and add up what each made of it: two real ones, with gloo."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from echo_min import ranks
from echo_min.batch import make_batch
from echo_min.config import Config
from echo_min.masking import Role
from echo_min.rollout import Episode, StopReason
from echo_min.worlds.registry import load_world


def batch_of(lengths):
    episodes = []
    for length in lengths:
        episode = Episode(load_world("tool", 1).train[0], 0, reward=1.0, stop=StopReason.DONE)
        episode.transcript.append(Role.PROMPT, [1, 2])
        episode.transcript.append(Role.ACTION, [3] * length, [-0.5] * length)
        episode.transcript.append(Role.OBSERVATION, [4] * length)
        episodes.append(episode)
    return make_batch(episodes, Config())


def rank(monkeypatch, which, world=2):
    monkeypatch.setattr(ranks, "RANK", which)
    monkeypatch.setattr(ranks, "WORLD", world)


def test_shares_are_disjoint_and_whole(monkeypatch):
    shares = []
    for which in range(3):
        rank(monkeypatch, which, 3)
        shares.append(ranks.mine(list(range(8))))
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]


@pytest.mark.parametrize("lengths", [[3], [3, 4], [3, 4, 5]])
def test_every_rank_has_as_many_micro_batches_and_blanks_weigh_nothing(monkeypatch, lengths):
    parts = [*batch_of(lengths).micro_batches(1)]
    assert len(parts) == len(lengths)
    found = []
    for which in range(2):
        rank(monkeypatch, which)
        found.append(ranks.share(parts))
    assert len(found[0]) == len(found[1]) == -(-len(lengths) // 2)
    for name in ("action_mask", "observation_mask"):
        assert sum(getattr(part, name).sum() for own in found for part in own) == sum(lengths)
    assert {id(part) for own in found for part in own} >= {id(part) for part in parts}


def one_of_two(which, store):
    ranks.RANK, ranks.WORLD = which, 2
    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=60), 2, which)
    for many in (1, 4, 5):
        items = [f"episode {i}" for i in range(many)]
        assert ranks.gather([item.upper() for item in ranks.mine(items)]) == [i.upper() for i in items]
    model = torch.nn.Linear(2, 1)
    model.weight.grad = torch.full((1, 2), which + 1.0)
    model.bias.grad = None if which else torch.tensor([3.0])
    assert ranks.add_up(model, {"loss": 0.5 + which, "ratio": 1.0}) == {"loss": 2.0, "ratio": 2.0}
    assert model.weight.grad.tolist() == [[3.0, 3.0]] and model.bias.grad.tolist() == [3.0]
    dist.destroy_process_group()


def test_what_ranks_made_comes_back_in_order_and_gradients_and_metrics_are_added_up(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (tmp_path / "store",), nprocs=2)  # ends both when one fails


def test_one_process_changes_nothing():
    model = torch.nn.Linear(2, 1)
    assert ranks.add_up(model, metrics := {"loss": 1.0}) is metrics and model.weight.grad is None
    assert ranks.gather([1, 2]) == ranks.mine([1, 2]) == [1, 2]
