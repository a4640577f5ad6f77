"""The figure scripts: data that is missing, partial or of other settings is named; no run is made twice."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from echo_min.config import ARMS

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "figures"))

import common  # noqa: E402
import held_out_ce  # noqa: E402
import lambda_sweep  # noqa: E402
import learning_curves  # noqa: E402
import verifier_free  # noqa: E402

SCRIPTS = learning_curves, lambda_sweep, verifier_free


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in ("DATA", "PNG", "RUNS"):
        monkeypatch.setattr(common, name, tmp_path / name.lower())
    (tmp_path / "data").mkdir()
    return tmp_path


def invent(jobs, path):
    """Lines as the runs would write them."""
    lines = []
    for i, (key, (arm, config)) in enumerate(jobs.items()):
        line = {"key": key, "config": common.digest(config), "arm": arm, "seed": config.seed}
        if arm == "floor":
            lines.append(line | {"observation_ce": 0.01})
            continue
        for step in range(0, config.steps + 1, config.eval_every):
            rate = min(1.0, 0.01 * step + 0.001 * (i % 7))
            metrics = {"pass_rate": rate, "pass_rate_greedy": rate, "observation_ce": 1 - rate / 2}
            metrics |= {"command_diversity": 0.5, "trivial_failures": 0.1, "pass_rate_trained": 0.9}
            lines.append(line | {"step": step} | metrics)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


@pytest.mark.parametrize("script", SCRIPTS)
def test_jobs_are_distinct_and_every_setting_counts(script):
    jobs = script.jobs()
    assert len({common.digest(config) + arm for arm, config in jobs.values()}) > 0.5 * len(jobs)
    for key, (arm, config) in jobs.items():
        assert key.endswith(f"/{config.seed}")
        assert arm == "floor" or arm in ARMS


@pytest.mark.parametrize("script", SCRIPTS)
def test_missing_partial_and_foreign_data_are_named(script, folders, capsys):
    jobs, path = script.jobs(), folders / "data" / f"{script.EXPERIMENT}.jsonl"
    with pytest.raises(SystemExit, match=f"none of the .*python figures/{script.EXPERIMENT}.py --run"):
        common.load(script.EXPERIMENT, jobs)
    lines = invent(jobs, path)
    assert common.load(script.EXPERIMENT, jobs) == lines and not capsys.readouterr().out
    first = lines[0]["key"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines if line["key"] != first))
    assert all(line["key"] != first for line in common.load(script.EXPERIMENT, jobs))
    said = capsys.readouterr().out
    assert f"missing: {first}" in said and f"figures/{script.EXPERIMENT}.py --run" in said
    path.write_text(json.dumps(lines[0] | {"config": "0"}) + "\n")
    with pytest.raises(SystemExit, match="other settings"):
        common.load(script.EXPERIMENT, jobs)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("share", [1, 3])
def test_pictures_and_tables_from_whole_and_partial_data(script, share, folders, capsys):
    some = dict(list(script.jobs().items())[::share])
    lines = invent(some, folders / "data" / f"{script.EXPERIMENT}.jsonl")
    script.draw(lines)
    assert (folders / "png" / f"{script.EXPERIMENT}.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "±" in said or "(one seed)" in said
    if script is learning_curves:
        held_out_ce.main()
        assert (folders / "png" / "held_out_ce.png").exists()


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
