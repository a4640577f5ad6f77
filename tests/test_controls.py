"""Controls: what each changes and what it leaves, exactly; and that none is silently plain ECHO."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "figures"))

import controls  # noqa: E402

import train  # noqa: E402
from echo_min import cli, report  # noqa: E402
from echo_min.batch import make_batch  # noqa: E402
from echo_min.config import Config, RunEnded  # noqa: E402
from echo_min.masking import Role, Transcript, encode  # noqa: E402
from echo_min.optimizer import make_optimizer  # noqa: E402
from echo_min.rollout import Episode, StopReason  # noqa: E402
from echo_min.tasks import Task  # noqa: E402
from echo_min.worlds.registry import load_tasks  # noqa: E402
from echo_min.worlds.tool import VERBS  # noqa: E402

CONFIG = Config(seed=3, device="cpu", arms="echo", env_weight=1.0)
OUTPUTS = [["usage: tk align -k FILE\n", "ok acorn\n"], ["usage: tk align -z FILE\n"], ["load: zk-z\n"], []]
SMALL = {
    "device": "cpu", "base_demonstrations": 24, "base_steps": 3, "tasks_per_step": 2, "group_size": 3,
    "eval_every": 2, "eval_tasks": 4, "steps": 4,
}  # fmt: skip


def make(tokenizer, outputs=OUTPUTS):
    episodes = []
    for number, texts in enumerate(outputs):
        transcript = Transcript()
        transcript.append(Role.PROMPT, encode(tokenizer, Role.PROMPT, "align acorn -k"))
        for text in texts or [""]:
            ids = encode(tokenizer, Role.ACTION, "tk align -k acorn")
            transcript.append(Role.ACTION, ids, [-1.0] * len(ids))
            transcript.append(Role.OBSERVATION, encode(tokenizer, Role.OBSERVATION, text))
        task = Task("task", "align acorn", "exit 1", "true")
        episodes.append(Episode(task, number // 2, transcript, reward=0.0, stop=StopReason.MAX_TURNS))
    return make_batch(episodes, CONFIG)


@pytest.fixture
def batch(tokenizer):
    return make(tokenizer)


@pytest.fixture
def context(model, tokenizer):
    return train.Context([], model, tokenizer, 5, CONFIG, ("-k", "-z"), {})


def texts(tokenizer, batch, mask=None):
    """What the targets say, output by output."""
    spans = controls.outputs(batch.observation_mask if mask is None else mask)
    return [tokenizer.decode(batch.targets[b, first:end]) for b, first, end in spans]


def unchanged_but(before, after, *names):
    for name, value in vars(before).items():
        assert name in names or getattr(after, name) is value, name


def test_outputs_are_the_runs_of_the_mask():
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    assert controls.outputs(mask) == [(0, 1, 3), (0, 4, 5), (1, 0, 1), (3, 0, 5)]


def test_placebo_deals_the_same_tokens_out_by_seed_and_step(batch, context):
    after = controls.placebo(batch, context)
    unchanged_but(batch, after, "targets")
    mask = batch.observation_mask
    assert torch.equal(after.targets[~mask], batch.ids[~mask])
    pool, generator = batch.ids[mask], torch.Generator().manual_seed(3 * 1_000_003 + 5)
    assert torch.equal(after.targets[mask], pool[torch.randperm(len(pool), generator=generator)])
    assert not torch.equal(after.targets, batch.ids)
    true = (after.targets == batch.ids)[mask].float().mean().item()
    assert context.metrics == {"true_targets": true} and 0 < true < 0.5
    again = controls.placebo(batch, context)
    assert torch.equal(again.targets, after.targets)
    other = controls.placebo(batch, replace(context, step=6))
    assert not torch.equal(other.targets, after.targets)


def test_placebo_words_moves_telling_words_and_nothing_else(tokenizer, context):
    flags = "-k", "-z", "-k", "-z", "-k", "-z"
    usage = [f"usage: tk align {flag} FILE\n" for flag in flags]
    batch = make(tokenizer, [[line] for line in usage] + [["load: k z - k z\n"]] * 2)
    assert len({len(tokenizer.encode(f" {flag}")) for flag in flags}) == 2  # of one token and of several
    several = replace(context, telling=("-z", "-y"))
    assert controls.placebo_words(batch, several) is batch  # only one word of this length occurs
    batch = make(tokenizer, [[line.replace("-k", "-y")] for line in usage] + [["load: y z - y z\n"]] * 2)
    after = controls.placebo_words(batch, several)
    unchanged_but(batch, after, "targets")
    before, said = texts(tokenizer, batch), texts(tokenizer, after)
    assert said[6:] == before[6:] and said != before
    assert sorted(said) == sorted(before)  # whole words, none lost
    unlike = sum(a != b for a, b in zip(said, before, strict=True))
    flagged = tokenizer.encode(" -y")
    changed = sum(x != y for x, y in zip(flagged, tokenizer.encode(" -z"), strict=True))
    assert (after.targets != batch.ids).sum() == unlike * changed


def test_a_piece_of_a_telling_word_is_not_one(tokenizer, context):
    pieces = [tokenizer.encode(form) for form in ("-z", " -z")]
    assert min(map(len, pieces)) > 1  # else this tests nothing
    batch = make(tokenizer, [["z zz z\n"], ["-\n", "k z\n"], ["- z\n"], ["zip -a\n"]])
    context.telling = ("-z",)
    assert controls.placebo_words(batch, context) is batch


def test_placebo_outputs_exchanges_with_another_output_at_full_weight(tokenizer, context, batch):
    after = controls.placebo_outputs(batch, context)
    unchanged_but(batch, after, "targets", "observation_mask", "observation_weights")
    spans = controls.outputs(batch.observation_mask)
    before = [tuple(batch.ids[b, first:end].tolist()) for b, first, end in spans]
    assert len(set(map(len, before))) > 1  # some are cut
    for (b, first, end), own in zip(spans, before, strict=True):
        donors = [text for text in before if text != own]
        kept = int(after.observation_mask[b, first:end].sum())
        assert after.observation_mask[b, first : first + kept].all() and kept > 0
        target = tuple(after.targets[b, first : first + kept].tolist())
        assert any(text[: end - first] == target for text in donors)
        mine, echo = (x.observation_weights[b, first:end] for x in (after, batch))
        torch.testing.assert_close(mine.sum(), echo.sum())
        assert (mine[kept:] == 0).all() and len(mine[:kept].unique()) == 1
    assert torch.equal(after.targets[~batch.observation_mask], batch.ids[~batch.observation_mask])
    torch.testing.assert_close(after.observation_weights.sum(), batch.observation_weights.sum())
    assert after.observation_mask.sum() < batch.observation_mask.sum()
    true = (after.targets == batch.ids)[after.observation_mask].float().mean().item()
    assert context.metrics == {"true_targets": true}


def test_placebo_outputs_never_draws_an_equal_output(tokenizer, context):
    same = ["usage: tk align -k FILE\n"]
    batch = make(tokenizer, [same] * 7 + [["ok acorn done\n"]])
    for step in range(20):
        after = controls.placebo_outputs(batch, replace(context, step=step))
        said = texts(tokenizer, after)
        assert said[:7] == ["ok acorn done\n"[: len(said[0])]] * 7 and said[7].startswith("usage:")


def test_elsewhere_predicts_as_many_tokens_of_other_verbs_and_leaves_the_actions(tokenizer, context, batch):
    after = controls.elsewhere(batch, context)
    B, T = batch.ids.shape
    own = [(name, value, getattr(after, name)[:B]) for name, value in vars(batch).items()]
    for name, before, now in own:
        same = now[:, :T] if now.dim() == 2 else now
        if name.startswith("observation_"):
            assert not now.any()
        else:
            assert torch.equal(before, same) and (now.dim() == 1 or not now[:, T:].any()), name
    assert len(after) > B and not after.action_mask[B:].any() and not after.action_weights[B:].any()
    assert not after.advantages[B:].any() and after.targets is not after.ids
    assert torch.equal(after.targets, after.ids)
    assert after.observation_mask.sum() == batch.observation_mask.sum()
    assert after.observation_weights.sum().item() == pytest.approx(batch.observation_weights.sum().item())
    printed = " ".join(texts(tokenizer, after))
    verbs = [verb for verb in VERBS["linked"] if verb in printed]
    assert verbs and "usage: tk" in printed and not any(verb in printed for verb in VERBS["train"])
    again, other = controls.elsewhere(batch, context), controls.elsewhere(batch, replace(context, step=6))
    assert torch.equal(again.ids, after.ids)
    assert other.ids.shape != after.ids.shape or not torch.equal(other.ids, after.ids)


def test_a_loss_over_exchanged_outputs_has_echos_weight(tokenizer, model, context, batch):
    """Under a uniform policy the loss is log V times the total weight, whatever the targets are."""
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()  # tied to the head
    optimizer = make_optimizer(model, CONFIG)
    losses = []
    for changed in (batch, controls.placebo_outputs(batch, context), controls.placebo(batch, context)):
        losses.append(train.update(model, optimizer, changed, "echo", 0, replace(CONFIG, learning_rate=1e-9)))
    expected = math.log(len(tokenizer)) * batch.observation_weights.sum().item()
    assert [loss["env_loss"] for loss in losses] == pytest.approx([expected] * 3, rel=1e-4)


def test_metrics_on_false_targets_have_another_name(model, tokenizer):
    config = replace(CONFIG, tasks_per_step=1, group_size=2)
    world, optimizer = load_tasks(config.tasks, False, config.seed), make_optimizer(model, config)

    def step(control):
        return train.train_step(model, optimizer, tokenizer, world, "echo", 0, config, control)[1]

    def false(batch, context):
        context.metrics["told"] = 7
        return replace(batch, targets=batch.ids.clone())

    named = {"observation_ce", "trivial_failures", "control_ce", "told"}
    assert named & step(None).keys() == named & step(lambda batch, _: batch).keys()
    assert named & step(None).keys() == {"observation_ce", "trivial_failures"}
    metrics = step(false)
    assert named & metrics.keys() == {"control_ce", "told"}
    assert f"CE {metrics['control_ce']:.2f}" in report.progress(metrics, {}, 2)
    history = [{"reward": 0.0, "command_diversity": 1 / i, "control_ce": 1 / i} for i in range(1, 41)]
    assert report.collapse_alarm(history) is None


@pytest.mark.parametrize("name", controls.CONTROLS)
def test_a_batch_with_nothing_to_change_comes_back_itself(name, tokenizer, context):
    for outputs in ([[], []], [["ok"], []])[: 1 if name == "elsewhere" else 2]:
        batch = make(tokenizer, outputs)
        assert controls.CONTROLS[name](batch, context) is batch
    assert context.metrics == {}


@pytest.mark.parametrize("name", controls.CONTROLS)
def test_a_control_that_changes_nothing_ends_the_run(name, tokenizer, context):
    control, nothing = controls.named(name), make(tokenizer, [[], []])
    for step in range(controls.PATIENCE - 1):
        control(nothing, replace(context, step=step))
    with pytest.raises(RunEnded, match=f"{name}: found nothing to change .* world:tool"):
        control(nothing, replace(context, step=controls.PATIENCE - 1))
    control = controls.named(name)
    some = make(tokenizer, [[f"usage: tk align {flag} FILE\n"] for flag in ("-y", "-z") * 4])
    assert control(some, replace(context, step=2, telling=("-y", "-z"))) is not some
    for step in range(3, controls.PATIENCE + 5):
        assert control(nothing, replace(context, step=step)) is nothing


def test_a_world_without_telling_words_is_refused(batch, context):
    context.telling = ()
    with pytest.raises(ValueError, match="placebo_words: world:tool names no telling words"):
        controls.placebo_words(batch, context)


def test_a_run_says_its_control_and_train_refuses_it_without(tmp_path):
    with pytest.raises(ValueError, match=r"control 'placebo'.*figures/controls.py"):
        train.main(Config(control="placebo", arms="echo", **SMALL), tmp_path / "run")
    with pytest.raises(ValueError, match=r"figures/controls.py"):
        train.main(Config(arms="echo", **SMALL), tmp_path / "run", control=controls.named("placebo"))
    assert not (tmp_path / "run").exists()


def lines(folder):
    found = report.read(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.endswith("seconds")} for line in found]


def test_a_resumed_run_repeats_its_control(tmp_path):
    config = Config(control="placebo", arms="echo", **SMALL)
    train.main(config, tmp_path / "whole", control=controls.named("placebo"))
    train.main(replace(config, steps=2), tmp_path / "parts", control=controls.named("placebo"))
    train.main(config, tmp_path / "parts", control=controls.named("placebo"))
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


@pytest.mark.slow
def test_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    controls.main(["placebo_outputs", *flags, "--steps", "1"])
    config = Config.load(Path("runs/placebo_outputs/config.json"))
    assert (config.control, config.arms) == ("placebo_outputs", "echo")
    assert lines(Path("runs/placebo_outputs"))[-1]["step"] == 1
    controls.main(["--resume", "runs/placebo_outputs", "--steps", "2"])
    assert lines(Path("runs/placebo_outputs"))[-1]["step"] == 2
    Path("plain").mkdir()
    Config(**SMALL).save(Path("plain/config.json"))
    for words, said in (
        (["moon"], "'moon' is no control; there is placebo, placebo_words, placebo_outputs"),
        (["placebo", "--arms", "grpo"], "arms grpo"),
        (["--resume", "plain"], "the control ''"),
        (["placebo_words", "--tasks", "world:moon", "--name", "moon"], "world:moon does not exist"),
    ):
        with pytest.raises(SystemExit, match=said):
            controls.main(words)


def test_a_run_that_ends_says_how_to_go_on(tmp_path):
    config = Config(control="placebo", arms="echo", **SMALL)
    config.save(tmp_path / "config.json")

    def main(*_):
        raise RunEnded("no more")

    with pytest.raises(SystemExit, match=rf"no more.*python figures/controls\.py --resume {tmp_path}"):
        cli.run(main, config, tmp_path)
