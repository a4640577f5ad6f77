"""Models of other families: what loads, what is refused in one line, and SmolLM2 for real."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import train
from echo_min import checkpoint, policy
from echo_min.batch import make_batch, pad
from echo_min.checkpoint import load_policy, recompute_activations
from echo_min.config import Config, RunEnded
from echo_min.evaluate import cross_entropy, observation_logprobs
from echo_min.masking import Role, Transcript
from echo_min.policy import marker_ids, segment_logprobs
from echo_min.presets import PRESETS
from echo_min.rollout import Episode, StopReason, sample_episodes
from echo_min.sft import supervise
from echo_min.tasks import Task
from echo_min.tiny import tiny_model
from echo_min.worlds.registry import load_world


def saved(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads_learn_from_both_segments(model, tokenizer, tied, tmp_path):
    model.config.tie_word_embeddings = tied
    model = type(model)(model.config)
    model, tokenizer = load_policy(saved(model, tokenizer, tmp_path))
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embedding) == tied
    ids = torch.randint(3, 100, (2, 9))
    actions = torch.zeros(2, 9, dtype=torch.bool)
    actions[:, 3:5] = True
    for segment in (0, 1):
        model.zero_grad()
        segment_logprobs(model, ids, ids, actions, actions.roll(3, 1))[segment].sum().backward()
        assert head.grad.abs().sum() > 0


def test_masks_follow_the_ids_to_their_device(model, monkeypatch):
    """The masks are made on the CPU; on the device `meta` a hidden state stands in for a GPU's."""
    seen = []
    head = "echo_min.policy.dual_segment_logprobs"
    monkeypatch.setattr(head, lambda h, w, y, a, o, *_, **__: seen.extend([a, o]))
    ids, mask = torch.zeros(1, 4, dtype=torch.int64, device="meta"), torch.zeros(1, 4, dtype=torch.bool)
    hidden = SimpleNamespace(last_hidden_state=torch.zeros(1, 4, model.config.hidden_size, device="meta"))
    monkeypatch.setattr(model.base_model, "forward", lambda **_: hidden)
    segment_logprobs(model, ids, ids, mask, mask)
    assert [m.device.type for m in seen] == ["meta", "meta"]


def test_the_head_gets_the_room_that_the_settings_give(model, monkeypatch):
    room, real = [], policy.dual_segment_logprobs

    def spied(*args, logit_bytes):
        room.append(logit_bytes)
        return real(*args, logit_bytes=logit_bytes)

    monkeypatch.setattr(policy, "dual_segment_logprobs", spied)
    ids, mask = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.bool)
    segment_logprobs(model, ids, ids, mask, mask, 7)
    segment_logprobs(model, ids, ids, mask, mask)
    assert room == [7 * 2**20, 3 * 2**30]


def test_a_tokenizer_without_a_chat_template_will_do_if_it_has_the_markers(model, tokenizer, tmp_path):
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)  # no template, no named tokens
    _, loaded = load_policy(saved(model, tokenizer, tmp_path))
    assert loaded.chat_template is None and set(marker_ids(loaded).values()) >= {"<|im_end|>", "<|im_start|>"}


def test_a_token_that_stands_for_every_unknown_word_is_no_marker(tokenizer):
    bpe = Tokenizer(models.BPE({"<unk>": 0, "a": 1, "<|im_end|>": 2}, [], unk_token="<unk>"))
    other = type(tokenizer)(tokenizer_object=bpe, unk_token="<unk>")
    assert other.convert_tokens_to_ids("<|im_start|>") == 0
    assert marker_ids(other) == {2: "<|im_end|>"}


def test_other_families_are_refused_in_one_line(model, tokenizer, tmp_path):
    other = type(tokenizer)(tokenizer_object=Tokenizer(models.BPE({"a": 0, "[INST]": 1}, [])))
    with pytest.raises(ValueError, match=r"no .*<\|im_.*only ChatML models will do"):
        load_policy(saved(model, other, tmp_path / "template"))
    short = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_head=2, n_layer=1))
    with pytest.raises(ValueError, match=r"more tokens .* than its embedding"):
        load_policy(saved(short, tokenizer, tmp_path / "short"))
    weightless = saved(model, tokenizer, tmp_path / "weightless")
    (weightless / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"weightless: neither a checkpoint folder nor .*model.safetensors"):
        load_policy(weightless)
    partial = saved(model, tokenizer, tmp_path / "partial") / "model.safetensors"
    weights = load_file(partial)
    weights.pop("model.norm.weight")
    save_file(weights, partial, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"partial: no weights for 1 parameters \(model.norm.weight"):
        load_policy(partial.parent)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        load_policy(saved(model, tokenizer, tmp_path / "soft"))


@pytest.mark.slow
def test_smollm2(smollm2_tokenizer, tmp_path):
    """A real instruct model: its own rollouts in real bash, both losses, saved and loaded by transformers."""
    config = replace(
        Config(**PRESETS["smollm2"]), device="cpu", threads=1, harness="qwen", context=600, max_turns=2,
        max_action_tokens=8, policy_weight=1.0, learning_rate=1e-4,
    )  # fmt: skip
    model, tokenizer = load_policy(config.model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    tasks = load_world("file", 1).train[:2]
    episodes = sample_episodes(model, tokenizer, tasks, 2, config, (1, 1, 1))
    assert all(e.stop is StopReason.MAX_TURNS and e.reward == 0 for e in episodes)
    ids, roles, logprobs = pad([e.transcript for e in episodes])
    actions = roles == 1
    whole, _ = segment_logprobs(model, ids, ids, actions, torch.zeros_like(actions))
    assert (whole - logprobs[actions]).abs().max() < 2e-4  # cached, turn after turn, and in one pass
    for i, e in enumerate(episodes):  # as in a mixed group
        e.reward = float(i % 2)
    optimizer = torch.optim.AdamW(model.parameters())
    config = replace(config, warnings_as_targets=True)  # eight tokens are no tool call: all that comes back
    batch = make_batch(episodes, config)
    metrics = train.update(model, optimizer, batch, "echo", 0, config)
    assert metrics["mismatch"] < 1e-4 and 0 < metrics["grad_norm"] < 1e4 and metrics["env_loss"] > 0
    assert train.update(model, optimizer, batch, "echo", 1, config)["env_loss"] < metrics["env_loss"]
    assert all((p != before[name]).any() for name, p in model.named_parameters())
    checkpoint.save(tmp_path, 1, model, tokenizer, optimizer, config)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "step-000001", dtype=torch.float32)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "step-000001")
    assert loaded.get_vocab() == tokenizer.get_vocab()
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, model(ids).logits)


def test_long_transcripts_are_scored_in_parts(model, monkeypatch):
    """However long: no forward pass is given more padded tokens than allowed, and the result stays."""
    transcripts = []
    for n in (5, 90, 3, 40, 40, 200):
        transcripts.append(Transcript())
        transcripts[-1].append(Role.PROMPT, [3])
        transcripts[-1].append(Role.OBSERVATION, [5 + i % 90 for i in range(n)])
    whole = cross_entropy(observation_logprobs(model, transcripts, Config()))
    sizes, real = [], model.base_model.forward
    monkeypatch.setattr(
        model.base_model, "forward", lambda **given: sizes.append(given["input_ids"].numel()) or real(**given)
    )
    parts = observation_logprobs(model, transcripts, Config(prefill_tokens=100))
    assert cross_entropy(parts) == pytest.approx(whole, abs=1e-5)
    assert len(sizes) > 3 and max(sizes) == 201 and sorted(sizes)[-2] <= 100


def test_the_supervised_stage_in_parts_learns_the_same(tokenizer):
    """A batch in several forward passes, and activations computed again, give the weights of the whole."""
    episodes, results = [], []
    for n in (5, 9, 30, 12, 2):
        episodes.append(Episode(Task("t", "", "", ""), 0, reward=0.0, stop=StopReason.DONE))
        episodes[-1].transcript.append(Role.PROMPT, [3])
        episodes[-1].transcript.append(Role.ACTION, [90 - i for i in range(n)], [0.0] * n)
        episodes[-1].transcript.append(Role.OBSERVATION, [5 + i for i in range(2 * n)])
    for lean in ({}, {"prefill_tokens": 100}, {"prefill_tokens": 1, "gradient_checkpointing": True}):
        config = Config(base_steps=3, base_batch=6, **lean)
        model, passes = tiny_model(tokenizer, 0), []
        if config.gradient_checkpointing:
            recompute_activations(model)
        model.base_model.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        supervise(model, episodes, config)
        results.append((passes, torch.cat([p.detach().flatten() for p in model.parameters()])))
    (whole, weights), *others = results
    assert len(whole) == 3 and [len(passes) > 6 for passes, _ in others] == [True, True]
    for _, other in others:
        torch.testing.assert_close(other, weights, atol=1e-4, rtol=0)
    with pytest.raises(RunEnded, match="step 2: gradient not finite; lower base_learning_rate"):
        supervise(model, episodes, Config(base_steps=3, base_batch=6, base_learning_rate=1e30))
