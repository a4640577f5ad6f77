"""The two losses: against an independently written loop, on gradients and not only on masks."""

import random
from dataclasses import replace

import pytest
import torch

import train
from echo_min.batch import make_batch, pad
from echo_min.config import Config, RunEnded
from echo_min.echo import echo_loss, observation_mask, observation_weights
from echo_min.grpo import action_weights, group_advantages, grpo_loss
from echo_min.masking import Role, Transcript
from echo_min.rollout import Episode, StopReason
from echo_min.tasks import Task
from kernels.segment_logprob import dual_segment_logprobs

CONFIG = Config(device="cpu", grad_clip=1e9, temperature=0.8, observation_temperature=0.8, env_weight=0.05)
TASK = Task("t", "", "", "")


class Capture(torch.optim.SGD):
    """Keeps the gradient that the update computed and leaves the weights alone."""

    def step(self):
        self.grads = [None if p.grad is None else p.grad.clone() for p in self.param_groups[0]["params"]]


def episodes(vocab, rewards=(1, 0, 0, 1, 0, 0), groups=(0, 0, 0, 1, 1, 2), seed=0, observations=True):
    """Transcripts of mixed lengths with every role; old logprobs off the policy by a little, so that clipping
    acts."""
    rng = random.Random(seed)
    batch = []
    for reward, group in zip(rewards, groups, strict=True):
        t = Transcript()

        def some(low, high):
            return [rng.randrange(vocab) for _ in range(rng.randrange(low, high))]

        t.append(Role.SCAFFOLD, some(1, 3))
        t.append(Role.PROMPT, some(1, 6))
        for _ in range(rng.randrange(1, 4)):
            action = some(1, 6)
            t.append(Role.ACTION, action, [rng.uniform(-7, -4.5) for _ in action])
            t.append(Role.SCAFFOLD, some(1, 3))
            if rng.random() < 0.5:
                t.append(Role.WARNING, some(1, 4))
            if observations:
                t.append(Role.OBSERVATION, some(1, 9))
        batch.append(Episode(TASK, group, t, reward=float(reward), stop=StopReason.DONE))
    return batch


def gradients(model, batch, arm="echo", config=CONFIG):
    optimizer = Capture(model.parameters(), lr=1.0)
    metrics = train.update(model, optimizer, make_batch(batch, config), arm, 0, config)
    return metrics, optimizer.grads


def reference(model, batch, env_weight, config):
    """The objective with loops and full logits, one sequence at a time. -> (policy loss, env loss); backward
    done."""
    policy_loss, env_loss = 0.0, 0.0
    for e in batch:
        group = torch.tensor([o.reward for o in batch if o.group == e.group])
        advantage = 0.0
        if group.min() < group.max():
            advantage = float((e.reward - group.mean()) / (group.std() + 1e-6))
        logits = model(torch.tensor([e.transcript.ids])).logits[0].double() / config.temperature
        n_action = sum(r == Role.ACTION for r in e.transcript.roles)
        n_observation = sum(r in (Role.OBSERVATION, Role.WARNING) for r in e.transcript.roles)
        for t, (i, role) in enumerate(zip(e.transcript.ids, e.transcript.roles, strict=True)):
            logp = logits[t - 1].log_softmax(-1)[i]
            if role == Role.ACTION:
                ratio = torch.exp(logp - e.transcript.logprobs[t])
                low, high = 1 - config.clip_low, 1 + config.clip_high
                objective = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
                policy_loss = policy_loss - objective / n_action / len(batch)
            if role == Role.OBSERVATION:
                env_loss = env_loss - logp / n_observation / len(batch)
    (policy_loss + env_weight * env_loss).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return policy_loss.item(), env_loss.item(), grads


def close(grads, others, tolerance=1e-6):
    largest = max(g.abs().max().item() for g in others)
    for g, other in zip(grads, others, strict=True):
        assert (g - other).abs().max().item() <= tolerance * max(largest, 1.0)


@pytest.mark.parametrize("arm, env_weight", [("grpo", 0.0), ("echo", 0.05)])
def test_update_equals_an_independent_loop(model, arm, env_weight):
    batch = episodes(model.config.vocab_size)
    policy_loss, env_loss, expected = reference(model, batch, env_weight, CONFIG)
    metrics, grads = gradients(model, batch, arm)
    assert metrics["policy_loss"] == pytest.approx(policy_loss, abs=1e-6)
    assert metrics["env_loss"] == pytest.approx(env_loss, rel=1e-6)
    close(grads, expected)


@pytest.mark.parametrize("norms", [("sequence", "observation"), ("token", "global"), ("token", "selected")])
def test_any_split_into_micro_batches_gives_the_same_gradient(model, norms):
    batch = episodes(model.config.vocab_size)
    config = replace(CONFIG, policy_norm=norms[0], observation_norm=norms[1])
    whole, expected = gradients(model, batch, config=replace(config, micro_batch_tokens=10**6))
    for budget in (1, 30, 77, 120):
        metrics, grads = gradients(model, batch, config=replace(config, micro_batch_tokens=budget))
        close(grads, expected)
        for key in ("policy_loss", "env_loss", "observation_ce", "mismatch", "ratio", "grad_norm"):
            assert metrics[key] == pytest.approx(whole[key], rel=1e-5, abs=1e-6)


def head_gradients(env_weight, policy):
    """Gradient of the losses at the hidden states that enter the head. -> (gradient[B, T, d], roles[B, T])"""
    torch.manual_seed(0)
    batch = episodes(50)
    ids, roles, _ = pad([e.transcript for e in batch])
    hidden = torch.randn(*ids.shape, 16, requires_grad=True)
    actions, observations = roles == Role.ACTION, observation_mask(roles)
    la, lo = dual_segment_logprobs(hidden, torch.randn(50, 16), ids, actions, observations, 0.8, 0.8)
    advantages = torch.ones_like(roles, dtype=torch.float32)[actions]
    loss = env_weight * echo_loss(lo, observation_weights(roles, observations)[observations])
    if policy:
        groups = torch.tensor([e.group for e in batch])
        weights = action_weights(actions, groups)[actions]
        loss = loss + grpo_loss(la, la.detach(), advantages, weights, 0.2, 0.28)
    loss.backward()
    return hidden.grad, roles


def rows_scoring(roles, *wanted):
    """bool[B, T]: the hidden rows whose next token has one of the roles."""
    scoring = torch.zeros_like(roles, dtype=torch.bool)
    scoring[:, :-1] = torch.isin(roles[:, 1:], torch.tensor(wanted, dtype=roles.dtype))
    return scoring


@pytest.mark.parametrize(
    "env_weight, policy, wanted",
    [
        (0.0, True, [Role.ACTION]),
        (1.0, False, [Role.OBSERVATION]),
        (1.0, True, [Role.ACTION, Role.OBSERVATION]),
    ],
)
def test_each_term_touches_its_own_rows_and_no_other(env_weight, policy, wanted):
    grad, roles = head_gradients(env_weight, policy)
    scoring = rows_scoring(roles, *wanted)
    assert (grad[~scoring] == 0).all()
    assert (grad[scoring].abs().sum(-1) > 0).all()


def test_equal_rewards_lose_the_policy_term_and_keep_the_observation_term(model):
    batch = episodes(model.config.vocab_size, rewards=(1,) * 6)
    metrics, grads = gradients(model, batch, "grpo")
    assert metrics["policy_loss"] == 0 and all((g == 0).all() for g in grads)
    metrics, grads = gradients(model, batch, "echo")
    assert metrics["policy_loss"] == 0 and max(g.abs().max() for g in grads) > 0


def test_group_advantages():
    groups = torch.tensor([0, 0, 0, 1, 1, 2])
    rewards = torch.tensor([0.3, 0.3, 0.3, 0.0, 1.0, 0.7])
    advantages = group_advantages(rewards, groups)
    assert advantages[:3].tolist() == [0, 0, 0] and advantages[5] == 0
    assert advantages[3:5].tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5], abs=2e-6)


def test_grpo_loss_clips_each_side_where_it_must():
    old = torch.zeros(4)
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    logprobs = ratio.log().requires_grad_()
    loss = grpo_loss(logprobs, old, advantage, torch.ones(4), 0.2, 0.28)
    assert loss.item() == pytest.approx(-(1.28 - 1.5 + 0.5 - 0.8))
    loss.backward()
    assert (logprobs.grad != 0).tolist() == [False, True, True, False]


def test_infra_errors_and_agent_timeouts_are_in_no_loss_and_no_statistic(model):
    batch = episodes(model.config.vocab_size)
    expected = gradients(model, batch)
    broken = episodes(model.config.vocab_size, seed=9)[:2]
    broken[0].stop, broken[1].stop = StopReason.INFRA_ERROR, StopReason.AGENT_TIMEOUT
    broken[0].reward, broken[1].reward = float("nan"), 1.0
    metrics, grads = gradients(model, [broken[0], *batch, broken[1]])
    assert metrics == expected[0]
    close(grads, expected[1], 0.0)


def test_warnings_enter_the_targets_only_when_asked(model):
    batch = episodes(model.config.vocab_size)
    for e in batch:  # the advantage off, so that only the observation term is left
        e.reward = 0.0
    plain, _ = gradients(model, batch)
    asked, _ = gradients(model, batch, config=replace(CONFIG, warnings_as_targets=True))
    assert asked["env_loss"] > plain["env_loss"]


def test_no_observation_tokens_is_a_defined_result(model):
    batch = episodes(model.config.vocab_size, observations=False)
    metrics, grads = gradients(model, batch)
    assert metrics["env_loss"] == 0 and metrics["observation_ce"] == 0
    close(grads, gradients(model, batch, "grpo")[1], 0.0)


def test_no_verifier_no_policy_gradient(model):
    """policy_weight 0: the gradient is lambda times that of the observations, rewards or not."""
    config = replace(CONFIG, policy_weight=0.0, env_weight=0.3)
    _, grads = gradients(model, episodes(model.config.vocab_size), "echo", config)
    _, failed = gradients(model, episodes(model.config.vocab_size, rewards=[0] * 6), "echo", config)
    close(grads, failed, 0.0)
    _, _, expected = reference(model, episodes(model.config.vocab_size, rewards=[0] * 6), 0.3, config)
    close(grads, expected)


def test_parsed_only_leaves_out_rollouts_with_a_warning(model):
    config = replace(CONFIG, policy_weight=0.0, env_weight=1.0, parsed_only=True)
    batch = [e for seed in range(3) for e in episodes(model.config.vocab_size, seed=seed)]
    clean = [e for e in batch if Role.WARNING not in e.transcript.roles]
    assert 0 < len(clean) < len(batch)
    _, grads = gradients(model, batch, "echo", config)
    _, expected = gradients(model, clean, "echo", config)
    close(grads, [g * len(clean) / len(batch) for g in expected])  # the mean is over all rollouts


def test_a_loss_that_is_not_finite_stops_the_run(model):
    batch = episodes(model.config.vocab_size)
    batch[0].transcript.logprobs = [-1e9 if x else x for x in batch[0].transcript.logprobs]
    with pytest.raises(RunEnded, match="not finite"):
        gradients(model, batch)
