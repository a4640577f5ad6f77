"""How a policy is examined in training: which tasks, which noise, and observation CE."""

from dataclasses import replace

import pytest
import torch

from echo_min.config import Config, RunEnded
from echo_min.evaluate import Examination, cross_entropy, expert_transcripts, graded, observation_logprobs
from echo_min.masking import Role, Transcript
from echo_min.rollout import Episode, Noise, StopReason, sample_episodes
from echo_min.tasks import World
from echo_min.worlds.registry import load_world

WORLD = load_world("tool", 1)
CONFIG = Config(device="cpu", seed=5, eval_tasks=4, max_turns=1, max_action_tokens=5, context=400)


def observation_ce(model, transcripts, config):
    return cross_entropy(observation_logprobs(model, transcripts, config))



def test_a_sampled_and_a_greedy_rollout_of_each_held_out_task(model, tokenizer, monkeypatch):
    import echo_min.evaluate as evaluate

    played, real = [], evaluate.sample_episodes

    def spied(*args):
        played.append((args, real(*args)))
        for i, e in enumerate(played[-1][1]):  # one that failed, one that passed
            e.reward = [float("nan"), 1.0, 0.5, 0.0][i] if len(played) % 2 else float(i == 3)
        return played[-1][1]

    monkeypatch.setattr(evaluate, "sample_episodes", spied)
    examination = Examination(model, tokenizer, WORLD, CONFIG)
    results = examination.results(7)
    (sampled, first), (greedy, second) = played
    assert sampled[2] == greedy[2] == WORLD.held_out[:4] and sampled[3] == greedy[3] == 1
    assert sampled[5] == (Noise.EVALUATION, 5, 7) and greedy[5] is None
    expected = sample_episodes(model, tokenizer, WORLD.held_out[:4], 1, CONFIG, (2, 5, 7))
    assert [e.transcript.ids for e in first] == [e.transcript.ids for e in expected]
    likely = sample_episodes(model, tokenizer, WORLD.held_out[:4], 1, CONFIG, None)
    assert [e.transcript.ids for e in second] == [e.transcript.ids for e in likely]
    assert results["pass_rate"] == pytest.approx(1 / 3)  # what failed is in no rate
    assert results["mean_reward"] == pytest.approx(0.5) and results["mean_reward_greedy"] == 0.25
    assert results["pass_rate_greedy"] == pytest.approx(1 / 4)
    expert = expert_transcripts(tokenizer, WORLD, CONFIG)
    assert results["expert_ce"] == pytest.approx(observation_ce(model, expert, CONFIG))
    assert examination.last == results and len(expert) == 4


def test_rewards_that_count():
    def episode(reward):
        return Episode(None, 0, reward=reward, stop=StopReason.DONE, error="gone")

    assert graded([episode(r) for r in (1.0, float("nan"), 0.0)]) == [1.0, 0.0]
    with pytest.raises(RunEnded, match="no episode could be graded: gone"):
        graded([episode(float("nan"))] * 2)


def test_the_experts_trajectories_are_the_same_at_every_examination(tokenizer):
    config = replace(CONFIG, max_turns=3, max_action_tokens=60, context=600)
    first, again = (expert_transcripts(tokenizer, WORLD, config) for _ in range(2))
    assert [t.ids for t in first] == [t.ids for t in again]
    for task, transcript in zip(WORLD.held_out[:4], first, strict=True):
        assert task.solution in tokenizer.decode(transcript.ids)
    texts = [tokenizer.decode(t.ids) for t in first]
    assert 0 < sum("usage:" in text for text in texts) < 4  # some call wrongly first
    of_training = {task.instruction for task in WORLD.train}
    assert not any(f"user\n{instruction}<" in text for instruction in of_training for text in texts)


def transcripts(sizes):
    made = []
    for seed, n in enumerate(sizes):
        t = Transcript()
        t.append(Role.PROMPT, [3, 4])
        t.append(Role.ACTION, [5, 6], [-1.0, -1.0])
        t.append(Role.OBSERVATION, [7 + (seed + i) % 90 for i in range(n)])
        t.append(Role.WARNING, [8])
        made.append(t)
    return made


@pytest.mark.parametrize("tokens", [1, 40, 10**6])
def test_observation_ce_is_a_mean_over_all_observation_tokens(model, tokens):
    """At temperature 1, warnings and actions left out, nothing for an episode without output."""
    some, nats = transcripts([3, 0, 9, 1, 70]), []
    config = replace(CONFIG, prefill_tokens=tokens, temperature=0.5, observation_temperature=2.0,
                     warnings_as_targets=True, parsed_only=True)  # fmt: skip
    found = observation_logprobs(model, some, config)
    for transcript, positions in zip(some, found, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([transcript.ids])).logits[0].double().log_softmax(-1)
        where = [t for t, role in enumerate(transcript.roles) if role == Role.OBSERVATION]
        assert list(positions) == where
        for t in where:
            assert positions[t] == pytest.approx(expected[t - 1, transcript.ids[t]].item(), abs=1e-5)
            nats.append(-expected[t - 1, transcript.ids[t]].item())
    assert observation_ce(model, some, config) == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_no_observation_has_no_ce(model):
    assert observation_ce(model, transcripts([0, 0]), CONFIG) != observation_ce(model, [], CONFIG)  # nan


def test_more_transcripts_than_are_scored_at_a_time(model):
    some = transcripts([1, 2, 3] * 50)
    assert [len(found) for found in observation_logprobs(model, some, CONFIG)] == [1, 2, 3] * 50


def test_as_many_held_out_tasks_as_there_are(model, tokenizer):
    few = World(WORLD.train, WORLD.held_out[:2], WORLD.weak, WORLD.expert)
    assert Examination(model, tokenizer, few, CONFIG).results(0)["eval_tasks"] == 2
