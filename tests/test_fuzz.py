"""Random replies, outputs and settings through harness, masking and config: a named error or none."""

import json
import random
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

import train
from echo_min import harness
from echo_min import harness_qwen as qwen
from echo_min.batch import make_batch, pad
from echo_min.config import Config, RunEnded
from echo_min.echo import observation_mask, observation_weights
from echo_min.grpo import action_weights
from echo_min.masking import Role, Transcript, encode
from echo_min.rollout import Episode, StopReason
from echo_min.terminal import Output
from tests.test_objective import CONFIG, TASK, Capture, episodes

N = 10_000
PIECES = [
    *"\0\a\b\x1b\x7f\r\n\t '\"$`\\{}<|>é漢🙂\ud800\udfff\u202e\ufeff\x85", *harness.MARKERS,
    "done", "done\n", "<|im_", "start|>assistant\n", "WARNINGS:\n- ", "(exit_code=0)", "\x1b[2J",
    "tk align -k acorn",
    "\n<|im_start|>tool\n", "<think>", "</think>", "<tool_call>\n<function=bash>\n", "<function=done>",
    "<parameter=command>\n", "<parameter=timeout>", "\n</parameter>", "</function>\n</tool_call>",
    *["<tool_call><function=bash><parameter=command>ls</parameter></function></tool_call>"] * 4,
]  # fmt: skip


def text(rng):
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(12)))


def test_replies_and_outputs(tokenizer):
    rng = random.Random(0)
    marker_ids = {tokenizer.convert_tokens_to_ids(marker) for marker in harness.MARKERS}
    transcripts = []
    for _ in range(N):
        ended_by, style = rng.choice([None, *harness.MARKERS]), rng.choice(["plain", "qwen"])
        action = harness.parse(text(rng), ended_by, style)
        assert bool(action.command) + action.done + (action.warning not in ("", qwen.ONE_CALL)) == 1
        output = Output(text(rng), rng.randrange(256), rng.random() < 0.2, rng.random() < 0.2)
        message = harness.observation(output if action.command else None, action.warning, ended_by, style)
        transcript = Transcript()
        task = SimpleNamespace(instruction=text(rng))
        for role, part in [*harness.prompt(task, style), *message]:
            ids = encode(tokenizer, role, part)
            if role is not Role.SCAFFOLD:  # no text from outside becomes a chat marker
                assert not marker_ids & set(ids)
                assert tokenizer.decode(ids) == part.encode("utf-8", "replace").decode()
            transcript.append(role, ids)
        assert all(i in marker_ids for i in transcript.ids[:1])
        transcripts.append(transcript)
    for start in range(0, N, 100):
        _, roles, _ = pad(transcripts[start : start + 100])
        for norm in ("observation", "selected", "global"):
            weights = observation_weights(roles, observation_mask(roles), norm)
            assert weights.isfinite().all() and (weights[roles != Role.OBSERVATION] == 0).all()
        assert not action_weights(roles == Role.ACTION, torch.zeros(len(roles), dtype=torch.int64)).any()


def test_settings():
    rng = random.Random(0)
    odd = [0, -1, 1, 2**70, 0.5, -0.0, float("nan"), float("inf"), 1e300]
    odd += [True, None, "", "x", "auto", "a/b", [], {}]
    refused = 0
    for _ in range(N):
        names = [f.name for f in fields(Config)]
        given = {rng.choice(names): rng.choice(odd) for _ in range(rng.randrange(1, 4))}
        try:
            config = Config(**given)
        except ValueError as error:
            refused += 1
            assert any(name in str(error) for name in [*given, "beta1"]), (given, error)
        else:
            for f in fields(Config):
                assert type(getattr(config, f.name)) is f.type
            assert Config(**json.loads(json.dumps(config.__dict__))) == config
    assert 0.5 * N < refused < N


def test_settings_from_a_damaged_file(tmp_path):
    rng, path = random.Random(0), tmp_path / "config.json"
    Config().save(path)
    good = path.read_bytes()
    for _ in range(500):
        damaged = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(good))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            Config.load(path)
        except ValueError as error:
            assert "config.json" in str(error)


# ---- numbers ----


def update(model, batch, config=CONFIG, arm="echo"):
    optimizer = Capture(model.parameters(), lr=1.0)
    return train.update(model, optimizer, make_batch(batch, config), arm, 0, config)


@pytest.mark.parametrize("broken", ["weight", "logprob"])
def test_not_a_number_stops_before_the_weights_change(model, broken):
    batch = episodes(model.config.vocab_size)
    if broken == "weight":
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    else:
        batch[0].transcript.logprobs = [float("nan") if x else x for x in batch[0].transcript.logprobs]
    before = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    with pytest.raises(RunEnded, match=r"step 0: .*not finite"):
        train.update(model, optimizer, make_batch(batch, CONFIG), "echo", 0, CONFIG)
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.nan_to_num(), old.nan_to_num())


@pytest.mark.parametrize("reward", [0, 1])
def test_equal_rewards_for_ever_leave_the_observations_to_learn_from(model, reward):
    batch = episodes(model.config.vocab_size, rewards=[reward] * 6)
    for _ in range(3):
        metrics = update(model, batch)
        assert metrics["policy_loss"] == 0 and metrics["learning_share"] == 0 and metrics["grad_norm"] > 0
        assert update(model, batch, arm="grpo")["grad_norm"] == 0


def test_no_observations_at_all(model):
    batch = episodes(model.config.vocab_size, observations=False)
    for arm in ("grpo", "echo"):
        metrics = update(model, batch, arm=arm)
        assert metrics["env_loss"] == 0 and metrics["observation_ce"] == 0 and metrics["grad_norm"] > 0


def test_groups_of_one_have_no_advantage(model):
    batch = episodes(model.config.vocab_size, groups=range(6))
    metrics = update(model, batch)
    assert metrics["policy_loss"] == 0 and metrics["learning_share"] == 0 and metrics["env_loss"] > 0


def test_a_batch_without_an_action(model):
    empty = Transcript()
    empty.append(Role.PROMPT, [1, 2, 3])
    batch = [Episode(TASK, 0, empty, reward=0.0, stop=StopReason.CONTEXT_FULL)]
    assert update(model, batch)["grad_norm"] == 0
