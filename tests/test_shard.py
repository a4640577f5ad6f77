"""A model cut up between processes, `--shard true`, with gloo on a CPU. Run by torchrun, this file is the
program that both ranks are."""

import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

import train
from echo_min import cli, machine, ranks
from echo_min.batch import make_batch
from echo_min.checkpoint import restore_optimizer
from echo_min.config import RunEnded
from echo_min.optimizer import make_optimizer, optimizer_step
from echo_min.shard import cut_up, make_optimizer_of_pieces
from tests.test_objective import CONFIG, Capture, episodes
from tests.test_ranks import ROOT, SMALL, TORCHRUN, all_end, at_work, begin, lines, same_lines

pytestmark = pytest.mark.slow
SHARDED = "--shard", "true"
VOCABULARY = 301  # not even: one rank has a row more


def finished(folder, launcher, *flags):
    child = begin(folder, launcher, *flags)
    said, _ = child.communicate(timeout=500)
    assert child.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the run `one`, of one process; `two`, of two with a piece of the model each; `part`, the
    same that ended after two of its steps and went on."""
    folder = tmp_path_factory.mktemp("shard")
    finished(folder, [], "--name", "one", *SMALL)
    shutil.copytree(folder / "runs/one/base", folder / "runs/two/base")
    shutil.copytree(folder / "runs/one/base", folder / "runs/part/base")
    finished(folder, TORCHRUN, "--name", "two", *SHARDED, *SMALL)
    finished(folder, TORCHRUN, "--name", "part", *SHARDED, *SMALL, "--steps", "2")
    finished(folder, TORCHRUN, "--resume", "runs/part", "--steps", "3")
    return folder / "runs"


def weights(run):
    return load_file(run / "echo/step-000003/model.safetensors")


def states(run, step=3):
    return torch.load(run / f"echo/step-{step:06d}/optimizer.pt", weights_only=True)


def test_pieces_make_the_run_of_one_process(runs):
    told = [next((runs / name / "transcripts").iterdir()).read_text() for name in ("one", "two")]
    assert told[0] == told[1]
    same_lines(*(lines(runs / name) for name in ("one", "two")), grad_norm=1e-5)


def test_a_checkpoint_is_that_of_one_process_and_plain_transformers_loads_it(runs):
    model = AutoModelForCausalLM.from_pretrained(runs / "two/echo/step-000003")
    assert type(model) is Qwen3ForCausalLM
    one, two = weights(runs / "one"), weights(runs / "two")
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert torch.equal(model.state_dict()[name], two[name])
        assert (weight - two[name]).abs().max() < 1e-5, name
    one, two = states(runs / "one"), states(runs / "two")
    assert one["param_groups"] == two["param_groups"] and one["state"].keys() == two["state"].keys()
    for i, state in one["state"].items():
        for name, value in state.items():
            assert (value - two["state"][i][name]).abs().max() <= 1e-4 * value.abs().max(), name


def test_a_resumed_run_is_the_run_that_was_not_interrupted(runs):
    resumed = [r for r in lines(runs / "part") if "expert_ce" not in r or r["step"] != 2]
    same_lines(lines(runs / "two"), resumed)
    for name, weight in weights(runs / "two").items():
        assert (weight - weights(runs / "part")[name]).abs().max() < 1e-6, name


def test_one_process_goes_on_with_pieces_and_pieces_with_one_process(runs):
    flags = [*SMALL, "--steps", "4"]
    for name, came_from in (("alone", "two"), ("cut", "one")):
        shutil.copytree(runs / came_from, runs / name)
    finished(runs.parent, [], "--name", "alone", *flags)
    finished(runs.parent, TORCHRUN, "--name", "cut", *SHARDED, *flags)
    alone, cut = ([r for r in lines(runs / name) if r["step"] == 4] for name in ("alone", "cut"))
    same_lines(alone, cut, grad_norm=1e-5)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_all(runs, victim):
    all_end(*at_work(runs, f"killed_{victim}"), victim)


def test_gradients_are_those_of_one_process():
    """Tied embeddings or not, activations recomputed or not, micro-batches of one rollout or one of all."""
    command = [sys.executable, *TORCHRUN, "-m", "tests.test_shard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert done.stdout.count("gradients differ by") == 16


def test_states_of_8_bits_are_those_of_one_process_and_are_restored(tmp_path):
    pytest.importorskip("torchao")
    command = [sys.executable, *TORCHRUN, "-m", "tests.test_shard", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("states are equal") == 2


def test_without_torchrun_one_line_says_what_to_run(capsys):
    with pytest.raises(SystemExit):
        cli.parse_args(["--shard", "true"])
    assert "torchrun --nproc-per-node N train.py" in capsys.readouterr().err.splitlines()[-1]


def test_only_the_loss_of_another_process_is_told_as_such():
    with pytest.raises(RunEnded, match="another process"), machine.others_alive():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    with pytest.raises(RuntimeError, match=r"^shapes$"), machine.others_alive():
        raise RuntimeError("shapes")


def small_model(tied: bool = True, checkpointing: bool = False, width: int = 64, layers: int = 3):
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": layers, "head_dim": width}
    sizes |= {"vocab_size": VOCABULARY, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=tied)).eval()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def compare(tied: bool, checkpointing: bool, tokens: int) -> None:
    """What each rank does: train.update with a whole model as if alone, then with a piece of one. There are 5
    micro-batches, or 1, so the second rank needs a blank one."""
    config = replace(CONFIG, micro_batch_tokens=tokens, grad_clip=0.1)
    batch = make_batch(episodes(VOCABULARY, (1, 0, 0, 1, 0), (0, 0, 0, 1, 1)), config)

    def gradients(made):
        optimizer = Capture(made.parameters(), lr=1.0)
        metrics = train.update(made, optimizer, batch, "echo", 0, config)
        return metrics, optimizer.grads

    rank, world = ranks.RANK, ranks.WORLD
    ranks.RANK, ranks.WORLD = 0, 1
    metrics, wanted = gradients(small_model(tied, checkpointing))
    ranks.RANK, ranks.WORLD = rank, world
    made = small_model(tied, checkpointing)
    cut_up(made, "cpu")
    with made.whole():
        pass
    told, found = gradients(made)
    difference = 0.0
    for want, got in zip(wanted, found, strict=True):
        assert want.abs().max() > 0
        difference = max(difference, ((got.full_tensor() - want).abs().max() / want.abs().max()).item())
    print(f"gradients differ by {difference:.1e}", flush=True)
    assert difference < 1e-6
    assert told == pytest.approx(metrics, rel=2e-6, abs=1e-6)


def eight_bits(folder: Path) -> None:
    """What each rank does: three steps, as of a whole model; then both go on with what the pieces saved."""
    config = replace(CONFIG, optimizer="adamw8bit", dtype="bfloat16")
    whole, model = (small_model(width=256, layers=1).bfloat16() for _ in range(2))
    cut_up(model, "cpu")
    one, mine = make_optimizer(whole, config), make_optimizer_of_pieces(model, config)

    def step(optimizer, weights, number):
        for weight in weights:
            gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)).bfloat16()
            weight.grad = gradient if weights is not cut else torch.zeros_like(weight)
            if weights is cut:
                weight.grad.to_local().copy_(gradient.split(-(-len(gradient) // 2))[ranks.RANK])
        optimizer_step(optimizer, 1e-3, number)

    def equal(a, b):
        return torch.equal(*(x.dequantize() if hasattr(x, "codes") else x for x in (a, b)))

    cut = list(model.parameters())
    for number in range(3):
        step(one, list(whole.parameters()), number)
        step(mine, cut, number)
    saved, kept = mine.state_dict(), one.state_dict()["state"]
    if ranks.RANK == 0:
        assert sum(hasattr(state["exp_avg"], "codes") for state in saved["state"].values()) > 5
        for i, state in saved["state"].items():
            assert all(type(v) is type(kept[i][k]) and equal(v, kept[i][k]) for k, v in state.items())
        torch.save(saved, folder / "optimizer.pt")
    ranks.gather([])
    again = make_optimizer_of_pieces(model, config)
    restore_optimizer(folder, again)
    for state, restored in zip(mine.state.values(), again.state.values(), strict=True):
        assert all(type(v) is type(restored[k]) and equal(v, restored[k]) for k, v in state.items())
    restore_optimizer(folder, one)
    step(one, list(whole.parameters()), 3)
    step(again, cut, 3)
    print("states are equal", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks.start("cpu")
    if sys.argv[1:]:
        eight_bits(Path(sys.argv[1]))
    else:
        for case in product([True, False], [True, False], [1, 10_000]):
            compare(*case)
