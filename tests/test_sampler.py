"""Sampling with the row cache: the same logprobs as a full forward pass, whatever the batch, the lengths, the
turns."""

import numpy as np
import pytest
import torch

from echo_min.config import RunStopped
from echo_min.policy import marker_ids
from echo_min.sampler import Sampler


def uniform(rows, n, seed=0):
    return np.random.default_rng(seed).random((rows, n))


def play(model, stop_ids, prompts, turns, noise, max_new=9, temperature=0.8, leave=()):
    """-> per row: (ids, logprobs or None) of the whole dialogue. Rows in `leave` stop after the first
    turn."""
    sampler = Sampler(model, stop_ids, temperature, noise)
    story = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    for turn in range(turns):
        rows = [r for r in rows if turn == 0 or r not in leave]
        new = [prompts[r] if turn == 0 else [5 + turn] * (1 + (r * 7 + turn) % 11) for r in rows]
        for r, ids, (reply, logps) in zip(rows, new, sampler.reply(rows, new, max_new), strict=True):
            story[r] += [(i, None) for i in ids] + list(zip(reply, logps, strict=True))
    return story


def full_logprobs(model, ids, temperature):
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].float() / temperature
    return torch.log_softmax(logits, -1)


def test_cached_logprobs_equal_a_full_forward(model, tokenizer):
    prompts = [[3] * 5, [7, 8], [9] * 17, [4, 5, 6], [11] * 70]
    story = play(model, set(marker_ids(tokenizer)), prompts, 5, uniform(5, 99), leave={1, 3})
    checked = 0
    for row in story:
        ids = [i for i, _ in row]
        reference = full_logprobs(model, ids, 0.8)
        for t, (i, logp) in enumerate(row):
            if logp is not None:
                assert abs(reference[t - 1, i].item() - logp) < 1e-5
                checked += 1
    assert checked > 60


def test_a_rollout_does_not_depend_on_its_batch(model, tokenizer):
    stop, prompts, noise = set(marker_ids(tokenizer)), [[3] * 5, [7, 8], [9] * 17], uniform(3, 60)
    together = play(model, stop, prompts, 3, noise)
    sampler = Sampler(model, stop, 0.8, noise[1:2])
    alone = [(7, None), (8, None)]
    new = [7, 8]
    for turn in range(3):
        if turn:
            new = [5 + turn] * (1 + (7 + turn) % 11)
            alone += [(i, None) for i in new]
        ((reply, logps),) = sampler.reply([0], [new], 9)
        alone += list(zip(reply, logps, strict=True))
    assert [i for i, _ in alone] == [i for i, _ in together[1]]


def test_sampled_frequencies_follow_the_softmax(model):
    n, temperature = 4000, 0.7
    sampler = Sampler(model, set(), temperature, uniform(n, 1, seed=3))
    replies = sampler.reply(list(range(n)), [[3, 4, 5]] * n, 1)
    counts = torch.bincount(torch.tensor([ids[0] for ids, _ in replies]), minlength=model.config.vocab_size)
    p = full_logprobs(model, [3, 4, 5], temperature)[-1].exp()
    sigma = (p * (1 - p) / n).sqrt()
    assert ((counts / n - p).abs() < 5 * sigma + 1e-3).all()
    assert (counts / n - p).abs().sum() < 0.3


def test_greedy_takes_the_most_likely(model):
    sampler = Sampler(model, set(), 1.0, None)
    ((ids, _),) = sampler.reply([0], [[3, 4, 5]], 6)
    for t in range(6):
        assert ids[t] == full_logprobs(model, [3, 4, 5, *ids[:t]], 1.0)[-1].argmax()


def test_reply_ends_at_a_stop_id_or_the_limit(model):
    everything = set(range(model.config.vocab_size))
    (reply,) = Sampler(model, everything, 1.0, uniform(1, 9)).reply([0], [[3]], 9)
    assert len(reply[0]) == 1
    (reply,) = Sampler(model, set(), 1.0, uniform(1, 9)).reply([0], [[3]], 9)
    assert len(reply[0]) == 9


def test_logits_that_are_not_finite_stop_the_run(model):
    with torch.no_grad():
        model.get_output_embeddings().weight[:] = float("nan")
    with pytest.raises(RunStopped, match="not finite"):
        Sampler(model, set(), 1.0, uniform(1, 9)).reply([0], [[3]], 9)
