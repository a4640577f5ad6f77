"""What decides correctness on a GPU, on a device in costume: nothing mixes host and device, results are those
of a CPU, and how often the host waits."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent.parent / "figures"))

import controls

import train
from echo_min import checkpoint, report
from echo_min.batch import make_batch
from echo_min.config import ARMS, Config
from echo_min.evaluate import observation_logprobs
from echo_min.optimizer import make_optimizer
from echo_min.sampler import Sampler
from echo_min.tiny import tiny_model
from kernels import segment_logprob
from tests import fake_device, test_controls
from tests.test_objective import episodes

CONFIG = Config(device="gpu", micro_batch_tokens=64, temperature=0.8, env_weight=1.0)
SMALL = Config(
    name="small", arms="echo", threads=1, base_demonstrations=6, base_steps=1, base_batch=2, steps=1,
    tasks_per_step=2, group_size=2, max_turns=2, max_action_tokens=4, eval_tasks=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def plain_attention():
    """The one attention that both sides have, so that samples are equal bit for bit."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def updated(tokenizer, batch, config, arm="echo"):
    """One step of the tiny model on config.device. -> metrics, and by how much each weight has moved."""
    model = tiny_model(tokenizer, seed=0).to(getattr(torch, config.dtype))
    before = [p.detach().clone() for p in model.parameters()]
    if config.gradient_checkpointing:
        checkpoint.recompute_activations(model)
    model.to(config.device)
    metrics = train.update(model, make_optimizer(model, config), batch, arm, 0, config)
    assert all(p.device.type == config.device for p in model.parameters())
    after = [fake_device.bare(p.detach()) for p in model.parameters()]
    return metrics, torch.cat([(a - b).double().flatten() for a, b in zip(after, before, strict=True)])


def same_as_on_a_cpu(tokenizer, batch, config, arm="echo", tolerance=1e-3):
    """But for rounding: sums have another order. tolerance: of the weights' movement as a whole."""
    want, moved = updated(tokenizer, batch, replace(config, device="cpu"), arm)
    with fake_device.gpu() as watch:
        got, moved_there = updated(tokenizer, batch, config, arm)
    assert got == pytest.approx(want, rel=1e-5 if config.dtype == "float32" else 1e-2)
    assert (moved_there - moved).norm() < tolerance * moved.norm()
    return watch


@pytest.mark.parametrize("arm", ARMS)
def test_an_update_is_that_of_a_cpu(tokenizer, arm):
    batch = make_batch(episodes(300), CONFIG)
    parts = len(list(batch.micro_batches(CONFIG.micro_batch_tokens)))
    watch = same_as_on_a_cpu(tokenizer, batch, CONFIG, arm)
    once = same_as_on_a_cpu(tokenizer, batch, replace(CONFIG, micro_batch_tokens=10**6), arm)
    for kind, most in (("wait", 18), ("copy", 12)):
        assert watch.total(kind) - once.total(kind) <= most * (parts - 1), watch
    means = 2 * len(list(tiny_model(tokenizer, seed=0).parameters()))  # go there for the step, and come back
    assert parts > 2 and once.total("wait") <= 20 + means and once.total("copy") <= 12 + means, once


@pytest.mark.parametrize("name", controls.CONTROLS)
def test_an_update_under_every_control_is_that_of_a_cpu(model, tokenizer, name):
    outputs = [[f"usage: tk align -{flag} FILE\n"] for flag in "zyzyzy"]
    plain = test_controls.make(tokenizer, outputs)
    context = train.Context([], model, tokenizer, 5, test_controls.CONFIG, ("-z", "-y"), {})
    batch = controls.CONTROLS[name](plain, context)
    assert batch is not plain
    same_as_on_a_cpu(tokenizer, batch, CONFIG)


@pytest.mark.parametrize("settings", [{"gradient_checkpointing": True}, {"dtype": "bfloat16"}], ids=str)
def test_what_saves_memory_runs_there_too(tokenizer, settings):
    config = replace(CONFIG, **settings)
    same_as_on_a_cpu(tokenizer, make_batch(episodes(300), config), config, tolerance=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_in_slices_are_added_up_there_too(tokenizer, monkeypatch, dtype):
    whole = segment_logprob.row_logprobs
    monkeypatch.setattr(segment_logprob, "row_logprobs", lambda *a, logit_bytes: whole(*a, logit_bytes=0))
    config = replace(CONFIG, dtype=dtype)
    same_as_on_a_cpu(tokenizer, make_batch(episodes(300), config), config, tolerance=0.1)


# ---- sampling and scoring ----


def sampled(tokenizer, device, greedy=False, max_new=6):
    model = tiny_model(tokenizer, seed=0).to(device)
    noise = None if greedy else [np.random.default_rng((1, row)) for row in range(6)]
    sampler, rows = Sampler(model, {5, 6, 7, 8}, replace(CONFIG, context=900), noise), list(range(6))
    replies = sampler.reply(rows, [[5 + row] * (9 + row) for row in rows], max_new)
    return replies + sampler.reply(rows[:4], [[7, 8, 9]] * 4, max_new)


@pytest.mark.parametrize("greedy", [False, True])
def test_sampling_is_that_of_a_cpu(tokenizer, greedy):
    with fake_device.gpu():
        got = sampled(tokenizer, "gpu", greedy)
    for (ids, logprobs), (want, true) in zip(got, sampled(tokenizer, "cpu", greedy), strict=True):
        assert ids == want and logprobs == pytest.approx(true, rel=0, abs=1e-6)


def test_attention_there_sees_few_different_lengths(tokenizer, monkeypatch):
    """And a mask only where a row goes on; the keys beyond a prompt's end are the bucket's."""
    seen, attention = [], torch.nn.functional.scaled_dot_product_attention

    def noted(query, key, value, attn_mask=None, **options):
        seen.append((query.shape[2], key.shape[2], attn_mask is not None, options["is_causal"]))
        return attention(query, key, value, attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    with fake_device.gpu():
        model = tiny_model(tokenizer, seed=0).to("gpu")
        config = replace(CONFIG, context=600)
        sampler = Sampler(model, set(), config, [np.random.default_rng(row) for row in range(2)])
        for prompt in ([5] * 252, [6] * 9, [7] * 250):
            sampler.reply([0, 1], [prompt, prompt[:3]], 3)
    assert set(seen) == {
        (252, 252, False, True), (1, 256, True, False), (1, 512, True, False),
        (10, 512, True, False), (251, 600, True, False), (1, 600, True, False),
    }  # fmt: skip


def test_a_token_costs_the_host_two_waits_whatever_the_batch(tokenizer):
    counts = {}
    for rows in (1, 7):
        for tokens in (3, 13):
            with fake_device.gpu() as watch:
                model = tiny_model(tokenizer, seed=0).to("gpu")
                sampler = Sampler(model, set(), CONFIG, [np.random.default_rng(row) for row in range(rows)])
                sampler.reply(list(range(rows)), [[5] * 9] * rows, tokens)
            counts[rows, tokens] = watch.total("wait"), watch.total("copy")
    for rows in (1, 7):
        waits, copies = ((b - a) / 10 for a, b in zip(counts[rows, 3], counts[rows, 13], strict=True))
        assert (waits, copies) == (2, 2)  # ids and logprobs come back, noise and places go there


def test_scoring_is_that_of_a_cpu(tokenizer):
    transcripts = [episode.transcript for episode in episodes(300)]
    want = observation_logprobs(tiny_model(tokenizer, seed=0), transcripts, CONFIG)
    with fake_device.gpu():
        assert observation_logprobs(tiny_model(tokenizer, seed=0).to("gpu"), transcripts, CONFIG) == want


def same(a, b):
    return (a - b).norm() <= 1e-4 * b.norm()


def test_a_whole_run_is_that_of_a_cpu(tmp_path):
    """Base policy, rollouts, evaluation, updates, a checkpoint, and going on from it."""

    def run(device):
        config = replace(SMALL, device=device)
        train.main(config, tmp_path / device)
        train.main(replace(config, steps=2), tmp_path / device)
        lines = report.read(tmp_path / device / "metrics.jsonl")
        _, folder = checkpoint.latest(tmp_path / device / "echo")
        states = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
        return [{k: v for k, v in line.items() if not k.endswith("seconds")} for line in lines], states

    lines, states = run("cpu")
    with fake_device.gpu():
        moved_lines, moved_states = run("gpu")
    assert len(lines) > 3 and states
    for there, line in zip(moved_lines, lines, strict=True):
        close = {k: pytest.approx(v, rel=1e-4, abs=1e-6) for k, v in line.items() if type(v) is float}
        assert there == line | close
    for number, state in states.items():
        assert all(same(moved_states[number][name], value) for name, value in state.items())


# ---- the costume itself ----


def planted(monkeypatch, owner, name, change):
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: change(real(*args, **kwargs)))


def test_a_batch_left_on_the_host_is_caught(tokenizer, monkeypatch):
    part = train.Batch.part
    monkeypatch.setattr(train.Batch, "part", lambda self, rows, device: part(self, rows))
    with fake_device.gpu(), pytest.raises(RuntimeError, match="two devices"):
        updated(tokenizer, make_batch(episodes(300), CONFIG), CONFIG)


def test_a_mask_made_on_the_host_is_caught(tokenizer, monkeypatch):
    planted(monkeypatch, train, "predictable", lambda known: known.to("cpu"))
    with fake_device.gpu(), pytest.raises(RuntimeError, match=r"two devices: .* at train.py:\d+"):
        updated(tokenizer, make_batch(episodes(300), CONFIG), CONFIG)


def test_noise_left_on_the_host_is_caught(tokenizer, monkeypatch):
    planted(monkeypatch, torch, "searchsorted", lambda tokens: tokens.to("cpu"))
    with fake_device.gpu(), pytest.raises(RuntimeError, match=r"two devices: .* at echo_min/sampler.py"):
        sampled(tokenizer, "gpu")


def test_a_kernel_that_gets_the_host_s_tensor_is_caught(tokenizer, monkeypatch):
    planted(monkeypatch, segment_logprob.Stats, "empty", lambda stats: stats._replace(xmax=stats.xmax.cpu()))
    with fake_device.gpu(), pytest.raises(RuntimeError, match="forward_rows got one of the host"):
        updated(tokenizer, make_batch(episodes(300), CONFIG), CONFIG)


def test_states_left_on_the_host_are_caught(tokenizer, tmp_path, monkeypatch):
    with fake_device.gpu():
        model = tiny_model(tokenizer, seed=0).to("gpu")
        optimizer, batch = make_optimizer(model, CONFIG), make_batch(episodes(300), CONFIG)
        train.update(model, optimizer, batch, "echo", 0, CONFIG)
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        checkpoint.restore_optimizer(tmp_path, optimizer)
        train.update(model, optimizer, batch, "echo", 1, CONFIG)
        monkeypatch.setattr("echo_min.optimizer.states_to_device", lambda *_: None)
        with pytest.raises(RuntimeError, match="two devices"):
            train.update(model, optimizer, batch, "echo", 2, CONFIG)


def test_the_optimizer_s_states_are_there_for_its_step_alone(tokenizer, monkeypatch):
    places, step = [], torch.optim.AdamW.step

    def noted(optimizer):
        step(optimizer)
        places.append(
            {value.device.type for s in optimizer.state.values() for value in s.values() if value.dim()}
        )

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    batch = make_batch(episodes(300), CONFIG)
    with fake_device.gpu():
        model = tiny_model(tokenizer, seed=0).to("gpu")
        optimizer = make_optimizer(model, CONFIG)
        for number in range(2):
            train.update(model, optimizer, batch, "echo", number, CONFIG)
            states = [value for s in optimizer.state.values() for value in s.values() if value.dim()]
            assert places.pop() == {"gpu"} and {value.device.type for value in states} == {"cpu"}


@pytest.mark.parametrize(
    "call",
    [
        lambda t: t[0].item(), lambda t: t.tolist(), lambda t: t.cpu(), lambda t: t.nonzero(),
        lambda t: bool((t > 1).any()), lambda t: t[t > 1], lambda t: int(t[0]), lambda t: t.unique(),
        lambda t: torch.zeros(3).copy_(t), lambda t: torch.equal(t, t), lambda t: float(t.sum()),
    ],
)  # fmt: skip
def test_every_way_to_wait_is_counted(call):
    with fake_device.gpu() as watch:
        t = torch.tensor([1.0, 2.0, 3.0], device="gpu")
        t = t * 2 + torch.tensor(1.0)  # a number may come from the host
        assert watch.total("wait") == 0 and watch.total("copy") == 1, watch
        call(t)
        assert watch.total("wait") == 1 and "tests/test_device.py" in repr(watch), watch


@pytest.mark.parametrize(
    "call",
    [
        lambda a, b: a + b, lambda a, b: torch.cat([a, b]), lambda a, b: a.gather(0, b.long() * 0),
        lambda a, b: torch.where(b > 0, a, a), lambda a, b: b[a.long() * 0], lambda a, b: a @ b,
        lambda a, b: a.index_select(0, b.long() * 0), lambda a, b: a.masked_fill(b > 1, 0.0),
    ],
)  # fmt: skip
def test_every_mix_is_caught(call):
    host, device = torch.ones(3), torch.ones(3, device="meta")
    with fake_device.gpu():
        device = host.to("gpu")
        call(device, device)
        with pytest.raises(RuntimeError, match="two devices"):
            call(device, host)
        device[torch.tensor([0, 1])]  # an index of the host is moved
