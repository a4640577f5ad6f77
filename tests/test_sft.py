"""The supervised stage: what it minimises, at which learning rate, and on what."""

import random
import shutil
from dataclasses import replace

import pytest
import torch

from echo_min import harness, sft
from echo_min.batch import make_batch
from echo_min.checkpoint import load_policy
from echo_min.config import Config, RunEnded
from echo_min.masking import Role
from echo_min.rollout import StopReason
from echo_min.sft import Script, make_base, record, supervise
from echo_min.terminal import TerminalDied
from echo_min.tiny import tiny_model
from echo_min.worlds.registry import load_world
from tests.test_objective import close, episodes

CONFIG = Config(
    device="cpu", seed=2, base_steps=4, base_batch=5, base_learning_rate=2e-3, grad_clip=1e9, steps=1,
    base_demonstrations=5, threads=1,
)  # fmt: skip
WORLD = load_world("tool", 2)


class Steps(list):
    """What the stage asked of the optimizer, and got: (learning rate, seed, gradients) of each step."""

    def __init__(self, monkeypatch):
        self.real = sft.optimizer_step
        monkeypatch.setattr(sft, "optimizer_step", self.step)

    def step(self, optimizer, learning_rate, seed):
        grads = [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]
        self.append((learning_rate, seed, grads))
        self.real(optimizer, learning_rate, seed)


@pytest.fixture()
def steps(monkeypatch):
    return Steps(monkeypatch)


@pytest.mark.parametrize("n", [1, 2, 10, 40])
def test_the_learning_rate_rises_for_a_tenth_of_the_steps_then_falls(model, steps, n):
    some = episodes(model.config.vocab_size)[:1]
    supervise(model, some, replace(CONFIG, base_steps=n, base_batch=1))
    rates = [rate / 2e-3 for rate, *_ in steps]
    expected = [min((i + 0.5) / n / 0.1, (1 - (i + 0.5) / n) / 0.9) for i in range(n)]
    assert rates == pytest.approx(expected) and min(rates) > 0  # no step for nothing
    if n == 40:
        assert rates[3] == pytest.approx(0.875) and max(rates) == rates[4] and rates[-1] < 0.02
    assert [seed for _, seed, _ in steps] == [2 * 1_000_003 + i for i in range(n)]


def reference(model, episode, action_weight, observation_weight):
    """Gradient of the weighted cross-entropies of one episode, full logits and loops."""
    logits = model(torch.tensor([episode.transcript.ids])).logits[0].double().log_softmax(-1)
    terms = {Role.ACTION: [], Role.OBSERVATION: [], Role.WARNING: []}
    for t, (i, role) in enumerate(zip(episode.transcript.ids, episode.transcript.roles, strict=True)):
        if role in terms:
            terms[role].append(-logits[t - 1, i])
    loss = action_weight * torch.stack(terms[Role.ACTION]).mean()
    said = len(terms[Role.OBSERVATION]) + len(terms[Role.WARNING])
    loss = loss + observation_weight * torch.stack(terms[Role.OBSERVATION]).sum() / said
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("actions, observations", [(1.0, 0.3), (1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
def test_it_minimises_the_weighted_cross_entropies(model, steps, actions, observations):
    """Whatever the objective of RL is told to try."""
    (episode,) = [e for e in episodes(model.config.vocab_size) if Role.WARNING in e.transcript.roles][:1]
    expected = reference(model, episode, actions, observations)
    config = replace(CONFIG, base_steps=1, base_batch=3, base_observation_weight=observations, env_weight=9.0,
                     policy_norm="token", observation_norm="global", parsed_only=True, temperature=0.5,
                     warnings_as_targets=True, policy_weight=7.0, observation_temperature=3.0)  # fmt: skip
    supervise(model, [episode], config, action_weight=actions)
    ((_, _, grads),) = steps
    close(grads, expected)


def test_every_episode_weighs_alike_however_rl_is_normalised(model, steps):
    some, config = episodes(model.config.vocab_size), replace(CONFIG, base_steps=1)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for norm in ("sequence", "token"):
        model.load_state_dict(weights)
        supervise(model, some, replace(config, policy_norm=norm))
    assert len({len(e.transcript) for e in some}) > 1
    (_, _, one), (_, _, other) = steps
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_its_gradient_is_clipped(model, steps):
    supervise(model, episodes(model.config.vocab_size), replace(CONFIG, base_steps=1, grad_clip=0.01))
    ((_, _, grads),) = steps
    assert torch.cat([g.flatten() for g in grads]).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_batches_are_drawn_by_the_seed(model, monkeypatch):
    def drawn(seed):
        """-> the episodes of each batch."""
        seen = []

        def spied(drawn, config):
            seen.append(drawn)
            return make_batch(drawn, config)

        with monkeypatch.context() as patch:
            patch.setattr(sft, "make_batch", spied)
            supervise(model, some, replace(CONFIG, seed=seed, base_steps=3))
        return [[some.index(e) for e in batch] for batch in seen]

    some = episodes(model.config.vocab_size)
    assert drawn(1) == drawn(1) != drawn(2)
    assert [len(batch) for batch in drawn(1)] == [5, 5, 5]
    assert len({tuple(batch) for batch in drawn(1)}) == 3


def test_a_diverging_stage_stops_before_the_weights_change(model, steps):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(RunEnded, match="supervised step 1: gradient not finite; lower base_learning_rate"):
        supervise(model, episodes(model.config.vocab_size), CONFIG)
    assert not steps


# ---- recording ----


def test_a_script_types_its_commands_then_says_done(tokenizer):
    script = Script(tokenizer, [["ls", "cat a"], []])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    said = []
    for playing in ([0, 1], [0], [0]):
        for ids, logprobs in script.reply(playing, [[]] * len(playing), 9):
            assert ids[-1] == end and logprobs == [0.0] * len(ids)
            said.append(tokenizer.decode(ids[:-1]))
    assert said == ["ls", "done", "cat a", "done"]
    ((ids, _),) = Script(tokenizer, [["ls"]], "qwen").reply([0], [[]], 9)
    assert tokenizer.decode(ids[:-1]) == harness.reply("ls", "qwen")


@pytest.mark.parametrize("terminals", [1, 2, 64])
def test_scripts_are_recorded_in_their_order(tokenizer, terminals):
    tasks = WORLD.train[:5]
    scripts = [(task, [task.solution] * (i % 2) + ["done"]) for i, task in enumerate(tasks)]
    config = replace(CONFIG, context=1000, max_action_tokens=100, terminals=terminals)
    played = record(tokenizer, scripts, config)
    assert [(e.task, e.reward, e.stop) for e in played] == [(t, i % 2, "done") for i, t in enumerate(tasks)]


def test_a_terminal_that_fails_ends_the_recording(tokenizer, monkeypatch):
    def refuse(*_):
        raise TerminalDied("no terminal today")

    monkeypatch.setattr("echo_min.rollout.open_terminal", refuse)
    with pytest.raises(RunEnded, match="2 of 2 scripted episodes failed: no terminal today"):
        record(tokenizer, [(WORLD.train[0], [])] * 2, CONFIG)


# ---- the base policy ----


def test_a_base_is_that_of_its_seed_and_learns_from_demonstrations_alone(tmp_path, monkeypatch):
    seen = []
    real = sft.supervise
    monkeypatch.setattr(sft, "supervise", lambda m, es, c: seen.append(es) or real(m, es, c))
    for name, seed in (("a", 2), ("b", 2), ("c", 3)):
        make_base(replace(CONFIG, seed=seed, base_batch=2), WORLD, tmp_path / name)
    assert len(seen[0]) == 5 and all(e.stop in (StopReason.DONE, StopReason.MAX_TURNS) for e in seen[0])
    trained_on = {task.tools["tk"] for task in WORLD.train + WORLD.held_out}
    assert not {e.task.tools["tk"] for e in seen[0]} & trained_on  # tools of other facts
    start = [tiny_model(load_policy(tmp_path / "c")[1], seed) for seed in (0, 3)]
    made = load_policy(tmp_path / "c")[0].get_output_embeddings().weight
    far, near = ((made - m.get_output_embeddings().weight).abs().mean() for m in start)
    assert near < far / 2  # from the weights of its own seed
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    assert [e.transcript.ids for e in seen[0]] == [e.transcript.ids for e in seen[1]]
    assert [e.commands for e in seen[0]] != [e.commands for e in seen[2]]
    _, tokenizer = load_policy(tmp_path / "a")
    assert Config.load(tmp_path / "a" / "echo_min.json") == replace(CONFIG, base_batch=2)
    for task in (WORLD.train[0], WORLD.held_out[-1]):  # a word of a task is one token
        assert len(tokenizer.encode(task.instruction)) == 2 and len(tokenizer.encode(task.solution)) == 4
    for warning in harness.warnings("plain"):
        assert len(tokenizer.encode(harness.warning_block(warning))) < 24


def test_words_of_held_out_tasks_are_tokens_too(tokenizer):
    unseen = [replace(task, instruction="quixotic zeppelin") for task in WORLD.held_out]
    demonstrations = [WORLD.weak(random.Random(0))]
    trained = sft.trained_tokenizer(demonstrations, replace(WORLD, held_out=unseen), CONFIG)
    assert len(trained.encode("quixotic zeppelin")) == 2


def test_a_given_model_is_loaded_and_supervised(tmp_path, steps):
    make_base(replace(CONFIG, base_batch=2), WORLD, tmp_path / "a")
    steps.clear()
    shutil.copytree(tmp_path / "a", tmp_path / "given")
    config = replace(CONFIG, model=str(tmp_path / "given"), format_stage=True, base_batch=2, base_steps=2)
    make_base(config, WORLD, tmp_path / "b")
    assert len(steps) == 2
    given, made = (load_policy(tmp_path / name)[0].state_dict() for name in "ab")
    assert any((given[name] != made[name]).any() for name in given)
    for again in (False, True):
        loaded, _ = load_policy(tmp_path / "a", gradient_checkpointing=again)
        assert loaded.model.layers[0].gradient_checkpointing == again
    change = max((given[name] - made[name]).abs().max().item() for name in given)
    assert change < 0.01  # two steps from the given weights, not from others
