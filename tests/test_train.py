"""The whole program through its command line: a tiny run, resume bit for bit, and one clear line for every
wrong input."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from echo_min import checkpoint
from echo_min.config import Config, RunEnded
from echo_min.terminals.bubblewrap import SandboxUnavailable
from echo_min.terminals.sandbox import Sandbox
from echo_min.worlds.registry import load_world

ROOT = Path(__file__).parent.parent
TASK = load_world("tool").train[0]
SMALL = Config(
    name="small", arms="echo", device="cpu", threads=1, base_demonstrations=24, base_steps=3, steps=4,
    tasks_per_step=2, group_size=3, eval_every=2, eval_tasks=4,
)  # fmt: skip


def refused(program, flags, capsys):
    """Run a command line that must end the program. -> the one line that it prints."""
    with pytest.raises(SystemExit) as stop:
        program.cli(flags)
    message = str(stop.value.code) + capsys.readouterr().err
    assert stop.value.code not in (0, None)
    return message


def metrics(folder):
    """The lines of metrics.jsonl without the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith("seconds")} for line in lines]


def weights(folder):
    _, path = checkpoint.latest(folder / "echo")
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    train.main(SMALL, folder)
    return folder


def test_a_run_leaves_what_the_readme_promises(finished):
    assert {"metrics.jsonl", "config.json", "curves.png", "transcripts", "base", "echo"} <= {
        p.name for p in finished.iterdir()
    }
    steps, path = checkpoint.latest(finished / "echo")
    assert steps == 4
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "align acorn"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nalign acorn<|im_end|>\n<|im_start|>assistant\n"
    assert torch.isfinite(
        model(**tokenizer(chat, return_tensors="pt", return_token_type_ids=False)).logits
    ).all()
    evals = [r for r in metrics(finished) if "pass_rate" in r]
    assert [r["step"] for r in evals] == [0, 2, 4]
    trained = [r for r in metrics(finished) if "reward" in r]
    assert [r["step"] for r in trained] == [1, 2, 3, 4]
    assert trained[0]["mismatch"] < 1e-4 and abs(trained[0]["ratio"] - 1) < 1e-4  # sampler and trainer agree


@pytest.fixture()
def run(finished, tmp_path):
    """A new run folder with the base of the finished one."""
    shutil.copytree(finished / "base", tmp_path / "run" / "base")
    return tmp_path / "run"


def test_the_base_is_made_alike_twice(finished, tmp_path):
    train.main(replace(SMALL, steps=0), tmp_path)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "base" / name).read_bytes() == (finished / "base" / name).read_bytes()


def stop_at(step, folder, monkeypatch):
    """Run until `step` steps are done, then as if the program were interrupted."""
    real = train.update

    def interrupted(model, optimizer, episodes, arm, now, *rest):
        if now == step:
            raise KeyboardInterrupt
        return real(model, optimizer, episodes, arm, now, *rest)

    monkeypatch.setattr(train, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main(SMALL, folder)
    monkeypatch.setattr(train, "update", real)
    assert checkpoint.latest(folder / "echo")[0] == step


@pytest.mark.parametrize("step", [1, 2])
def test_resumed_equals_uninterrupted_bit_for_bit(finished, run, monkeypatch, step):
    stop_at(step, run, monkeypatch)
    train.main(Config.load(run / "config.json"), run)
    assert metrics(run) == metrics(finished)
    for name, tensor in weights(finished).items():
        assert torch.equal(tensor, weights(run)[name]), name


def test_a_metrics_file_cut_short_by_a_kill_is_mended(finished, run, monkeypatch):
    stop_at(2, run, monkeypatch)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"arm": "echo", "step": 3, "rew')
    train.main(SMALL, run)
    assert metrics(run) == metrics(finished)


def test_a_metrics_file_broken_in_the_middle_is_named(finished, run, monkeypatch):
    stop_at(1, run, monkeypatch)
    path = run / "metrics.jsonl"
    path.write_text("not json\n" + path.read_text())
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1"):
        train.main(SMALL, run)


def test_a_full_disk_loses_nothing(finished, run, monkeypatch):
    stop_at(2, run, monkeypatch)
    whole, settings = checkpoint.latest(run / "echo"), (run / "config.json").read_bytes()

    def disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", disk_full)
        with pytest.raises(OSError, match="No space left"):
            train.main(SMALL, run)
    assert checkpoint.latest(run / "echo") == whole
    assert (run / "config.json").read_bytes() == settings
    train.main(SMALL, run)
    assert metrics(run) == metrics(finished)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--lambda", "0.1"], "unrecognized arguments: --lambda"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--group_size", "0"], "group_size: 0 is too small"),
        (["--learning_rate", "nan"], "learning_rate: nan is too small or not a finite number"),
        (["--arms", "grpo,ppo"], "arms: ppo is not one of grpo, echo, placebo"),
        (["--observation_norm", "sum"], "observation_norm: 'sum' is not one of"),
        (["--warnings_as_targets", "maybe"], "expected true or false, got 'maybe'"),
        (["--name", "../x"], "name: '../x' is not a plain folder name"),
        (["--device", "tpu9"], "device: 'tpu9' can't be used here"),
        (["--backend", "podman"], "backend: 'podman' is not one of sandbox, docker"),
        (["--tasks", "nowhere"], "tasks: 'nowhere' is neither world:NAME nor a folder"),
        (["--tasks", "world:moon"], "world:moon does not exist; there is world:tool"),
        (["--resume", "runs/none"], "runs/none holds no config.json; it is not a run folder"),
        (["--resume", "runs/none", "--steps", "3"], "remove --steps"),
        (["--resume", "runs/none", "--preset", "smollm2"], "remove --preset"),
        (["--model", "no/such-model", "--steps", "1"], "no/such-model: neither a checkpoint folder nor"),
        (["--tracker", "wandb"], "tracker: pip install wandb; it is not here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_clear_line(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(train, flags, capsys)


def test_a_run_folder_is_never_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny" / "base").mkdir(parents=True)
    replace(SMALL, name="tiny", learning_rate=1e-5).save(tmp_path / "runs" / "tiny" / "config.json")
    said = refused(train, ["--learning_rate", "1e-4"], capsys)
    assert "runs/tiny holds a run with another" in said and "learning_rate" in said


def test_a_run_that_left_nothing_keeps_no_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(train, ["--model", "no/such-model"], capsys)
    assert "no/other: neither" in refused(train, ["--model", "no/other"], capsys)


@pytest.mark.parametrize("file", ["optimizer.pt", "model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"torn"])
def test_a_foreign_or_torn_checkpoint_is_refused(finished, run, capsys, file, content):
    SMALL.save(run / "config.json")
    step = checkpoint.latest(finished / "echo")[1]
    torn = run / "echo" / step.name
    shutil.copytree(step, torn)
    (torn / file).unlink()
    if content is not None:
        (torn / file).write_bytes(content)
    wanted = {"optimizer.pt": "not a checkpoint to resume from", "model.safetensors": "neither a checkpoint"}
    assert wanted[file] in refused(train, ["--resume", str(run)], capsys)


def test_a_config_of_another_version_is_refused(run, capsys):
    (run / "config.json").write_text("{}")
    assert "not a config of this version" in refused(train, ["--resume", str(run)], capsys)


def test_a_refused_sandbox_says_what_to_do(run, monkeypatch, capsys):
    monkeypatch.setattr("echo_min.rollout.open_terminal", lambda *_: Sandbox(TASK, 9))
    monkeypatch.setattr("echo_min.terminals.bubblewrap._kept", [])
    monkeypatch.setattr(
        "echo_min.terminals.bubblewrap._bwrap",
        lambda: (_ for _ in ()).throw(SandboxUnavailable("no bwrap; --backend docker")),
    )
    SMALL.save(run / "config.json")
    assert "--backend docker" in refused(train, ["--resume", str(run)], capsys)


def test_memory_that_runs_out_before_anything_is_saved_names_resume(tmp_path, monkeypatch, capsys):
    """The advice is to edit config.json; the same command again would write it anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "make_base", lambda *_: (_ for _ in ()).throw(RunEnded("out of memory")))
    assert "--resume runs/tiny" in refused(train, ["--steps", "1"], capsys)
