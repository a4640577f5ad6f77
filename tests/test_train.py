"""The whole program through its command line: a tiny run, resume bit for bit, and one clear line for every
wrong input."""

import json
import resource
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from echo_min import checkpoint, cli, report
from echo_min.config import Config, RunEnded
from echo_min.terminals.bubblewrap import SandboxUnavailable
from echo_min.terminals.sandbox import Sandbox
from echo_min.worlds.registry import load_world

ROOT = Path(__file__).parent.parent
TASK = load_world("tool", 1).train[0]
SMALL = Config(
    name="small", arms="echo", device="cpu", threads=1, base_demonstrations=24, base_steps=3, steps=4,
    tasks_per_step=2, group_size=3, eval_every=2, eval_tasks=4,
)  # fmt: skip


def run_train(flags):
    """As `python train.py` does with these flags."""
    cli.run(train.main, *cli.parse_args(flags))


def refused(program, flags, capsys):
    """Run a command line that must end the program. -> the one line that it prints."""
    with pytest.raises(SystemExit) as ended:
        run_train(flags) if program is train else program.cli(flags)
    assert "\n" not in str(ended.value.code)
    message = str(ended.value.code) + capsys.readouterr().err
    assert ended.value.code not in (0, None)
    return message


def metrics(folder):
    """The lines of metrics.jsonl without the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith("seconds")} for line in lines]


def weights(folder):
    _, path = checkpoint.latest(folder / "echo")
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def assert_same_run(folder, other):
    """Metrics and last weights, bit for bit."""
    assert metrics(folder) == metrics(other)
    for name, tensor in weights(other).items():
        assert torch.equal(tensor, weights(folder)[name]), name


def names(folder):
    return sorted(path.name for path in folder.iterdir())


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


@pytest.fixture(scope="module")
def halfway(finished, tmp_path_factory):
    """The same run, ended before the last of its four steps."""
    folder = tmp_path_factory.mktemp("halfway") / "small"
    shutil.copytree(finished / "base", folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(3, folder, patch)
    return folder


@pytest.fixture()
def half(halfway, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(halfway, tmp_path / "half"))


@pytest.fixture()
def run(finished, tmp_path):
    """A new run folder with the base of the finished one, which any settings may go on from."""
    ignore = shutil.ignore_patterns("echo_min.json")
    shutil.copytree(finished / "base", tmp_path / "run" / "base", ignore=ignore)
    return tmp_path / "run"


def test_the_base_is_made_alike_twice(finished, tmp_path):
    train.main(replace(SMALL, steps=0), tmp_path)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "base" / name).read_bytes() == (finished / "base" / name).read_bytes()


def stop_at(step, folder, monkeypatch):
    """Run until `step` steps are done, then as if the program were interrupted."""
    real = train.update

    def interrupted(model, optimizer, batch, arm, now, config):
        if now == step:
            raise KeyboardInterrupt
        return real(model, optimizer, batch, arm, now, config)

    monkeypatch.setattr(train, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main(SMALL, folder)
    monkeypatch.setattr(train, "update", real)
    assert checkpoint.latest(folder / "echo")[0] == step


@pytest.mark.parametrize("step", [1, 2])
def test_resumed_equals_uninterrupted_bit_for_bit(finished, run, monkeypatch, step):
    stop_at(step, run, monkeypatch)
    train.main(Config.load(run / "config.json"), run)
    assert_same_run(run, finished)


def test_a_run_made_longer_equals_one_of_that_length(finished, run, monkeypatch):
    train.main(replace(SMALL, steps=2), run)
    short = (run / "curves.png").read_bytes()
    run_train(["--resume", str(run), "--steps", "4"])
    assert Config.load(run / "config.json") == SMALL
    assert short != (run / "curves.png").read_bytes() == (finished / "curves.png").read_bytes()
    assert_same_run(run, finished)


def test_a_run_is_not_made_shorter_than_it_is(half, capsys):
    before = (half / "config.json").read_bytes()
    assert "steps: 2 is less than" in refused(train, ["--resume", str(half), "--steps", "2"], capsys)
    assert (half / "config.json").read_bytes() == before and names(half / "echo")[-1] == "step-000003"


# ---- torn checkpoints ----


def tear(folder, file, length):
    """Cut a file of a checkpoint; None removes it, a share is one of its size."""
    path = folder / file
    if length is None:
        return path.unlink()
    size = path.stat().st_size
    with open(path, "r+b") as handle:
        handle.truncate(int(size * length) if isinstance(length, float) else length % size)


def test_the_two_newest_checkpoints_are_kept(finished, halfway):
    assert names(finished / "echo") == ["step-000003", "step-000004"]
    assert names(halfway / "echo") == ["step-000002", "step-000003"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_a_torn_checkpoint_falls_back_to_the_one_before(halfway, tmp_path, capsys, file):
    for length in (None, 0, 1, 9, 0.1, 0.5, 0.9, -1):
        folder = Path(shutil.copytree(halfway, tmp_path / str(length)))
        tear(folder / "echo" / "step-000003", file, length)
        done, model, _, optimizer = checkpoint.restore(folder, "echo", SMALL)
        said = capsys.readouterr().err
        assert done == 2 and f"warning: {folder}/echo/step-000003: " in said and said.count("\n") == 1
        whole = AutoModelForCausalLM.from_pretrained(halfway / "echo" / "step-000002").state_dict()
        assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())
        assert {state["step"].item() for state in optimizer.state.values()} == {2}
        assert [line["step"] for line in metrics(folder)] == [0, 1, 2, 2]
        assert names(folder / "echo") == ["step-000002", "torn-step-000003"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_a_run_with_a_torn_checkpoint_ends_as_without(finished, half, capsys, file):
    tear(half / "echo" / "step-000003", file, 0.5)
    run_train(["--resume", str(half)])
    assert "set aside as torn-step-000003" in capsys.readouterr().err
    assert_same_run(half, finished)
    assert names(half / "echo") == ["step-000003", "step-000004", "torn-step-000003"]


def test_two_torn_checkpoints_are_one_clear_line(half, capsys):
    tear(half / "echo" / "step-000003", "optimizer.pt", 0.5)
    tear(half / "echo" / "step-000002", "model.safetensors", 0.5)
    before = names(half / "echo"), metrics(half)
    said = refused(train, ["--resume", str(half)], capsys)
    assert "step-000003: not a checkpoint to resume from" in said
    assert "step-000002: neither a checkpoint" in said
    assert f"delete {half}/echo to train this arm anew" in said and "--resume" not in said
    assert (names(half / "echo"), metrics(half)) == before
    shutil.rmtree(half / "echo")
    assert checkpoint.restore(half, "echo", SMALL)[0] is None and metrics(half) == []


def test_an_optimizer_of_another_model_is_refused(tmp_path):
    one, other = torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 2, bias=False)
    mine = torch.optim.AdamW(one.parameters())
    others = torch.optim.AdamW(other.parameters()), torch.optim.SGD(one.parameters(), momentum=0.9)
    for weight, optimizer in zip((other.weight, one.weight), others, strict=True):
        weight.sum().backward()
        optimizer.step()
    for state in (*(optimizer.state_dict() for optimizer in others), [1], None):
        torch.save(state, tmp_path / "optimizer.pt")
        with pytest.raises(ValueError, match=r"not a checkpoint to resume from: optimizer\.pt: .") as refusal:
            checkpoint.restore_optimizer(tmp_path, mine)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["step-²", "step-x", "step-", "step-000009.tmp", "torn-step-000009"])
def test_other_folders_are_no_checkpoints(half, name):
    (half / "echo" / name).mkdir()
    assert checkpoint.latest(half / "echo") == (3, half / "echo" / "step-000003")


def test_an_interrupted_save_leaves_nothing(half, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main(SMALL, half)
    assert not list(half.rglob("*.tmp")) and names(half / "echo") == ["step-000002", "step-000003"]


# ---- metrics.jsonl ----


@pytest.mark.parametrize("lost", ["all", "the file", "step 2"])
def test_a_lost_history_is_refused(half, capsys, lost):
    path = half / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if lost == "step 2" and '"step": 2' not in line))
    if lost == "the file":
        path.unlink()
    said = refused(train, ["--resume", str(half)], capsys)
    step = 2 if lost == "step 2" else 0
    assert f"{path}: the line of echo's step {step} is missing: put it back, or delete {half}/echo" in said


ODD = b"[]", b'"x"', b"7", b"null", b"{}", b"", b"\xff", b"{", b'{"arm": "echo"}', b'{"step": 1}'


@pytest.mark.parametrize("line", [*ODD, b'{"arm": "grpo", "step": "1"}', b'{"arm": "echo", "step": null}'])
@pytest.mark.parametrize("last", [False, True])
def test_an_odd_line_is_named(halfway, tmp_path, capsys, line, last):
    path = tmp_path / "metrics.jsonl"
    lines = (halfway / "metrics.jsonl").read_bytes().splitlines()
    lines.insert(number := len(lines) if last else 1, line)
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(ValueError, match=rf"metrics\.jsonl, line {number + 1}: not JSON, or lacks a field"):
        checkpoint.keep_history(tmp_path, "echo", 3)


def test_a_metrics_file_cut_short_by_a_kill_is_mended(finished, half):
    with open(half / "metrics.jsonl", "a") as file:
        file.write('{"arm": "echo", "step": 3, "rew')
    train.main(SMALL, half)
    assert metrics(half) == metrics(finished)


def test_a_metrics_file_broken_in_the_middle_is_named(half, capsys):
    path = half / "metrics.jsonl"
    path.write_bytes(b"\xff\n" + path.read_bytes())
    assert f"{path}, line 1: not JSON" in refused(train, ["--resume", str(half)], capsys)


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
        (["--arms", "grpo,ppo"], "arms: ppo is not one of grpo, echo"),
        (["--observation_norm", "sum"], "observation_norm: 'sum' is not one of"),
        (["--warnings_as_targets", "maybe"], "expected true or false, got 'maybe'"),
        (["--name", "../x"], "name: '../x' is not a plain folder name"),
        (["--device", "tpu9"], "device: 'tpu9' can't be used here"),
        (["--backend", "podman"], "backend: 'podman' is not one of sandbox, docker"),
        (["--tasks", "nowhere"], "tasks: 'nowhere' is neither world:NAME nor a folder"),
        (["--tasks", "world:moon"], "world:moon does not exist; there is world:"),
        (["--resume", "runs/none"], "runs/none holds no config.json; it is not a run folder"),
        (["--resume", "runs/none", "--steps", "3", "--seed", "3"], "from the run; remove --seed"),
        (["--resume", "runs/none", "--preset", "smollm2"], "remove --preset"),
        (["--model", "no/such-model", "--steps", "1"], "no/such-model: neither a checkpoint folder nor"),
        (["--tracker", "wandb"], "tracker: pip install wandb; it is not here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_clear_line(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(train, flags, capsys)


def test_vllm_that_is_not_installed_is_one_clear_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("echo_min.machine.find_spec", lambda name: None)
    said = refused(train, ["--sampler", "vllm"], capsys)
    assert "sampler: vllm is not installed: pip install '.[vllm]'" in said
    assert not (tmp_path / "runs" / "tiny" / "base").exists()  # said before the minutes that a base takes


def test_a_run_folder_is_never_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny" / "base").mkdir(parents=True)
    cli.parse_args(["--base_steps", "7"])[0].save(tmp_path / "runs/tiny/base/echo_min.json")
    said = refused(train, ["--base_steps", "8"], capsys)
    assert "runs/tiny/base was made with base_steps 7: keep that, or pass a new --name" in said
    assert not (tmp_path / "runs" / "tiny" / "config.json").exists()


OTHER = {  # a value that SMALL does not have
    "name": "moved", "arms": "grpo", "control": "x", "device": "cuda", "tasks": "world:file",
    "backend": "docker", "harness": "qwen", "model": "other", "dtype": "bfloat16", "optimizer": "adamw8bit",
    "observation_norm": "global", "policy_norm": "token", "tracker": "wandb", "clip_low": 0.5, "beta1": 0.5,
    "beta2": 0.5, "sampler": "vllm",
}  # fmt: skip


def test_only_where_how_long_and_in_what_memory_may_change(half):
    """The arms, too, stay: what is compared was made together."""
    changed = set()
    for field in fields(Config):
        now = getattr(SMALL, field.name)
        other = OTHER.get(field.name) or (not now if field.type is bool else now + 1)
        config = replace(SMALL, **{field.name: other})
        try:
            checkpoint.claim(half, config)
            changed.add(field.name)
            assert Config.load(half / "config.json") == config
        except ValueError as error:
            what = "base" if field.name in checkpoint.OF_BASE else "echo/step-000002"
            assert f"{half}/{what} was made with {field.name} {now!r}: keep that" in str(error)
    assert changed == {
        "name", "device", "threads", "terminals", "allow_network", "prefill_tokens", "micro_batch_tokens",
        "logit_mb", "gradient_checkpointing", "shard", "steps", "save_every", "eval_every", "tracker",
    }  # fmt: skip


def test_an_edited_seed_is_refused_by_name(half, capsys):
    replace(SMALL, seed=2).save(half / "config.json")
    shutil.rmtree(half / "base")  # a checkpoint knows, too
    said = refused(train, ["--resume", str(half)], capsys)
    assert "step-000002 was made with seed 1: keep that, or pass a new --name" in said


def test_a_run_with_a_control_is_not_resumed_without(half, capsys):
    replace(SMALL, control="shuffled").save(half / "config.json")
    said = refused(train, ["--resume", str(half)], capsys)
    assert "this run has the control 'shuffled'" in said


def test_help_and_a_wrong_flag_answer_at_once():
    for flag, code, lines in (("--help", 0, 300), ("--stpes=3", 2, 3), ("--steps=many", 2, 3)):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-X", "importtime", "train.py", flag]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
        assert done.returncode == code and len(said) <= lines
        assert "argparse" in done.stderr and "torch" not in done.stderr
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
        assert ("with --steps N, to another last step" in " ".join(done.stdout.split())) == (code == 0)


@pytest.mark.parametrize(
    "code, says",
    [
        ("import no_such_dependency", "wandb can't be imported: ModuleNotFoundError"),
        ("raise ImportError('old protobuf')", "wandb can't be imported: ImportError('old protobuf')"),
        ("1 / 0", "wandb can't be imported: ZeroDivisionError"),
        ("", "pip install wandb"),  # a folder of its logs
        (None, "pip install wandb"),
    ],
)
def test_a_tracker_that_fails_is_not_called_missing(tmp_path, monkeypatch, code, says):
    if code is not None:
        (tmp_path / "wandb.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ValueError) as error:
        report.tracker_package(replace(SMALL, tracker="wandb"))
    assert says in str(error.value)
    sys.modules.pop("wandb", None)


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
    for odd in (b'{"lambda": 1}', b"[5]", b"{", b"\xff", b'{"seed": "1"}'):
        (run / "config.json").write_bytes(odd)
        said = refused(train, ["--resume", str(run)], capsys)
        assert f"{run}/config.json: not the settings of a run" in said


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
