"""eval.py through its command line: what it plays, what it counts as passed, and what it refuses."""

import json
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import eval
import train
from echo_min import checkpoint, evaluate, report, terminal
from echo_min.config import Config, RunEnded
from echo_min.evaluate import Examination
from echo_min.limits import Limits
from echo_min.rollout import Episode, Noise, StopReason
from echo_min.tasks import Task
from echo_min.terminal import TerminalDied
from echo_min.trials import Trial, summary
from echo_min.worlds.registry import load_tasks

ROOT = Path(__file__).parent.parent
SMALL = Config(
    name="small", arms="echo", device="cpu", base_demonstrations=24, base_steps=3, steps=0, eval_tasks=4
)
FILES = "instruction.md", "tests/test.sh", "environment/Dockerfile", "task.toml"


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    train.main(SMALL, folder)
    return folder / "echo"


def refused(*flags) -> str:
    with pytest.raises(SystemExit) as ended:
        eval.cli([str(flag) for flag in flags])
    return str(ended.value.code)


def measured(capsys, *flags) -> dict[str, str]:
    """What eval.py prints with these flags: name -> value."""
    eval.cli([str(flag) for flag in flags])
    lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    return {line[:25].strip(): line[25:] for line in lines if line[24:25] == " "}


def trials(folder, drop=("seconds",)) -> dict:
    lines = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    return {(t["task"], t["member"]): {k: v for k, v in t.items() if k not in drop} for t in lines}


def trial(task, member, reward):
    return Trial(task, member, reward, "done", 1, 4, 6, 12.0, 0.5, "" if reward is not None else "lost")


# ---- what is played ----


def folder_of_tasks(path: Path, count: int) -> Path:
    for i in range(count):
        for name in FILES:
            (path / f"task-{i}" / name).parent.mkdir(parents=True, exist_ok=True)
            offline = "environment.allow_internet = false" if name == "task.toml" else ""
            (path / f"task-{i}" / name).write_text(offline)
    return path


def chosen(trained_on, tasks, *flags) -> list[str]:
    args = eval.eval_args("", ["checkpoint", "--tasks", str(tasks), *flags])
    found, indices = eval.load(args, Config(tasks=str(trained_on)))
    return [found[i].name for i in indices]


def test_what_was_trained_on_is_not_played(tmp_path, monkeypatch, capsys):
    tasks = folder_of_tasks(tmp_path / "set" / "tasks", 7)
    monkeypatch.chdir(tmp_path)
    held_out = [task.name for task in load_tasks(str(tasks), False, 1).held_out]
    assert held_out == ["task-0", "task-5"]
    for name in ("set", "set/tasks", tasks, "set/../set"):  # the same folder, whatever it is called
        assert chosen(tasks, name) == held_out
        assert capsys.readouterr().out == (
            "plays 2 held-out tasks, not the 5 that it was trained on (--all)\n"
        )
    assert chosen(tasks, tasks, "--limit", "1") == ["task-0"]


def test_all_plays_all_and_says_how_many_were_trained_on(tmp_path, capsys):
    tasks = folder_of_tasks(tmp_path / "set", 7)
    assert len(chosen(tasks, tasks, "--all")) == 7
    assert capsys.readouterr().out == "plays 7 tasks; it was trained on 5 of them\n"
    assert chosen(tasks, tasks, "--all", "--limit", "3") == ["task-0", "task-1", "task-2"]
    assert capsys.readouterr().out == "plays 3 tasks; it was trained on 2 of them\n"


def test_of_another_folder_all_is_played(tmp_path, capsys):
    tasks, other = folder_of_tasks(tmp_path / "a", 3), folder_of_tasks(tmp_path / "b", 3)
    assert len(chosen(other, tasks)) == len(chosen("world:tool", tasks)) == 3
    assert capsys.readouterr().out == ""
    assert len(chosen(tmp_path / "gone", tasks)) == 3
    assert f"is not here ({tmp_path}/gone): plays all" in capsys.readouterr().out
    with pytest.raises(ValueError, match="it was trained on every task; --all plays them"):
        chosen(tasks, tasks / "task-1")


def test_a_published_model_was_trained_on_no_folder(tmp_path):
    flags = [str(tmp_path), "--preset", "qwen3_0_6b", "--tasks", "tasks", "--backend", "docker"]
    config, _ = eval.settings(eval.eval_args("", flags))
    assert config.tasks == "world:" and config.context == 16_384  # the preset's own are "tasks"


def test_what_is_given_holds_even_if_it_is_zero_and_containers_are_few():
    def settings(*flags):
        return eval.settings(eval.eval_args("", ["--agent", "noop", *flags]))[0]

    assert settings("--backend", "docker").terminals == 4 != settings().terminals == Config().terminals
    assert settings("--backend", "docker", "--terminals", "9").terminals == 9
    assert settings("--seed", "0").seed == 0 != Config().seed


def test_held_out_tasks_of_a_world_are_played():
    held_out = [task.name for task in load_tasks("world:tool", False, Config().seed).held_out]
    assert chosen("world:tool", "world:tool") == held_out and len(held_out) == 200


def test_trials_are_kept_as_they_end_so_that_a_kill_loses_those_at_play(policy, tmp_path, monkeypatch):
    real, keys, episodes = eval.sample_episodes, [], []

    def sample_episodes(*args):
        *_, key, _, ended = args

        def killed_later(i, episode):
            ended(i, episode)
            episodes.append(episode)
            if len(episodes) == 5:
                raise KeyboardInterrupt

        keys.append(key)
        return real(*args[:-1], killed_later)

    monkeypatch.setattr(eval, "sample_episodes", sample_episodes)
    flags = ["-k", "2", "--limit", "4", "--terminals", "3", "--seed", "5", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="interrupted"):
        eval.cli([str(policy), *flags])
    assert len(trials(tmp_path)) == 5
    eval.cli([str(policy), *flags])
    assert keys == [(Noise.SCORING, 5)] * 2 + [None] and len(trials(tmp_path)) == len(episodes) == 12
    config, folder = eval.settings(eval.eval_args("", [str(policy), *flags]))
    model, _ = checkpoint.load_policy(folder)
    logprobs = eval.observation_logprobs(model, [e.transcript for e in episodes], config)
    nats = [-sum(positions.values()) for positions in logprobs]
    found = [t["observation_nats"] for t in trials(tmp_path).values()]
    assert found == pytest.approx(nats, rel=1e-4) and max(found) > 0


def test_a_check_tells_which_tasks_are_sound(tmp_path, capsys, monkeypatch):
    verifiers = {"good": "[[ -e done ]] || exit 1", "free": "true", "hard": "exit 1"}
    verifiers["odd"] = "[[ -e done ]] && exit 2; exit 1"
    tasks = [Task(name, "", verify, "touch done") for name, verify in verifiers.items()]
    monkeypatch.setattr(eval, "load", lambda args, config: (tasks, [0, 1, 2, 3]))
    eval.cli(["--agent", "check", "--tasks", "world:tool", "--out", str(tmp_path)])
    said = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [line.partition(":")[0] for line in said] == [
        "UNSOUND  free", "sound    good", "UNSOUND  hard", "UNSOUND  odd", "1 of 4 tasks are sound",
    ]  # fmt: skip
    assert said[0].endswith(": oracle 1, noop 1") and said[2].endswith(": oracle 0, noop 0")
    assert "oracle the verifier of odd exited with 2" in said[3] and len(trials(tmp_path)) == 8


def test_an_oracle_runs_the_solution_for_as_long_as_an_agent_may(tmp_path):
    limits = Limits(command_seconds=0.3, agent_seconds=8.0)
    task = Task("slow", "", "[[ -e done ]] || exit 1", "sleep 0.6; touch done", limits=limits)
    episode, said = eval.scripted("oracle", task, Config())
    assert (episode.reward, episode.stop, said) == (1.0, StopReason.DONE, "\n(exit_code=0)")
    late, _ = eval.scripted("oracle", replace(task, limits=replace(limits, agent_seconds=0.3)), Config())
    assert (late.reward, late.stop) == (0.0, StopReason.AGENT_TIMEOUT)
    assert eval.scripted("noop", task, Config())[0].reward == 0.0
    tasks = folder_of_tasks(tmp_path, 2)
    with pytest.raises(ValueError, match="no solution for an oracle to run: task-0, task-1"):
        eval.load(eval.eval_args("", ["--agent", "oracle", "--tasks", str(tasks)]), Config())


def test_a_lost_trial_has_no_reward_and_is_played_again(tmp_path, monkeypatch):
    flags, lost = ["--agent", "oracle", "--limit", "3", "--out", str(tmp_path)], []

    def open_terminal(task, backend, **options):
        if not lost:
            lost.append(task.name)
            raise TerminalDied("the cable was pulled")
        return terminal.open_terminal(task, backend, **options)

    monkeypatch.setattr(eval, "open_terminal", open_terminal)
    eval.cli(flags)
    rewards = {task: t["reward"] for (task, _), t in trials(tmp_path).items()}
    assert len(rewards) == 3 and {task for task, reward in rewards.items() if reward is None} == set(lost)
    eval.cli(flags)
    again = [t["reward"] for t in trials(tmp_path).values()]
    assert again == [1.0] * 3 and len((tmp_path / "trials.jsonl").read_text().splitlines()) == 3


def test_a_second_run_plays_what_is_missing_as_one_run_would(policy, tmp_path, capsys, monkeypatch):
    once, twice = tmp_path / "once", tmp_path / "twice"
    measured(capsys, policy, "-k", 3, "--limit", 4, "--terminals", 5, "--out", once)
    measured(capsys, policy, "-k", 1, "--limit", 2, "--out", twice)
    said = measured(capsys, policy, "-k", 3, "--limit", 4, "--out", twice)
    assert trials(once) == trials(twice) and len(trials(once)) == 4 * (3 + 1)
    assert len({str(t) for (_, member), t in trials(once).items() if member != "greedy"}) > 1
    assert said["pass@3 sampled"].endswith("over 4 of 4 tasks, 12 trials")

    monkeypatch.setattr(eval, "sample_episodes", None)  # nothing is played again, nor counted beyond --limit
    said = measured(capsys, policy, "-k", 2, "--limit", 3, "--out", twice)
    assert said["pass@2 sampled"].endswith("over 3 of 3 tasks, 9 trials") and "pass@3 sampled" not in said


# ---- what is counted ----


def lines(trials, k, tasks) -> dict[str, str]:
    return {line[:25].strip(): line[25:] for line in summary(trials, k, tasks)}


def test_passed_is_a_reward_of_one_and_the_mean_reward_stands_beside_it():
    rewards = [0.5, 0.99, 1.0, 3.0]
    said = lines([trial(f"t{i}", 0, reward) for i, reward in enumerate(rewards)], 1, 4)
    assert said["pass@1 sampled"].startswith("0.500 [") and said["mean reward"] == "1.373"


def test_training_counts_alike(tokenizer, model, monkeypatch):
    world = load_tasks("world:tool", False, 1)
    examination = Examination(model, tokenizer, world, replace(SMALL, eval_tasks=4))

    def episodes(model, tokenizer, tasks, group_size, config, key):
        rewards = (0.5, 1.0, 0.25, 0.0) if key else (1.0, 1.0, 0.5, float("nan"))
        each = zip(tasks, examination.expert, rewards, strict=True)
        return [Episode(task, i, transcript, reward=r) for i, (task, transcript, r) in enumerate(each)]

    monkeypatch.setattr(evaluate, "sample_episodes", episodes)
    results = examination.results(0)
    assert (results["pass_rate"], results["mean_reward"]) == (0.25, 0.4375)
    assert (results["pass_rate_greedy"], results["mean_reward_greedy"]) == (2 / 3, 2.5 / 3)


def test_pass_at_k_is_unbiased_and_over_every_task_with_k_graded_trials():
    """Of four trials one passed: two of them hold it in half of the cases. Of five, as many as are graded."""
    some = [trial("a", m, float(m == 3)) for m in range(4)]
    failed = [trial("b", m, 0.0) for m in range(4)] + [trial("b", 4, None)]
    few = [trial("c", 0, 1.0), trial("c", 1, None)]
    said = lines([*some, *failed, *few], 2, 4)
    assert said["pass@2 sampled"].startswith("0.250 [")
    assert said["pass@2 sampled"].endswith("] over 2 of 4 tasks, 8 trials")
    assert said["pass@1 sampled"].startswith("0.417 [")
    assert said["pass@1 sampled"].endswith("] over 3 of 4 tasks, 9 trials")
    assert said["infra errors"] == "2 of 11 trials, in no rate: lost"
    assert lines(few, 5, 4)["pass@5 sampled"] == "over 0 of 4 tasks, 0 trials"


def test_stops_are_of_all_trials_and_intervals_of_independent_draws():
    lost = trial("a", 9, None)._replace(stop="infra_error")
    some = [trial(task, member, float(member < 1)) for task in "ab" for member in range(4)]
    said = lines([*some, lost, *[lost._replace(member=m) for m in range(10, 17)]], 2, 2)
    assert "done 50.0%" in said["stops"] and "infra_error 50.0%" in said["stops"]
    _, low, high = report.rate_interval([0.5, 0.5], 2 * 2)  # of four trials two pairs, a task
    assert said["pass@2 sampled"].startswith(f"0.500 [{low:.3f}, {high:.3f}] ")
    assert (low, high) != report.rate_interval([0.5, 0.5], 2 * 4)[1:]


def test_columns_are_aligned_and_of_graded_trials():
    greedy = [trial("a", "greedy", 1.0)]
    said = summary([trial("a", 0, 1.0), trial("a", 1, 0.0), trial("b", 0, None), *greedy], 2, 2)
    assert all(line[24] == " " and line[25] != " " for line in said)
    said = lines([trial("a", 0, 1.0), trial("b", 0, None), *greedy], 1, 2)
    assert said["pass@1 greedy"] == "1.000 [0.000, 1.000] over 1 of 2 tasks, 1 trials"
    assert (said["mean turns"], said["mean seconds"]) == ("1.000", "0.500")
    assert said["observation CE"] == "2.000 nats/token (own episodes)"
    with pytest.raises(RunEnded, match="no trial could be graded: lost"):
        summary([trial("b", 0, None)], 1, 1)


def test_a_checkpoint_is_measured_and_shown(policy, capsys):
    eval.cli([str(policy), "--tasks", "world:tool", "-k", "2", "--limit", "4", "--show", "1"])
    out = capsys.readouterr().out
    for word in ("pass@1 sampled", "pass@2 sampled", "pass@1 greedy", "max_turns", "turns", "observation CE"):
        assert word in out
    assert out.count("\n--- ") == 1 and "\x1b[" in out


def test_few_open_files_are_enough(policy):
    """Many tasks are rolled out in parts: 64 terminals at a time, seven files each."""
    command = f"ulimit -n 768; exec {sys.executable} eval.py {policy} --limit 150"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "over 150 of 150 tasks, 150 trials" in done.stdout, done.stderr


# ---- what is refused ----


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--help"], "--temperature"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["runs/x", "-k", "0"], "-k and --limit must be at least 1"),
        ([], "name a checkpoint"),
        (["runs/x", "--tasks", "world:hard", "--all"], "--all is for a folder of tasks"),
        (["runs/x", "--preset", "huge"], "invalid choice: 'huge'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_are_answered_at_once_and_in_short(flags, says):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, ROOT / "eval.py", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.7  # seconds: no torch
    assert says in done.stdout + done.stderr
    assert done.returncode == 0 if flags == ["--help"] else len(done.stderr.splitlines()) <= 3


def test_what_is_no_checkpoint(tmp_path):
    assert "pass --preset, one of tiny" in refused(tmp_path)
    assert "neither a checkpoint folder nor a model" in refused(tmp_path, "--preset", "tiny")


def test_two_evaluations_are_not_mixed(policy, tmp_path):
    step, other, out = checkpoint.latest(policy)[1], tmp_path / "other", tmp_path / "out"
    assert "remove --preset" in refused(step, "--preset", "tiny")
    shutil.copytree(step, other)
    replace(Config.load(step / "echo_min.json"), output_chars=99).save(other / "echo_min.json")
    eval.cli([str(step), "--limit", "1", "--out", str(out)])
    settings = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps(settings | {"checkpoint": str(other)}))
    said = refused(other, "--limit", 1, "--out", out)
    assert said.endswith("settings.json: an evaluation with another output_chars: pass a new --out")


@pytest.mark.parametrize("content", [b"", b'{"agent": "pol', b"\xff", b"[5]", b"3"])
def test_settings_that_cannot_be_read_are_named(tmp_path, content):
    (tmp_path / "settings.json").write_bytes(content)
    said = refused("--agent", "noop", "--limit", 1, "--out", tmp_path)
    assert f"{tmp_path}/settings.json: not the settings of an evaluation" in said and "\n" not in said
    assert (tmp_path / "settings.json").read_bytes() == content


@pytest.mark.parametrize("line", ["not json", "{}", "3", "null", '{"task": "a", "member": 0, "reward": 1.0}'])
def test_trials_that_cannot_be_read_are_named(tmp_path, line):
    flags = "--agent", "noop", "--limit", 1, "--out", tmp_path
    eval.cli([str(flag) for flag in flags])
    path = tmp_path / "trials.jsonl"
    path.write_text(f"{line}\n{path.read_text()}")
    said = refused(*flags)
    assert str(path) in said and "\n" not in said


@pytest.mark.parametrize("content", ["", '{"task": "to'])
def test_trials_that_a_kill_cut_short_are_played_again(tmp_path, content):
    flags = ["--agent", "oracle", "--limit", "2", "--out", str(tmp_path)]
    eval.cli(flags)
    before = trials(tmp_path)
    (tmp_path / "trials.jsonl").write_text(content)
    eval.cli(flags)
    assert trials(tmp_path) == before and len(before) == 2
