"""Sampling with the row cache: the same logprobs as a full forward pass, whatever the batch, the lengths, the
turns."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from echo_min.config import Config, RunEnded
from echo_min.policy import marker_ids
from echo_min.sampler import RowCache, Sampler

CONFIG = Config(temperature=0.8, context=1000)


def noise(*rows):
    return {row: np.random.default_rng((7, row)) for row in rows}


def play(model, stop_ids, prompts, turns, max_new=9, config=CONFIG, leave=(), enter=None):
    """-> per row: (ids, logprobs or None) of the whole dialogue. Rows in `leave` stop after the first turn;
    row enter[0] comes at turn enter[1]."""
    rows = sorted(prompts)
    sampler = Sampler(model, stop_ids, config, noise(*rows))
    story, here = {row: [] for row in prompts}, [row for row in rows if not enter or row != enter[0]]
    for turn in range(turns):
        here = [r for r in here if turn == 0 or r not in leave]
        if enter and turn == enter[1]:
            here.append(enter[0])
        said = {r: len(story[r]) for r in here}
        new = [[5 + n % 9] * (1 + (r * 7 + n) % 11) if n else prompts[r] for r, n in said.items()]
        for r, ids, (reply, logps) in zip(here, new, sampler.reply(here, new, max_new), strict=True):
            story[r] += [(i, None) for i in ids] + list(zip(reply, logps, strict=True))
    return story, sampler


def full_logprobs(model, ids, temperature):
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].float() / temperature
    return torch.log_softmax(logits, -1)


def check(model, story, at_least, temperature=0.8):
    """Every sampled token's logprob is that of a full forward pass."""
    checked = 0
    for row in story.values():
        ids = [i for i, _ in row]
        reference = full_logprobs(model, ids, temperature)
        for t, (i, logp) in enumerate(row):
            if logp is not None:
                assert abs(reference[t - 1, i].item() - logp) < 1e-5
                checked += 1
    assert checked > at_least


def ids_of(story):
    return {row: [i for i, _ in tokens] for row, tokens in story.items()}


PROMPTS = {0: [3] * 5, 1: [7, 8], 2: [9] * 17, 3: [4, 5, 6], 4: [11] * 70}


def test_cached_logprobs_equal_a_full_forward(model, tokenizer):
    story, _ = play(model, set(marker_ids(tokenizer)), PROMPTS, 5, leave={1, 3})
    check(model, story, 60)


@pytest.mark.parametrize("budget", [1, 20, 100])
def test_a_prompt_read_in_parts_is_the_prompt(model, tokenizer, monkeypatch, budget):
    ends, parts, real = set(marker_ids(tokenizer)), [], Sampler._forward

    def counted(self, ids, *rest):
        parts.append(ids.shape)
        return real(self, ids, *rest)

    whole, _ = play(model, ends, PROMPTS, 4, leave={3})
    monkeypatch.setattr(Sampler, "_forward", counted)
    story, _ = play(model, ends, PROMPTS, 4, leave={3}, config=replace(CONFIG, prefill_tokens=budget))
    assert ids_of(story) == ids_of(whole)
    check(model, story, 60)
    assert all(n * T <= budget or T == 1 for n, T in parts)
    assert len({n for n, _ in parts}) > 2  # rows that are read drop out


def test_a_rollout_does_not_depend_on_its_batch(model, tokenizer):
    ends = set(marker_ids(tokenizer))
    together, _ = play(model, ends, PROMPTS, 3)
    for row, prompt in PROMPTS.items():
        assert ids_of(play(model, ends, {row: prompt}, 3)[0])[row] == ids_of(together)[row]


def test_an_episode_that_enters_late_gets_the_same_tokens(model, tokenizer):
    ends = set(marker_ids(tokenizer))
    for late in (1, 4):
        story, _ = play(model, ends, PROMPTS, 4, leave={0, 2}, enter=(late, 2))
        assert ids_of(story)[late] == ids_of(play(model, ends, {late: PROMPTS[late]}, 2)[0])[late]
        check(model, story, 40)


def test_long_uneven_replies_are_the_same_in_a_smaller_batch(model, monkeypatch):
    """Few ids end a reply, so replies have very different lengths."""
    ends, sizes, real = {5, 6, 7, 8}, [], Sampler._forward

    def counted(self, ids, *rest):
        sizes.append(len(ids))
        return real(self, ids, *rest)

    prompts = {row: [row + 3] * (row + 1) for row in range(12)}
    with monkeypatch.context() as patch:
        patch.setattr("echo_min.sampler.WORTH", 1000)
        whole, _ = play(model, ends, prompts, 3, max_new=120)
    monkeypatch.setattr(Sampler, "_forward", counted)
    story, _ = play(model, ends, prompts, 3, max_new=120)
    assert ids_of(story) == ids_of(whole)
    check(model, story, 500)
    assert {12, 6} <= set(sizes) and sum(sizes) < 0.7 * 12 * len(sizes)


def test_the_cache_grows_rarely_and_never_beyond_the_context(model):
    config, slots = replace(CONFIG, context=700), []
    sampler = Sampler(model, set(), config, noise(0, 1))
    story = {0: [], 1: []}
    for i in range(9):
        new = {0: [4] * 70} | ({1: [5] * 400} if i == 8 else {})  # its width beside the long row: 1000
        for row, reply in zip(new, sampler.reply(list(new), list(new.values()), 5), strict=True):
            story[row] += [(i, None) for i in new[row]] + list(zip(*reply, strict=True))
        slots.append(sampler.cache.keys[0].shape[2])
    assert slots[-1] == 700 and len(set(slots)) <= 5
    check(model, story, 49)
    with pytest.raises(ValueError, match="context: 700 tokens do not hold a reply of 40"):
        sampler.reply([0, 1], [[4], [5]], 40)


def test_layers_that_forget_are_refused(model):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 50}

    def of(name, **settings):
        config = getattr(transformers, f"{name}Config")(**sizes, **settings)
        return transformers.AutoModelForCausalLM.from_config(config)

    for name, settings, kind in (
        ("Mistral", {"sliding_window": 999}, "sliding_attention"),
        ("Mamba", {}, "linear_attention"),
        ("Qwen3", {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True,
                   "sliding_window": 64}, "sliding_attention"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"layers of {kind}"):
            Sampler(of(name, **settings), set(), CONFIG, None)
    wide = of("Mistral", sliding_window=1000)  # no token of the context is out of its sight
    check(wide, play(wide, set(), {0: [3] * 5, 1: [4] * 300}, 3)[0], 50)


def test_sampled_frequencies_follow_the_softmax(model):
    n, temperature = 4000, 0.7
    sampler = Sampler(model, set(), replace(CONFIG, temperature=temperature), noise(*range(n)))
    replies = sampler.reply(list(range(n)), [[3, 4, 5]] * n, 1)
    counts = torch.bincount(torch.tensor([ids[0] for ids, _ in replies]), minlength=model.config.vocab_size)
    p = full_logprobs(model, [3, 4, 5], temperature)[-1].exp()
    sigma = (p * (1 - p) / n).sqrt()
    assert ((counts / n - p).abs() < 5 * sigma + 1e-3).all()
    assert (counts / n - p).abs().sum() < 0.3


def test_greedy_takes_the_most_likely(model):
    sampler = Sampler(model, set(), CONFIG, None)
    ((ids, _),) = sampler.reply([0], [[3, 4, 5]], 6)
    for t in range(6):
        assert ids[t] == full_logprobs(model, [3, 4, 5, *ids[:t]], 1.0)[-1].argmax()


def test_reply_ends_at_a_stop_id_or_the_limit(model):
    everything = set(range(model.config.vocab_size))
    (reply,) = Sampler(model, everything, CONFIG, noise(0)).reply([0], [[3]], 9)
    assert len(reply[0]) == 1
    (reply,) = Sampler(model, set(), CONFIG, noise(0)).reply([0], [[3]], 9)
    assert len(reply[0]) == 9


def test_logits_that_are_not_finite_stop_the_run(model):
    with torch.no_grad():
        model.get_output_embeddings().weight[:] = float("nan")
    with pytest.raises(RunEnded, match="not finite"):
        Sampler(model, set(), CONFIG, noise(0)).reply([0], [[3]], 9)


def test_a_context_holds_a_reply_that_just_fits(model):
    config = replace(CONFIG, context=20)
    ((ids, _),) = Sampler(model, set(), config, noise(0)).reply([0], [[3] * 11], 9)
    assert len(ids) == 9
    with pytest.raises(ValueError, match="context: 20 tokens do not hold a reply of 9"):
        Sampler(model, set(), config, noise(0)).reply([0], [[3] * 12], 9)


def test_no_pass_and_no_copy_of_the_cache_is_made_for_nothing(model, monkeypatch):
    sampler, passes, copies = Sampler(model, set(), CONFIG, noise(0, 1)), [], []
    forward, arrange = Sampler._forward, RowCache.arrange
    monkeypatch.setattr(Sampler, "_forward", lambda self, *args: passes.append(1) or forward(self, *args))
    monkeypatch.setattr(RowCache, "arrange", lambda self, rows: copies.append(rows) or arrange(self, rows))
    sampler.reply([0, 1], [[3], [4]], 9)
    assert len(passes) == 9 and len(copies) == 1  # the prompt's gives the first token
    sampler.reply([1, 0], [[3], [4]], 2)  # who asks in another order finds the rows where they are
    assert len(passes) == 11 and len(copies) == 1


def test_the_last_id_of_the_vocabulary_can_be_sampled(model):
    V = model.config.vocab_size
    logits = torch.full((2, V), -50.0)
    logits[:, -1] = 50.0
    share = [0.5, 1 - 2**-53]  # the largest that a generator draws
    tokens, logprobs = Sampler(model, set(), CONFIG, noise(0, 1))._pick(logits, share)
    assert tokens.tolist() == [V - 1] * 2 and logprobs.tolist() == [0.0] * 2
