"""The whole program through its command line: a tiny run, resume bit for bit, and one clear line for every wrong input."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from echo_min import checkpoint
from echo_min.config import Config

ROOT = Path(__file__).parent.parent
SMALL = Config(
    name="small", arms="echo", device="cpu", threads=1, base_demonstrations=200, base_steps=3, steps=4, tasks_per_step=2,
    group_size=3, eval_every=2, eval_tasks=4,
)  # fmt: skip


def command_line(*flags, cwd, program="train.py"):
    done = subprocess.run([sys.executable, ROOT / program, *flags], cwd=cwd, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


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
    assert {"metrics.jsonl", "config.json", "curves.png", "transcripts", "base", "echo"} <= {p.name for p in finished.iterdir()}
    steps, path = checkpoint.latest(finished / "echo")
    assert steps == 4
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "align acorn"}], tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\nalign acorn<|im_end|>\n<|im_start|>assistant\n"
    assert torch.isfinite(model(**tokenizer(chat, return_tensors="pt", return_token_type_ids=False)).logits).all()
    evals = [r for r in metrics(finished) if "pass_rate" in r]
    assert [r["step"] for r in evals] == [0, 2, 4]
    trained = [r for r in metrics(finished) if "reward" in r]
    assert [r["step"] for r in trained] == [1, 2, 3, 4]
    assert trained[0]["mismatch"] < 1e-4 and abs(trained[0]["ratio"] - 1) < 1e-4  # sampler and trainer agree


@pytest.mark.parametrize("stop_after", [1, 2])
def test_resumed_equals_uninterrupted_bit_for_bit(finished, tmp_path, monkeypatch, stop_after):
    real = train.update

    def killed_at(model, optimizer, episodes, arm, step, config):
        if step == stop_after:
            raise KeyboardInterrupt
        return real(model, optimizer, episodes, arm, step, config)

    monkeypatch.setattr(train, "update", killed_at)
    with pytest.raises(KeyboardInterrupt):
        train.main(SMALL, tmp_path)
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path / "echo")[0] == stop_after
    train.main(Config.load(tmp_path / "config.json"), tmp_path)
    assert metrics(tmp_path) == metrics(finished)
    for name, tensor in weights(finished).items():
        assert torch.equal(tensor, weights(tmp_path)[name]), name


def test_a_metrics_file_cut_short_by_a_kill_is_mended(finished, tmp_path):
    train.main(replace(SMALL, steps=2), tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"arm": "echo", "step": 3, "rew')
    train.main(SMALL, tmp_path)
    assert metrics(tmp_path) == metrics(finished)


def test_a_metrics_file_broken_in_the_middle_is_named(finished, tmp_path):
    train.main(replace(SMALL, steps=2), tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text("not json\n" + path.read_text())
    with pytest.raises(ValueError, match="metrics.jsonl, line 1"):
        train.main(SMALL, tmp_path)


def test_a_checkpoint_is_whole_or_absent(finished, tmp_path, monkeypatch):
    train.main(replace(SMALL, steps=1), tmp_path)
    whole = checkpoint.latest(tmp_path / "echo")

    def disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        train.main(replace(SMALL, steps=2), tmp_path)
    assert checkpoint.latest(tmp_path / "echo") == whole
    monkeypatch.undo()
    train.main(SMALL, tmp_path)
    assert metrics(tmp_path) == metrics(finished)


def test_eval_measures_and_shows_a_checkpoint(finished, tmp_path):
    flags = [str(finished / "echo"), "--tasks", "world:tool", "-k", "2", "--limit", "4", "--show", "1", "--png", "t.png"]
    code, out, err = command_line(*flags, cwd=tmp_path, program="eval.py")
    assert code == 0, err
    for word in ("pass@1 sampled", "pass@2 sampled", "pass@1 greedy", "max_turns", "turns", "observation CE", "\x1b["):
        assert word in out
    assert (tmp_path / "t.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--lambda", "0.1"], "unrecognized arguments: --lambda"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--group_size", "0"], "group_size: 0 is too small"),
        (["--learning_rate", "nan"], "learning_rate: nan is too small (or not a number)"),
        (["--arms", "grpo,ppo"], "arms: ppo is not one of grpo, echo, placebo"),
        (["--observation_norm", "sum"], "observation_norm: 'sum' is not one of"),
        (["--warnings_as_targets", "maybe"], "expected true or false, got 'maybe'"),
        (["--name", "../x"], "name: '../x' is not a plain folder name"),
        (["--tasks", "world:moon"], "world:moon does not exist; there is world:tool"),
        (["--resume", "runs/none"], "runs/none holds no config.json; it is not a run folder"),
        (["--resume", "runs/none", "--steps", "3"], "remove --steps"),
        (["--model", "no/such-model", "--steps", "1"], "no/such-model: neither a checkpoint folder nor"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_clear_line(tmp_path, flags, message):
    code, _, err = command_line(*flags, cwd=tmp_path)
    assert code != 0 and message in err and "Traceback" not in err


def test_a_run_folder_is_never_overwritten(finished, tmp_path):
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    replace(SMALL, name="tiny", learning_rate=1e-5).save(run / "config.json")
    code, _, err = command_line("--learning_rate", "1e-4", cwd=tmp_path)
    assert code != 0 and "runs/tiny holds a run with another" in err and "learning_rate" in err


def test_a_foreign_checkpoint_is_refused(finished, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    SMALL.save(run / "config.json")
    step = checkpoint.latest(finished / "echo")[1]
    (run / "base").symlink_to(finished / "base")
    (run / "echo" / step.name).mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (run / "echo" / step.name / name).write_bytes((step / name).read_bytes())
    code, _, err = command_line("--resume", str(run), cwd=tmp_path)
    assert code != 0 and "not a checkpoint to resume from" in err and "Traceback" not in err


def test_eval_refuses_what_is_no_checkpoint(tmp_path):
    code, _, err = command_line(str(tmp_path), cwd=tmp_path, program="eval.py")
    assert code != 0 and "neither a checkpoint folder nor a model" in err and "Traceback" not in err
