"""The numbers that figure scripts make of their lines: each from lines whose answer is known."""

import copy
import fcntl
import sys
from dataclasses import replace
from math import isnan, log, nan
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "figures"))

import common  # noqa: E402
import doses  # noqa: E402
import foretold  # noqa: E402
import gnu_curves  # noqa: E402
import held_out_ce  # noqa: E402
import lambda_sweep  # noqa: E402
import learning_curves  # noqa: E402
import linkage  # noqa: E402
import recipe  # noqa: E402
import stats  # noqa: E402
import tables  # noqa: E402
import verifier_free  # noqa: E402

import train  # noqa: E402
from echo_min.batch import make_batch  # noqa: E402
from echo_min.config import Config  # noqa: E402
from echo_min.evaluate import expert_transcripts  # noqa: E402
from echo_min.masking import Role, Transcript, encode  # noqa: E402
from echo_min.optimizer import make_optimizer  # noqa: E402
from echo_min.rollout import Episode, StopReason  # noqa: E402
from echo_min.tasks import Task  # noqa: E402
from echo_min.tiny import tiny_tokenizer  # noqa: E402
from echo_min.worlds.registry import load_world  # noqa: E402
from echo_min.worlds.tool import FILES  # noqa: E402


def run(name, *steps, **numbers):
    """Lines of a run: `numbers` are lists, one value for each of the steps."""
    key, seed = name.rpartition("/")[0], int(name.rpartition("/")[2])
    values = zip(*numbers.values(), strict=True)
    return [
        {"key": f"{key}/{seed}", "seed": seed, "step": step} | dict(zip(numbers, row, strict=True))
        for step, row in zip(steps, values, strict=True)
    ]


# ---- learning_curves ----


def test_the_endpoint_is_the_mean_of_full_evaluations_after_step_0():
    lines = run("hard/grpo/3", 0, 25, 50, pass_rate=[0.9, 0.2, 0.4]) + run(
        "hard/grpo/3", 30, pass_rate_few=[1.0]
    )
    assert learning_curves.end(lines) == {3: pytest.approx(0.3)}


def test_contrasts_are_paired_and_corrected_for_all_that_were_planned():
    lines = []
    for seed, grpo, low, tuned in ((1, 0.1, 0.2, 0.5), (2, 0.2, 0.2, 0.7), (3, 0.1, 0.4, 0.4)):
        for name, rate in (("grpo", grpo), ("echo 0.05", low), ("echo", tuned)):
            lines += run(f"hard/{name}/{seed}", 25, pass_rate=[rate])
    found = learning_curves.contrasts(lines)
    assert list(found) == learning_curves.CONTRASTS and len(found) == 10
    differences, p, corrected = found["hard", "echo", "grpo"]
    assert differences == pytest.approx([0.4, 0.5, 0.3])
    assert p == stats.paired_p(differences) and corrected == pytest.approx(10 * p)
    differences, p, corrected = found["hard", "echo 0.05", "grpo"]
    assert differences == pytest.approx([0.1, 0.0, 0.3]) and corrected == pytest.approx(min(1, 9 * p))
    assert all(isnan(found[contrast][2]) for contrast in found if contrast[0] != "hard")
    assert learning_curves.verdict([], nan) == "no data"
    assert learning_curves.verdict([0.3, 0.1], 0.049) == "ahead (+0.20)"
    assert learning_curves.verdict([-0.3, -0.1], 0.049) == "behind (-0.20)"
    assert learning_curves.verdict([0.3, 0.1], 0.05) == "open"


def test_steps_to_best_are_of_whole_windows_and_over_grpos_own():
    steps = range(0, 50, 5)
    own = run("hard/grpo/1", *steps, pass_rate_few=[0, 0, 0, 0, 0, 0.1, 0.2, 0.3, 0.4, 0.9])
    assert learning_curves.smooth(own) == pytest.approx(
        {10: 0, 15: 0.02, 20: 0.06, 25: 0.12, 30: 0.2, 35: 0.38}
    )
    soon = run("hard/echo/1", *steps, pass_rate_few=[0.38] * 10)
    never = run("hard/echo/2", *steps, pass_rate_few=[0.3] * 10)
    other = run("hard/grpo/2", *steps, pass_rate_few=[0, 0, 0, 0, 0, 0.1, 0.2, 0.3, 0.4, 0.9])
    assert learning_curves.steps_to_best(soon + never, own + other) == {1: pytest.approx(10 / 35)}
    assert learning_curves.steps_to_best(own, own) == {1: 1.0}
    assert learning_curves.steps_to_best(soon, []) == {}


def test_every_experiment_has_the_recipe_of_its_world():
    for script in (learning_curves, lambda_sweep, doses):
        for key, (_, _, config) in script.jobs().items():
            if "/free/" in key:  # without a reward: another learning rate
                assert config == verifier_free.config("hard", config.seed, config.tasks.split("hard")[1])
                continue
            world = config.tasks.removeprefix("world:").split(",")[0]
            assert {name: getattr(config, name) for name in recipe.RECIPE[world]} == recipe.RECIPE[world]
    jobs = learning_curves.jobs()
    assert jobs["gnu/echo/2"][2].env_weight == recipe.TUNED["gnu"]
    assert {jobs[f"hard/{c}/1"][2].env_weight for c in ("echo 0.05", *learning_curves.CONTROLS)} == {0.05}
    assert len(jobs) == 5 * (7 + 3 + 3)


# ---- held_out_ce, gnu_curves ----


def test_ce_changes_between_the_base_and_the_last_step():
    lines = run("hard/grpo/1", 0, 75, 150, ce_telling=[2.0, 0.1, 1.5])
    lines += run("hard/grpo/2", 0, 75, 150, ce_telling=[2.2, 0.1, 1.9])
    first, last, differences = held_out_ce.change(lines, "telling")
    assert (first, last) == ([2.0, 2.2], [1.5, 1.9]) and differences == pytest.approx([-0.5, -0.3])
    assert held_out_ce.verdict([-0.5, -0.49, -0.51]) == "falls by 0.50"
    assert held_out_ce.verdict([0.5, 0.49, 0.51]) == "rises by 0.50"
    assert held_out_ce.verdict([-0.5, -0.3]) == "open" and held_out_ce.verdict([1.0]) == "no data"


def test_the_floor_in_files_is_a_guess_among_all_names():
    """One telling token an output, each name as likely as any."""
    world = load_world("file", 1)
    tokenizer = tiny_tokenizer([text for t in world.train for text in (t.solution, "\n".join(t.files))])
    config = Config(tasks="world:file", eval_tasks=12)
    names = []
    for transcript in expert_transcripts(tokenizer, world, config):
        of = held_out_ce.probes.kinds(tokenizer, transcript, world.telling)
        told = [position for position, kind in of.items() if kind == "telling"]
        assert len(told) == 1
        names.append(tokenizer.decode(transcript.ids[told[0]]).strip())
    assert set(names) <= set(FILES) and len(set(names)) > 6
    assert {("file", "telling"): pytest.approx(log(20))} == held_out_ce.FLOOR


def test_gnu_says_what_is_valid_and_what_is_right_given_that():
    line = {"slot_first": 0.1, "slot_others": 0.3, "slot_refused": 0.5, "slot_goal": 0.2}
    found = gnu_curves.exact(line)
    assert (found["p_valid"], found["p_right"]) == (pytest.approx(0.4), pytest.approx(0.5))
    assert (found["p_first"], found["p_missed"]) == (pytest.approx(0.25), pytest.approx(0.2 / 0.8))
    assert gnu_curves.exact(dict.fromkeys(line, 0.0))["p_right"] == 0.0


@pytest.mark.parametrize("valid, right, said", [
    ([0.2, 0.21, 0.19], [0.01, 0.02, 0.0], ("higher", "alike")),
    ([-0.2, -0.21, -0.19], [0.2, 0.21, 0.19], ("lower", "undecided")),
    ([0.2, -0.2, 0.1], [0.09, 0.08, 0.02], ("open", "undecided")),
    ([], [], ("open", "undecided")),
])  # fmt: skip
def test_the_predictions_of_gnu_are_judged_by_intervals(valid, right, said):
    lines = []
    for seed, (more_valid, more_right) in enumerate(zip(valid, right, strict=True)):
        for name, v, r in (("grpo", 0.3, 0.4), ("echo", 0.3 + more_valid, 0.4 + more_right)):
            start = 9 if name == "grpo" else 0  # of the base, which does not count
            lines += run(f"gnu/{name}/{seed}", 0, 25, 50, p_valid=[start, v, v], p_right=[start, r, r])
    _, of_valid, _, of_right = gnu_curves.verdicts(lines, "echo")
    assert (of_valid, of_right) == said


def test_validity_of_misses_is_compared_with_grpo_after_step_0():
    lines = []
    for name, missed in (("grpo", [0.9, 0.1, 0.3]), ("echo", [0.0, 0.4, 0.6])):
        rates = dict.fromkeys(("p_valid", "p_right", "p_first", "ceiling", "valid"), [0.5] * 3)
        for seed in (1, 2):
            lines += run(f"gnu/{name}/{seed}", 0, 25, 50, **rates, p_missed=missed)
    grpo, echo = gnu_curves.table(lines, ("grpo", "echo"), {"grpo": "G", "echo": "E"}).splitlines()[2:4]
    assert " | 0.900 ± 0.000 → 0.300 ± 0.000 | – | " in grpo
    assert " | 0.000 ± 0.000 → 0.600 ± 0.000 | 0.300 ± 0.000 | " in echo


# ---- lambda_sweep, doses, verifier_free ----


def swept(weight, last, well_begun=0.9, foreseen=0.0):
    numbers = {"pass_rate": [0.9, 0.4, last], "well_begun": [1.0, 1.0, well_begun]}
    numbers |= {"trivial_failures": [0.0, 0.0, foreseen]}
    return run(f"hard/moderate/{weight:g}/11", 0, 50, 75, **numbers)


def test_a_collapse_is_said_and_how():
    lines = swept(0.0, 0.4) + swept(1.0, 0.21) + swept(5.0, 0.1, 0.1) + swept(20.0, 0.0, 0.4, 0.6)
    lines += swept(0.01, 0.1)
    found = {w: lambda_sweep.collapse(lines, "hard", "moderate", w) for w in (0.0, 1.0, 5.0, 20.0, 0.01, 0.2)}
    assert found == {0.0: ([], ""), 1.0: ([], ""), 5.0: ([11], "words destroyed"),
                     20.0: ([11], "predictable commands preferred"), 0.01: ([11], "well formed, slower"),
                     0.2: ([], "")}  # fmt: skip
    assert lambda_sweep.curve(lines, "hard", "moderate", 1.0, "pass_rate") == {11: pytest.approx(0.305)}
    small = [{"key": "hard/moderate/1/11", "seed": 11, "step": 60, "well_begun": 0.0}]
    assert lambda_sweep.curve(lines + small, "hard", "moderate", 1.0, "well_begun") == {11: 0.95}


def test_a_collapse_is_each_seeds_own_and_a_lead_paired():
    lines = []
    for seed, without, high, low in ((11, 0.4, 0.1, 0.6), (12, 0.1, 0.06, 0.31), (13, 0.3, 0.14, 0.49)):
        for weight, rate in ((0.0, without), (5.0, high), (1.0, low)):
            lines += run(f"hard/moderate/{weight:g}/{seed}", 75, pass_rate=[rate], well_begun=[1.0],
                         trivial_failures=[0.0])  # fmt: skip
    assert lambda_sweep.collapse(lines, "hard", "moderate", 5.0) == ([11, 13], "well formed, slower")
    said = lambda_sweep.headline(lines)
    assert said == ("hard, base with moderate observation CE, against lambda 0: ahead 1; behind –; "
                    "most runs collapse at 5 (well formed, slower, 2 of 3)")  # fmt: skip
    for seed, rate, begun in ((11, 0.0, 0.1), (12, 0.1, 1.0), (13, 0.3, 1.0)):  # one of three
        lines += run(f"hard/moderate/20/{seed}", 75, pass_rate=[rate], well_begun=[begun],
                     trivial_failures=[0.0])  # fmt: skip
    assert lambda_sweep.collapse(lines, "hard", "moderate", 20.0) == ([11], "words destroyed")
    assert lambda_sweep.headline(lines) == said


def test_runs_that_the_headline_made_are_cut_and_not_made_again(monkeypatch):
    lines = run("gnu/echo/1", 25, 75, 100, pass_rate=[0.1, 0.2, 0.9]) + run("gnu/echo/4", 25, pass_rate=[0.5])
    lines += run("file/grpo/2", 25, 50, 75, pass_rate=[0.3, 0.4, 0.9]) + run("hard/echo/1", 25, pass_rate=[1])
    monkeypatch.setattr(lambda_sweep.common, "load", lambda *_: lines)
    found = {(line["key"], line["step"]): line["pass_rate"] for line in lambda_sweep.lent()}
    assert found == {("gnu/moderate/0.2/1", 25): 0.1, ("gnu/moderate/0.2/1", 75): 0.2,
                     ("file/moderate/0/2", 25): 0.3, ("file/moderate/0/2", 50): 0.4}  # fmt: skip
    mine, headline = lambda_sweep.jobs(), learning_curves.jobs()
    assert not {"gnu/moderate/0.2/1", "file/moderate/1/3", "file/moderate/0/1"} & set(mine)
    assert "gnu/moderate/1/1" in mine and "file/moderate/0.2/3" in mine and len(mine) == 33 + 12 + 12
    for world in ("gnu", "file"):  # a run that is lent has all the settings but the steps of those beside it
        _, _, other = mine[f"{world}/moderate/5/2"]
        for weight, name in lambda_sweep.LENT[world].items():
            arm, _, config = headline[f"{world}/{name}/2"]
            assert replace(config, steps=other.steps, env_weight=5.0) == other
            assert config.env_weight == weight or arm == "grpo"


def test_grpo_is_the_same_at_every_dose_that_only_outputs_have():
    """Linked and tells change what a tool prints, which one call never reads, and no task."""
    plain, fresh = load_world("hard", 11), load_world("hard,persist=0.5", 11)
    for dial in ("linked=0.5", "tells=4"):
        other = load_world(f"hard,{dial}", 11)
        for mine, its in ((plain.train, other.train), (plain.held_out, other.held_out)):
            for a, b in zip(mine, its, strict=True):
                assert replace(a, tools={}) == replace(b, tools={})
        assert [t.tools for t in plain.train] != [t.tools for t in other.train]
    assert [t.verify for t in plain.train] != [t.verify for t in fresh.train]
    jobs = doses.jobs()
    assert {key.split("/")[0] for key in jobs if "/grpo/" in key} == {
        "persist=0.25", "persist=0.5", "persist=0.75"}  # fmt: skip
    assert all(config.max_turns == 1 for *_, config in jobs.values())
    assert len(jobs) == 3 * (3 + 2 * 10 + 7) and not any(key.startswith("plain/") for key in jobs)
    for there, (here, steps) in doses.LENT.items():  # the world as it is: the same runs, cut
        arm, control, config = learning_curves.jobs()[there]
        name, seed = here.split("/")[1:]
        other = doses.jobs()[f"persist=0.5/{name}/{seed}"]
        assert (arm, control) == other[:2] and steps == doses.STEPS == other[2].steps
        assert replace(config, steps=steps, tasks=other[2].tasks) == other[2]


def dosed(seeds=(11, 12)):
    lines = []
    for seed in seeds:
        lines += run(f"plain/grpo/{seed}", 25, pass_rate=[0.3])
        lines += run(f"persist=0.5/grpo/{seed}", 25, pass_rate=[0.1])
        for where, rate in (("plain", 0.6), ("linked=0.5", 0.2), ("persist=0.5", 0.1 + 0.01 * seed)):
            lines += run(f"{where}/echo/{seed}", 25, pass_rate=[rate + 0.001 * seed])
    return lines


def test_a_gain_at_a_dose_is_over_the_grpo_of_that_world():
    lines = dosed()
    found = doses.gains(lines, "echo")
    assert found["linked", 0.5] == pytest.approx({11: -0.089, 12: -0.088})
    assert found["persist", 0.5] == pytest.approx({11: 0.121, 12: 0.132})
    assert doses.smaller(found)["linked", 0.5] == pytest.approx({11: -0.4, 12: -0.4})
    assert doses.smaller(found)["persist", 0.5] == pytest.approx({11: -0.19, 12: -0.18})
    assert not {("linked", 1.0), ("tells", 1), ("persist", 1.0)} & set(doses.smaller(found))
    said = "linked: ahead at 1, behind at 0.5, no data at 0, 0.25, 0.75"
    assert doses.boundary(lines, "linked", "echo") == said
    assert doses.boundary(lines, "tells", "echo") == "tells: ahead at 1, no data at 8, 4, 2"
    assert doses.boundary([], "tells", "echo") == "tells: no data at 8, 4, 2, 1"
    for dose, (text, says) in doses.judged(found).items():
        assert (says == "no data") == (text == "–") == (not found[dose])


def test_the_spread_is_shared_and_the_world_as_it_is_counts_once():
    found = {("linked", 0.5): {1: 0.0, 2: 0.2}}
    found |= {dose: {1: 0.1, 2: 0.3} for dose in (("linked", 1), ("tells", 1))}
    half = stats.student(3) * 0.02**0.5 / 2**0.5  # 2 degrees of freedom, each with a square of 0.02
    assert doses.halves(found) == pytest.approx(dict.fromkeys(found, half))
    assert stats.pooled_halves([[0.0, 0.2], [], [5.0]]) == pytest.approx(
        [stats.student(2) * 0.02**0.5 / 2**0.5, nan, stats.student(2) * 0.02**0.5], nan_ok=True
    )
    assert all(isnan(half) for half in stats.pooled_halves([[1.0], []]))
    near = {("linked", 0.5): {1: 0.0, 2: 0.02}, ("linked", 1): {1: 0.07, 2: 0.13}}
    assert [says for _, says in doses.judged(near).values()] == ["open", "ahead"]


def test_verifier_free_changes_are_from_the_first_to_the_last_step():
    lines = run("linked/echo/1", 0, 20, 60, pass_rate=[0.1, 0.9, 0.4])
    assert verifier_free.change(lines) == pytest.approx({1: 0.3}) and verifier_free.change([]) == {}


# ---- linkage ----


def episode(tokenizer, call, says, reward, group):
    t = Transcript()
    t.append(Role.PROMPT, encode(tokenizer, Role.PROMPT, "align acorn"))
    ids = encode(tokenizer, Role.ACTION, call)
    t.append(Role.ACTION, ids, [-1.0] * len(ids))
    t.append(Role.OBSERVATION, encode(tokenizer, Role.OBSERVATION, says))
    return Episode(Task("t", "align acorn", "", ""), group, t, reward=reward, stop=StopReason.MAX_TURNS)


def test_what_is_cut_out_is_gone_and_outputs_stay(tokenizer):
    whole = episode(tokenizer, "tk align -k acorn", "ok acorn", 1.0, 0)
    for roles in linkage.CUT.values():
        cut = linkage.without(whole, roles).transcript
        kept = [role for role in whole.transcript.roles if role not in roles]
        assert cut.roles == kept and len(cut.ids) == len(cut.logprobs) == len(kept)
        said = [i for i, role in zip(cut.ids, cut.roles, strict=True) if role == Role.OBSERVATION]
        assert tokenizer.decode(said) == "ok acorn"
    assert whole.transcript.count(Role.ACTION) > 0


def test_alignment_is_the_cosine_over_batches_with_rewards(tokenizer, model):
    config, initial = Config(device="cpu"), copy.deepcopy(model)
    mixed = [episode(tokenizer, "tk align -k acorn", "ok acorn", 1.0, 0),
             episode(tokenizer, "ls", "usage: tk align -k FILE", 0.0, 0)]  # fmt: skip
    failed = [episode(tokenizer, "done", "ls: cannot access", 0.0, 0)] * 2
    batch, gradients = make_batch(mixed, config), []
    for which in (0, 1):
        loss = linkage.loss(model, batch, config)[which]
        parts = torch.autograd.grad(loss, list(model.parameters()))
        gradients.append(torch.cat([part.flatten() for part in parts]))
    expected = torch.nn.functional.cosine_similarity(*gradients, dim=0).item()
    assert linkage.alignment(model, [mixed, failed], config) == pytest.approx(expected, abs=1e-4)
    assert abs(expected) > 1e-3 and isnan(linkage.alignment(model, [failed], config))
    trained = train.update(model, make_optimizer(model, config), batch, "echo", 0, config)
    losses = [loss.item() for loss in linkage.loss(initial, batch, config)]
    assert losses == pytest.approx([trained["policy_loss"], trained["env_loss"]], rel=1e-4)


def test_echoed_words_are_left_out_of_linkage(tokenizer):
    whole = episode(tokenizer, "tk align -k acorn", "usage: tk align -d FILE", 0.0, 0).transcript
    echoed = linkage.marks(tokenizer, whole, ("-d",))
    said = [i for i, role in zip(whole.ids, whole.roles, strict=True) if role == Role.OBSERVATION]
    words = [tokenizer.decode([i]).strip() for i, echo in zip(said, echoed, strict=True) if echo]
    assert words == ["tk", "align"]
    logprobs = [{7: -1.0, 3: -3.0, 5: -2.0}, {}]  # the second is at position 5
    found = linkage.cross_entropies(logprobs, [[False, True, False], []])
    assert found == (pytest.approx(2.0), pytest.approx(2.0))
    assert linkage.cross_entropies(logprobs, [[False, False, True], []]) == pytest.approx((2.5, 2.0))


def test_scores_are_means_and_two_of_them_predict():
    line = {"step": 0, "linkage_all": 0.6, "by_command": 0.1, "observed": 0.0, "passes": 4, "linkage": 0.4}
    lines = [line | {"key": "lying/1", "seed": 1}]
    lines.append(line | {"key": "lying/2", "seed": 2, "linkage": 0.2, "alignment": -0.3})
    (own,) = foretold.means(lines).values()
    assert own == pytest.approx({"linkage": 0.3, "linkage_all": 0.6, "by_command": 0.1, "alignment": -0.3,
                                 "observed": 0.0, "passes": 4, "both": 0.0})  # fmt: skip
    (own,) = foretold.means([line | {"key": "code/1", "seed": 1, "alignment": 0.1}]).values()
    assert own["both"] == 0.4 and len(foretold.DOSES) + len(foretold.OTHERS) == 16
    assert len(linkage.jobs()) == 3 * 16
    score = {"linkage": 0.11, "by_command": 0.1, "alignment": 0.01, "both": 0.11, "linkage_all": 0.0}
    assert foretold.says(score) == {"linkage": True, "by_command": False, "alignment": True, "both": True,
                                    "always": True}  # fmt: skip
    assert not foretold.says(score | {"alignment": nan})["alignment"]


def test_what_came_is_decided_by_intervals_and_scores_are_judged_by_that():
    gained = {"plain": [0.2, 0.22, 0.21], "code": [0.01, 0.0, 0.02], "gnu": [0.05, 0.07, 0.09]}
    gained["file"] = [-0.3, -0.31, -0.29]
    came = foretold.outcomes(gained)
    assert [said for _, said in came.values()] == ["gain", "none", "gain", "none"]
    wide = foretold.outcomes({"plain": [0.0, 0.4], "code": [-0.2, 0.2]})
    assert [said for _, said in wide.values()] == ["undecided", "undecided"]
    shared = foretold.outcomes({"plain": [0.0, 0.4], "code": [0.3, 0.3], "gnu": [0.3, 0.3]})
    assert [said for _, said in shared.values()] == ["undecided", "undecided", "gain"]
    edge = foretold.outcomes({"gnu": [0.07, 0.07], "file": [0.09, 0.09], "filter": [0.0, 0.0]})
    assert [said for _, said in edge.values()] == ["gain", "gain", "none"]
    low = {"linkage": 0.0, "by_command": 0.2, "alignment": 0.5, "both": 0.0}
    high = {"linkage": 0.3, "by_command": 0.0, "alignment": -0.5, "both": 0.0}
    scores = {"plain": high, "code": high, "file": low}
    expected = {"linkage": "2 of 3", "by_command": "1 of 3", "alignment": "1 of 3", "both": "2 of 3"}
    assert foretold.right(scores, came) == expected | {"always": "1 of 3"}
    assert foretold.right({"plain": high}, wide) == dict.fromkeys([*foretold.SCORES[:4], "always"], "0 of 0")


def test_gains_that_are_foretold_are_of_the_same_steps_and_seeds(monkeypatch):
    early = run("hard/grpo/1", 25, 100, 150, pass_rate=[0.1, 0.1, 0.9])
    early += run("hard/lying/1", 25, 100, 150, pass_rate=[0.2, 0.4, 0.0])
    early += run("hard/lying/4", 25, pass_rate=[0.9]) + run("hard/grpo/4", 25, pass_rate=[0.1])
    of = {"learning_curves": early, "doses": [], "filter_curves": []}
    of["filter_curves"] = run("grpo/51", 100, pass_rate=[0.1]) + run("echo 0.05/51", 100, pass_rate=[0.15])
    monkeypatch.setattr(common, "load", lambda name, jobs: of[name])
    found = foretold.gains()
    assert found == {"lying": [pytest.approx(0.2)], "filter": [pytest.approx(0.05)]}


# ---- tables, quick ----


def test_a_page_holds_the_tables_of_the_data(tmp_path):
    page, table = tmp_path / "page.md", tables.table([("a", "b"), ["1", "2"]])
    assert table == "| a | b |\n|---|---|\n| 1 | 2 |\n"
    page.write_text("before\n<!-- one -->\n<!-- end -->\nbetween\n<!-- two -->\nx\n<!-- end -->\nafter\n")
    with pytest.raises(SystemExit, match="other numbers"):
        tables.in_page(page, {"one": table}, write=False)
    tables.in_page(page, {"one": table}, write=True)
    between = "between\n<!-- two -->\nx\n<!-- end -->\nafter\n"
    assert page.read_text() == f"before\n<!-- one -->\n{table}<!-- end -->\n{between}"
    tables.in_page(page, {"one": table}, write=False)
    with pytest.raises(SystemExit, match="<!-- three -->"):
        tables.in_page(page, {"three": table}, write=True)


def test_what_several_runs_need_is_made_by_one_at_a_time(tmp_path):
    with common.alone(tmp_path / "there" / "base"), open(tmp_path / "there" / "base.lock") as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert [path.name for path in (tmp_path / "there").iterdir()] == ["base.lock"]


def test_quick_is_six_tiny_jobs_of_one_seed_under_runs_quick(monkeypatch):
    jobs = doses.jobs()
    assert common.as_asked(jobs) is jobs
    for name in ("DATA", "PNG", "RUNS"):
        monkeypatch.setattr(common, name, getattr(common, name))
    common.go_quick()
    some = common.as_asked(jobs, "tells=2/echo/2")
    assert len(some) <= 7 and {config.seed for *_, config in some.values()} == {1, 2}
    assert all(config.steps == 4 for *_, config in some.values())
    assert str(common.DATA).startswith("runs/quick")
