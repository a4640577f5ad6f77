"""One step and one arm: which tasks, which noise, which learning rate, what is logged and what is saved."""

import copy
import json
import shutil
import threading
from dataclasses import replace

import pytest
import torch

import train
from echo_min import checkpoint, echo, report
from echo_min.batch import make_batch
from echo_min.config import Config, RunEnded
from echo_min.masking import Role
from echo_min.rollout import Noise, StopReason, sample_episodes
from echo_min.sft import make_base
from echo_min.worlds.registry import load_world
from tests.test_objective import CONFIG, Capture, episodes

WORLD = load_world("tool", 1)
STEP = Config(
    device="cpu", seed=3, tasks_per_step=3, group_size=2, max_turns=1, max_action_tokens=4,
    tasks="world:tool", learning_rate=1e-3, warnings_as_targets=True,
)  # fmt: skip
SMALL = replace(
    STEP, name="small", threads=1, base_demonstrations=6, base_steps=1, base_batch=2, steps=5, eval_every=2,
    save_every=3, eval_tasks=3,
)  # fmt: skip

# ---- which tasks ----


@pytest.mark.parametrize("per_step", [1, 2, 3, 5, 7])
def test_every_epoch_holds_every_task_once_in_a_new_order(per_step):
    config, tasks = replace(STEP, tasks_per_step=per_step), list(range(5))
    picked = [task for step in range(35) for task in train.pick_tasks(tasks, step, config)]
    assert len(picked) == 35 * per_step
    epochs = [picked[i : i + 5] for i in range(0, len(picked), 5)]
    assert all(sorted(epoch) == tasks for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs[:7]}) > 3


def test_the_order_of_the_tasks_is_a_function_of_seed_and_step():
    def order(seed):
        config = replace(STEP, seed=seed, tasks_per_step=4)
        return [train.pick_tasks(list(range(100)), step, config) for step in range(50)]

    assert order(1) == order(1) and order(1) != order(2)
    assert all(len(set(step)) == 4 for step in order(1))
    assert order(1)[7] == train.pick_tasks(list(range(100)), 7, replace(STEP, seed=1, tasks_per_step=4))


# ---- the step's rollouts ----


class Still(torch.optim.SGD):
    """An optimizer that leaves the weights alone."""

    def step(self):
        pass


def one_step(model, tokenizer, step=2, config=STEP, control=None, world=WORLD):
    optimizer = Still(model.parameters(), lr=1.0)
    return train.train_step(model, optimizer, tokenizer, world, "echo", step, config, control)


def told(episodes):
    return [(e.task.name, e.group, e.transcript.ids, e.reward) for e in episodes]


def test_a_step_plays_its_own_training_tasks_with_its_own_noise(model, tokenizer):
    played, metrics = one_step(model, tokenizer)
    tasks = train.pick_tasks(WORLD.train, 2, STEP)
    expected = sample_episodes(model, tokenizer, tasks, 2, STEP, (Noise.TRAINING, 3, 2))
    assert told(played) == told(expected)
    assert {e.task.name for e in played} <= {task.name for task in WORLD.train}
    assert metrics["turns"] == 1 and metrics["stop"]["max_turns"] + metrics["stop"]["done"] == 6
    assert metrics["rollout_seconds"] > 0 < metrics["update_seconds"]


def test_the_noise_is_new_in_every_step_and_of_every_kind(model, tokenizer):
    def ids(kind, seed, step):
        played = sample_episodes(model, tokenizer, WORLD.train[:1], 1, STEP, (kind, seed, step))
        return tuple(played[0].transcript.ids)

    keys = [(kind, seed, step) for kind in Noise for seed in (1, 2) for step in (0, 1)]
    assert len({ids(*key) for key in keys}) == len(keys)
    assert sorted(Noise) == [1, 2, 3, 4, 5]  # saved results depend on them


def test_a_control_changes_the_batch_and_sees_what_it_may(model, tokenizer):
    seen = []

    def control(batch, context):
        seen.append((batch, context))
        return replace(batch, observation_weights=0 * batch.observation_weights)

    plain = one_step(model, tokenizer)
    played, metrics = one_step(model, tokenizer, control=control)
    (batch, context), *others = seen
    assert not others and told(played) == told(plain[0])
    assert metrics["env_loss"] == 0 and metrics["observation_ce"] == plain[1]["observation_ce"] > 0
    assert told(context.episodes) == told(played) and len(batch) == 6
    assert (context.step, context.config, context.model, context.tokenizer) == (2, STEP, model, tokenizer)
    assert context.telling == WORLD.telling


def test_a_controls_targets_are_what_is_predicted_and_its_ce_has_another_name(model, tokenizer):
    def control(batch, context):
        context.metrics["moved"] = 1.0
        return replace(batch, targets=(batch.targets + 1) % 300)

    plain, metrics = one_step(model, tokenizer)[1], one_step(model, tokenizer, control=control)[1]
    assert metrics["env_loss"] != plain["env_loss"] and metrics["moved"] == 1.0
    assert metrics["control_ce"] > 0 and metrics["control_ce"] != plain["observation_ce"]
    assert not {"observation_ce", "trivial_failures"} & set(metrics)
    assert metrics["turns"] == plain["turns"]


def test_a_control_sees_the_rows_of_the_batch(model, tokenizer, monkeypatch):
    """An episode that is not valid is neither in the batch nor in what the control sees."""
    real = train.sample_episodes

    def one_late(*args):
        played = real(*args)
        played[1].stop = StopReason.AGENT_TIMEOUT
        return played

    def control(batch, context):
        assert len(context.episodes) == len(batch) == 5
        assert [len(e.transcript) for e in context.episodes] == batch.lengths.tolist()
        return batch

    monkeypatch.setattr(train, "sample_episodes", one_late)
    played, metrics = one_step(model, tokenizer, control=control)
    assert len(played) == 6 and metrics["stop"]["agent_timeout"] == 1


# ---- the update ----


def updated(model, config, step=0, batch=None, lr=1.0):
    """-> metrics, the optimizer."""
    optimizer = Capture(model.parameters(), lr=lr)
    batch = batch or make_batch(episodes(model.config.vocab_size), config)
    return train.update(model, optimizer, batch, "echo", step, config), optimizer


@pytest.mark.parametrize(
    "warmup, rates",
    [(0, [1, 1, 1]), (1, [1, 1, 1]), (4, [0.25, 0.5, 0.75, 1, 1, 1]), (3, [1 / 3, 2 / 3, 1, 1])],
)
def test_the_learning_rate_rises_in_equal_parts_and_stays(model, warmup, rates):
    config = replace(CONFIG, learning_rate=0.08, warmup_steps=warmup)
    got = [updated(model, config, step)[1].param_groups[0]["lr"] for step in range(len(rates))]
    assert got == pytest.approx([0.08 * rate for rate in rates])
    assert updated(model, config, 1000)[1].param_groups[0]["lr"] == 0.08


def test_gradients_are_clipped_and_the_norm_before_is_told(model):
    def norm(optimizer):
        return torch.cat([g.double().flatten() for g in optimizer.grads]).norm().item()

    metrics, free = updated(model, CONFIG)
    assert metrics["grad_norm"] == pytest.approx(norm(free), rel=1e-5) and norm(free) > 0.1
    metrics_again, clipped = updated(model, replace(CONFIG, grad_clip=0.01))
    assert norm(clipped) == pytest.approx(0.01, rel=1e-3)
    assert metrics_again["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-5)
    scale = 0.01 / norm(free)
    for g, whole in zip(clipped.grads, free.grads, strict=True):
        torch.testing.assert_close(g, whole * scale, rtol=1e-3, atol=1e-9)


def test_no_gradient_is_left_for_the_next_step(model):
    updated(model, CONFIG)
    assert all(p.grad is None for p in model.parameters())


def test_rounding_is_keyed_by_seed_and_step(model):
    rate = torch.tensor(0.0)
    for seed, step in ((1, 0), (1, 7), (2, 7)):
        config = replace(CONFIG, seed=seed, learning_rate=0.5, warmup_steps=0)
        _, optimizer = updated(model, config, step, lr=rate)
        assert torch.initial_seed() == seed * 1_000_003 + step
        assert optimizer.param_groups[0]["lr"].item() == 0.5


def test_metrics_of_an_update_by_hand(model):
    """Each as its name says, in one pass and in many."""
    some = episodes(model.config.vocab_size)
    for tokens in (1, 10**6):
        config = replace(CONFIG, temperature=0.8, observation_temperature=1.3, micro_batch_tokens=tokens)
        metrics, _ = updated(model, config, batch=make_batch(some, config))
        changes, nats = [], []
        for e in some:
            with torch.no_grad():
                logits = model(torch.tensor([e.transcript.ids])).logits[0].double()
            for t, (i, role) in enumerate(zip(e.transcript.ids, e.transcript.roles, strict=True)):
                if role == Role.ACTION:
                    logprob = (logits[t - 1] / 0.8).log_softmax(-1)[i]
                    changes.append(logprob - e.transcript.logprobs[t])
                elif role == Role.OBSERVATION:
                    nats.append(-(logits[t - 1] / 1.3).log_softmax(-1)[i])
        changes, nats = torch.stack(changes), torch.stack(nats)
        assert metrics["observation_ce"] == pytest.approx(nats.mean().item(), rel=1e-5)
        assert metrics["mismatch"] == pytest.approx(changes.abs().mean().item(), rel=1e-4)
        assert metrics["ratio"] == pytest.approx(changes.exp().mean().item(), rel=1e-4)
        assert metrics["learning_share"] == pytest.approx(5 / 6)
        assert metrics["trivial_failures"] == 0


def test_failures_whose_output_was_known_are_counted(model, monkeypatch):
    monkeypatch.setattr(echo, "PREDICTABLE", 100.0)  # everything
    some = episodes(model.config.vocab_size, rewards=(1, 0, 0, 1, 0, 0.5))
    for tokens in (1, 10**6):
        config = replace(CONFIG, micro_batch_tokens=tokens)
        metrics, _ = updated(model, config, batch=make_batch(some, config))
        assert metrics["trivial_failures"] == pytest.approx(3 / 6)
    monkeypatch.setattr(echo, "PREDICTABLE", 0.0)  # nothing
    assert updated(model, CONFIG, batch=make_batch(some, CONFIG))[0]["trivial_failures"] == 0


def test_each_segment_has_its_own_temperature(model):
    """A policy loss at another temperature leaves the observation loss alone, and the other way round."""
    def losses(actions, observations):
        config = replace(CONFIG, temperature=actions, observation_temperature=observations)
        metrics, _ = updated(model, config, batch=make_batch(episodes(model.config.vocab_size), config))
        return metrics["policy_loss"], metrics["env_loss"]

    policy, env = losses(0.7, 1.0)
    assert losses(0.7, 2.0)[0] == policy and losses(0.7, 2.0)[1] != env
    assert losses(1.1, 1.0)[1] == env and losses(1.1, 1.0)[0] != policy


# ---- an arm ----


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("step") / "base"
    make_base(SMALL, WORLD, folder)
    return folder


@pytest.fixture()
def run(base, tmp_path):
    shutil.copytree(base, tmp_path / "run" / "base")
    return tmp_path / "run"


@pytest.fixture()
def saved(monkeypatch):
    """Steps after which a checkpoint was written; it is written, too."""
    steps, real = [], checkpoint.save

    def save(arm, step, *rest):
        steps.append(step)
        real(arm, step, *rest)

    monkeypatch.setattr(checkpoint, "save", save)
    return steps


def arm(run, config=SMALL, interrupted=None, control=None):
    train.train_arm("echo", config, WORLD, run, interrupted or threading.Event(), control)
    return report.read(run / "metrics.jsonl")


def whole_run(config, run):
    """train.main on a base that was made under these settings."""
    config.save(run / "base" / "echo_min.json")
    train.main(config, run)
    return report.read(run / "metrics.jsonl")


def steps_of(lines, key):
    return [line["step"] for line in lines if key in line]


def test_what_an_arm_logs_and_saves_and_when(run, saved):
    lines = arm(run)
    assert steps_of(lines, "reward") == [1, 2, 3, 4, 5]
    assert steps_of(lines, "pass_rate") == [0, 2, 4, 5]
    assert all(line["arm"] == "echo" for line in lines)
    assert saved == [0, 3, 5] and checkpoint.latest(run / "echo")[0] == 5
    names = sorted(path.name for path in (run / "transcripts").iterdir())
    assert names == [f"echo-{step:06d}.txt" for step in (2, 4, 5)]
    train.train_arm("echo", SMALL, replace(WORLD, expert=None), run, threading.Event(), None)
    assert report.read(run / "metrics.jsonl") == lines and saved == [0, 3, 5]  # it was done
    again = arm(run, replace(SMALL, steps=6))  # and goes on from there
    assert again[: len(lines)] == lines and steps_of(again[len(lines) :], "reward") == [6]


def test_ctrl_c_saves_and_ends_after_the_step_but_not_after_the_last(run, saved):
    interrupted = threading.Event()

    def at(step):
        def control(batch, context):
            if context.step == step:
                interrupted.set()
            return batch

        return control

    with pytest.raises(RunEnded, match="ended after step 2, as you asked"):
        arm(run, interrupted=interrupted, control=at(1))
    assert saved == [0, 2]
    interrupted.clear()
    lines = arm(run, interrupted=interrupted, control=at(4))
    assert saved == [0, 2, 3, 5] and steps_of(lines, "reward") == [1, 2, 3, 4, 5]


def test_arms_start_from_one_base_and_meet_the_same_tasks(run):
    """With lambda 0 both arms are the same run."""
    config = replace(SMALL, arms="grpo,echo", env_weight=0.0, steps=2)
    lines = [{k: v for k, v in line.items() if not k.endswith("seconds")}
             for line in whole_run(config, run)]  # fmt: skip
    grpo, echo = ([line | {"arm": ""} for line in lines if line["arm"] == name] for name in ("grpo", "echo"))
    assert grpo == echo and len(grpo) == 4
    assert (run / "curves.png").stat().st_size > 1000


def test_a_run_is_that_of_its_seed_and_settings(run):
    lines = whole_run(replace(SMALL, arms="echo", steps=1), run)
    done, model, tokenizer, _ = checkpoint.restore(run, "other", SMALL)
    assert done is None  # of an arm that has not begun, the base
    world = load_world("tool", SMALL.seed)  # facts and tasks are drawn by the run's seed
    tasks = train.pick_tasks(world.train, 0, SMALL)
    played = sample_episodes(model, tokenizer, tasks, 2, SMALL, (Noise.TRAINING, SMALL.seed, 0))
    told = (run / "transcripts" / "echo-000001.txt").read_text()
    assert all(task.instruction in told for task in tasks)
    (line,) = [line for line in lines if "reward" in line]
    assert line["action_tokens"] == sum(e.transcript.count(Role.ACTION) for e in played) / 6
    assert line["observation_tokens"] == sum(e.transcript.count(Role.OBSERVATION) for e in played) / 6


def test_a_control_and_its_name_belong_together(tmp_path):
    with pytest.raises(ValueError, match="control 'x'"):
        train.main(replace(SMALL, control="x"), tmp_path)
    with pytest.raises(ValueError, match="control ''"):
        train.main(SMALL, tmp_path, control=lambda batch, context: batch)
    assert not list(tmp_path.iterdir())


# ---- checkpoints ----


def test_the_newest_checkpoint_is_the_one_with_most_steps(tmp_path):
    for name in ("step-000002", "step-000010", "step-000009", "step-000011.tmp"):
        (tmp_path / name).mkdir()
    assert checkpoint.latest(tmp_path) == (10, tmp_path / "step-000010")
    assert checkpoint.latest(tmp_path / "none") is None


def test_restore_takes_weights_optimizer_and_step_of_the_newest(run):
    arm(run, replace(SMALL, steps=2, save_every=1))
    done, model, _, optimizer = checkpoint.restore(run, "echo", SMALL)
    assert done == 2
    base = checkpoint.restore(run, "grpo", SMALL)[1]
    assert any((p != q).any() for p, q in zip(model.parameters(), base.parameters(), strict=True))
    states = optimizer.state_dict()["state"]
    assert len(states) == len(list(model.parameters())) and all(s["step"] == 2 for s in states.values())


def test_lines_after_the_checkpoint_are_dropped_of_this_arm_alone(run):
    arm(run, replace(SMALL, steps=2, save_every=1))
    path = run / "metrics.jsonl"
    before = path.read_text()
    extra = [{"arm": "echo", "step": 3, "reward": 1}, {"arm": "grpo", "step": 3, "reward": 1}]
    assert steps_of(report.read(path), "arm") == [0, 1, 2, 2]
    path.write_text(before + "".join(json.dumps(line) + "\n" for line in extra))
    checkpoint.restore(run, "echo", SMALL)
    assert path.read_text() == before + json.dumps(extra[1]) + "\n"
    checkpoint.restore(run, "grpo", SMALL)  # of which nothing is saved: not even step 0
    assert path.read_text() == before


def test_a_checkpoint_resumes_bit_for_bit_on_the_next_batch(run):
    """Weights and optimizer after one more update are those of the run that went on."""
    _, model, _, optimizer = checkpoint.restore(run, "echo", SMALL)
    batch = make_batch(episodes(model.config.vocab_size), SMALL)
    train.update(model, optimizer, batch, "echo", 0, SMALL)
    tokenizer = checkpoint.restore(run, "echo", SMALL)[2]
    checkpoint.save(run / "echo", 1, model, tokenizer, optimizer, SMALL)
    for step in (0, 1):
        report.log(run / "metrics.jsonl", {"arm": "echo", "step": step})
    weights = copy.deepcopy(list(model.parameters()))
    train.update(model, optimizer, batch, "echo", 1, SMALL)
    done, again, _, optimizer = checkpoint.restore(run, "echo", SMALL)
    assert done == 1 and all(map(torch.equal, again.parameters(), weights))
    train.update(again, optimizer, batch, "echo", 1, SMALL)
    assert all(map(torch.equal, again.parameters(), model.parameters()))
