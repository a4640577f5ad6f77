"""eval.py and train.py on Docker tasks, through their command lines, on a real engine."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from test_container import EXAMPLES, base_image, containers, engine_socket, harbor, wait_until  # noqa: F401

import eval
import train
from echo_min import checkpoint
from echo_min.config import Config, RunEnded
from echo_min.rollout import StopReason
from echo_min.terminals import docker_engine
from echo_min.worlds.harbor import harbor_tasks

SMALL = Config(
    name="docker", arms="echo", device="cpu", base_demonstrations=3, base_steps=60, base_batch=4, steps=1,
    tasks_per_step=2, group_size=2, eval_every=2, eval_tasks=1, max_turns=2, backend="docker",
    tasks=str(EXAMPLES), context=1200, output_chars=200, terminals=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base_image):  # noqa: F811
    folder = tmp_path_factory.mktemp("runs") / "docker"
    train.main(SMALL, folder)
    return folder


def test_the_tiny_policy_trains_on_harbor_tasks(finished):
    steps, _ = checkpoint.latest(finished / "echo")
    assert steps == 1
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "reward" in line]
    assert len(trained) == 1 and all(line["stop"]["infra_error"] == 0 for line in trained)
    assert all(line["observation_tokens"] > 0 for line in trained)
    # the engine may still be at removing some
    mine = docker_engine.this_run()
    assert wait_until(lambda: all(c["Labels"][docker_engine.LABEL] != mine for c in containers()))


@pytest.mark.slow
def test_an_engine_that_stops_stops_the_run(finished, tmp_path, monkeypatch, engine_socket):  # noqa: F811
    run, sample, config = tmp_path / "run", train.sample_episodes, replace(SMALL, steps=2)
    shutil.copytree(finished / "base", run / "base")

    def sample_without_engine(*args):
        if args[-1] == (1, SMALL.seed, 1):  # the second step
            engine_socket.stop()
        return sample(*args)

    monkeypatch.setattr(train, "sample_episodes", sample_without_engine)
    with pytest.raises(RunEnded, match="4 of 4 episodes failed"):
        train.main(config, run)
    assert checkpoint.latest(run / "echo")[0] == 1
    engine_socket.start()
    monkeypatch.setattr(train, "sample_episodes", sample)
    train.main(config, run)
    assert checkpoint.latest(run / "echo")[0] == 2


def test_eval_goes_on_where_it_ended(finished, tmp_path, capsys, monkeypatch):
    good, out = tmp_path / "set" / "good", tmp_path / "out"
    harbor(good)
    broken = harbor(tmp_path / "set" / "broken", "echo 2 > /logs/verifier/reward.txt").environment.folder
    flags = [str(finished / "echo"), "--tasks", str(tmp_path / "set"), "--backend", "docker", "-k", "2"]
    flags += ["--out", str(out)]
    eval.cli(flags)
    said = capsys.readouterr().out
    assert "infra errors             2 of 4 trials" in said and "not one number in [0, 1]" in said
    assert "pass@2 sampled           1.000 [0.000, 1.000] over 1 of 2 tasks, 2 trials" in said
    lines = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    assert [line["reward"] for line in lines].count(None) == 2 and len(lines) == 4
    assert all(line["stop"] == StopReason.INFRA_ERROR for line in lines if line["task"] == "broken")
    assert len(list((out / "transcripts").iterdir())) == 4

    (broken / "tests/test.sh").write_text("echo 0 > /logs/verifier/reward.txt")
    with open(out / "trials.jsonl", "a") as file:
        file.write('{"task": "go')  # as a kill would leave it
    played = []
    real = eval.sample_episodes
    monkeypatch.setattr(eval, "sample_episodes", lambda *a: played.extend(a[-2]) or real(*a))
    eval.cli(flags)
    assert sorted(played) == [(0, 0), (0, 1)]  # of the task that failed, and no other
    said = capsys.readouterr().out
    assert "infra errors" not in said and "pass@1 sampled           0.500" in said

    with pytest.raises(SystemExit, match="another seed: pass a new --out"):
        eval.cli([*flags, "--seed", "3"])


def test_what_a_verifier_printed_is_kept_beside_the_transcript(finished, tmp_path, monkeypatch):
    harbor(tmp_path / "set" / "a", "echo because; echo 0 > /logs/verifier/reward.txt")
    harbor(tmp_path / "set" / "b", "echo 0 > /logs/verifier/reward.txt")
    for i, who in enumerate((["--agent", "noop"], [str(finished / "echo")])):
        out = tmp_path / f"{i}"
        eval.cli([*who, "--tasks", str(tmp_path / "set"), "--backend", "docker", "--out", str(out)])
        kept = {path.name: path.read_text() for path in (out / "transcripts").iterdir()}
        assert set(kept) == {"a-0.txt", "b-0.txt", "a-0.verifier.txt"}
        assert kept["a-0.verifier.txt"] == "because"


def test_eval_plays_what_the_policy_was_not_trained_on(finished, tmp_path, capsys):
    flags = [str(finished / "echo"), "--tasks", str(EXAMPLES), "--backend", "docker", "--out", str(tmp_path)]
    names = [task.name for task in harbor_tasks(EXAMPLES)]

    def played():
        lines = (tmp_path / "trials.jsonl").read_text().splitlines()
        return [json.loads(line)["task"] for line in lines]

    eval.cli(flags)
    assert sorted(played()) == [names[0], names[5]]
    said = capsys.readouterr().out
    assert said.startswith("plays 2 held-out tasks, not the 8 that it was trained on")
    assert "over 2 of 2 tasks, 2 trials" in said
    eval.cli([*flags, "--all", "--limit", "3"])
    assert sorted(played()[2:]) == names[1:3]
    said = capsys.readouterr().out
    assert "plays 3 tasks; it was trained on 2 of them" in said and "over 3 of 3 tasks, 3 trials" in said


def test_eval_with_an_oracle_and_without(tmp_path, capsys):
    environment = '[solution]\nenv = {K = "a b"}'
    harbor(tmp_path / "set" / "one", "[[ -e /done ]]; echo $((!$?)) > /logs/verifier/reward.txt", environment)
    flags = ["--tasks", str(tmp_path / "set"), "--backend", "docker"]
    with pytest.raises(SystemExit, match="no solution for an oracle to run: one"):
        eval.cli([*flags, "--agent", "oracle"])
    (tmp_path / "set/one/solution").mkdir()
    (tmp_path / "set/one/solution/solve.sh").write_text('[ "$K" = "a b" ] && cd /solution && cp data /done')
    (tmp_path / "set/one/solution/data").write_text("x")
    for agent, passed in (("oracle", "1.000"), ("noop", "0.000")):
        eval.cli([*flags, "--agent", agent])
        assert f"pass@1 sampled           {passed}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--backend docker"):
        eval.cli(["--tasks", str(tmp_path / "set"), "--agent", "noop"])


def test_eval_skips_what_it_cannot_play_or_stops(tmp_path, capsys):
    harbor(tmp_path / "set" / "b", "echo 0 > /logs/verifier/reward.txt")
    harbor(tmp_path / "set" / "c")
    with open(harbor(tmp_path / "set" / "a").environment.folder / "task.toml", "a") as file:
        file.write("[[steps]]\nname = 'first'\n")
    flags = ["--tasks", str(tmp_path / "set"), "--backend", "docker", "--agent", "noop"]
    eval.cli([*flags, "--limit", "1", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert said.count("skipped a: ") == 1 and "steps: expected nothing" in said, said
    (line,) = (tmp_path / "out/trials.jsonl").read_text().splitlines()
    assert (json.loads(line)["task"], json.loads(line)["reward"]) == ("b", 0.0)  # of those that can be played
    with pytest.raises(SystemExit, match=r"a/task\.toml: steps: expected nothing"):
        eval.cli([*flags, "--strict"])


def test_generated_tasks_run_in_containers_too(capsys):
    flags = ["--tasks", "world:file", "--backend", "docker", "--limit", "3"]
    for agent, passed in (("oracle", "1.000"), ("noop", "0.000")):
        eval.cli([*flags, "--agent", agent])
        assert f"pass@1 sampled           {passed}" in capsys.readouterr().out


def test_a_harbor_task_needs_a_container(tmp_path):
    config = replace(SMALL, backend="sandbox")
    with pytest.raises(ValueError, match="asks for a container of its own: --backend docker"):
        train.main(config, Path(tmp_path) / "run")
