"""Memory on one GPU: bfloat16 weights that keep small updates, states that survive a checkpoint, recomputed
activations that change nothing, and one clear line when memory runs out."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

import train
from echo_min import checkpoint, cli, report
from echo_min.checkpoint import load_policy, recompute_activations
from echo_min.config import Config
from echo_min.machine import on_this_machine
from echo_min.optimizer import make_optimizer, optimizer_step
from echo_min.policy import segment_logprobs
from echo_min.sft import make_base
from echo_min.tiny import tiny_model
from echo_min.worlds.registry import load_world
from tests.test_objective import CONFIG as OBJECTIVE
from tests.test_objective import episodes, gradients

ROOT = Path(__file__).parent.parent
BF16 = Config(dtype="bfloat16", learning_rate=1e-6, weight_decay=0.0)
# its base types plain commands: what bash says of gibberish may hold a process number, decided by the clock
SMALL = Config(
    name="small", arms="echo", device="cpu", threads=1, base_demonstrations=24, base_steps=100, steps=4,
    tasks_per_step=2, group_size=3, eval_every=2, eval_tasks=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimizer") / "base"
    make_base(SMALL, load_world("tool", SMALL.seed), folder)
    return folder


@pytest.fixture()
def run(base, tmp_path):
    """A run folder that holds the base policy alone."""
    shutil.copytree(base, tmp_path / "run" / "base")
    return tmp_path / "run"


def resumed(folder):
    cli.run(train.main, *cli.parse_args(["--resume", str(folder)]))


def trained(folder):
    """The lines of training steps without the clock."""
    lines = [line for line in report.read(folder / "metrics.jsonl") if "reward" in line]
    return [{k: v for k, v in line.items() if not k.endswith("seconds")} for line in lines]


def weights(folder):
    path = checkpoint.latest(folder / "echo")[1]
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


@pytest.fixture()
def eager():
    """The same arithmetic without torch.compile, which takes a minute on a CPU."""
    pytest.importorskip("torchao")
    with torch.compiler.set_stance("force_eager"):
        yield


class Weights(torch.nn.Module):
    """Weights like those of a language model, each of them pushed down by the same gradient."""

    def __init__(self, dtype):
        super().__init__()
        start = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) * 0.02
        self.w = torch.nn.Parameter(start.bfloat16().to(dtype))
        self.dtype = dtype

    def moved(self, config, steps):
        """-> mean change over `steps` steps with gradient 1, which AdamW turns into -learning_rate each."""
        start, optimizer = self.w.detach().double(), make_optimizer(self, config)
        for step in range(steps):
            self.w.grad = torch.ones_like(self.w)
            optimizer_step(optimizer, config.learning_rate, seed=step)
        return (self.w.detach().double() - start).mean().item()


def test_how_much_of_small_updates_bfloat16_keeps(eager):
    """20 steps at learning rate 1e-6 move every weight by -2e-5: an average weight's distance to the next
    bfloat16 is three times that."""
    truth = Weights(torch.float32).moved(BF16, 20)
    assert truth == pytest.approx(-2e-5, rel=1e-3)
    nearest = Weights(torch.bfloat16).moved(BF16, 20) / truth
    stochastic = Weights(torch.bfloat16).moved(replace(BF16, optimizer="adamw8bit"), 20) / truth
    print(f"kept: AdamW on bfloat16 {nearest:.3f}, adamw8bit {stochastic:.3f}")
    assert nearest < 0.1 and stochastic == pytest.approx(1, abs=0.03)


def test_settings_that_train_next_to_nothing_are_warned_of(capsys):
    for config, warned in (
        (BF16, True),
        (replace(BF16, learning_rate=1e-5), True),
        (replace(BF16, learning_rate=1.1e-5), False),
        (replace(BF16, optimizer="adamw8bit"), False),
        (replace(BF16, dtype="float32"), False),
    ):
        on_this_machine(replace(config, device="cpu", threads=1))
        said = capsys.readouterr().err
        assert ("warning: at learning_rate 1e-0" in said and "adamw8bit rounds" in said) == warned, config


def test_adamw_is_the_optimizer_that_it_was(model):
    config = Config()
    optimizer = make_optimizer(model, config)
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.95), 0.01)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    optimizer_step(optimizer, 3e-4, seed=1)
    assert group["lr"] == 3e-4 and torch.equal(torch.get_rng_state(), state)


def test_without_torchao_one_line_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    replace(SMALL, optimizer="adamw8bit").save(run / "config.json")
    with pytest.raises(SystemExit, match=r"pip install '\.\[gpu\]'"):
        resumed(run)


def test_a_resumed_run_rounds_as_the_uninterrupted_one(eager, run, tmp_path):
    """bfloat16, states of 8 bits and recomputed activations through the whole program."""
    config = replace(SMALL, dtype="bfloat16", optimizer="adamw8bit", gradient_checkpointing=True)
    config, never = replace(config, learning_rate=1e-5, eval_every=4), tmp_path / "never"
    shutil.copytree(run / "base", never / "base")
    train.main(config, never)
    train.main(replace(config, steps=2), run)
    config.save(run / "config.json")
    torch.rand(7)  # whatever the global generator does in between
    train.main(config, run)
    assert trained(run) == trained(never) and all(r["mismatch"] < 0.05 for r in trained(run))
    assert len(trained(run)) == 4
    for name, tensor in weights(never).items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, weights(run)[name]), name
    base = load_policy(run / "base", dtype="bfloat16")[0].state_dict()
    assert not all(torch.equal(base[name], tensor) for name, tensor in weights(run).items())


@pytest.mark.slow
def test_the_compiled_step_is_made_once_and_resumes_alike(tmp_path):
    pytest.importorskip("torchao")
    config, models = replace(BF16, optimizer="adamw8bit"), [Weights(torch.bfloat16) for _ in range(2)]
    optimizers = [make_optimizer(model, config) for model in models]

    def step(i, number):
        models[i].w.grad = torch.randn(256, 256, generator=torch.Generator().manual_seed(number)).bfloat16()
        optimizer_step(optimizers[i], 1e-4 * number, seed=number)

    torch._dynamo.utils.counters.clear()
    for number in range(1, 7):
        step(0, number)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for number in range(1, 4):
        step(1, number)
    torch.save(optimizers[1].state_dict(), tmp_path / "optimizer.pt")
    optimizers[1] = make_optimizer(models[1], config)
    checkpoint.restore_optimizer(tmp_path, optimizers[1])
    for number in range(4, 7):
        step(1, number)
    assert torch.equal(models[0].w, models[1].w)


def test_how_much_200_micro_batches_lose_added_up_in_bfloat16(model):
    rewards, groups = [i % 3 == 0 for i in range(200)], [i // 8 for i in range(200)]
    sums = [torch.zeros_like(p) for p in model.parameters()]
    for p, total in zip(model.bfloat16().parameters(), sums, strict=True):
        p.register_hook(partial(add, total))
    config = replace(OBJECTIVE, micro_batch_tokens=1, dtype="bfloat16")
    _, added = gradients(model, episodes(300, rewards, groups), config=config)
    true = torch.cat([total.flatten() for total in sums])
    lost = torch.cat([gradient.float().flatten() for gradient in added]) - true
    print(f"lost {lost.norm() / true.norm():.4f}, along the sum {lost @ true / (true @ true):.5f}")
    assert 0.003 < lost.norm() / true.norm() < 0.02 and abs(lost @ true / (true @ true)) < 0.002


def add(total, gradient):
    total += gradient  # and returns nothing, so the gradient stays as it is


# ---- activations that are computed again ----


def loss_of(model, ids):
    actions = torch.zeros_like(ids, dtype=torch.bool)
    actions[:, 5:40] = True
    observations = ~actions & (torch.arange(ids.shape[1]) > 0)
    action, observation = segment_logprobs(model, ids, ids, actions, observations)
    return action.sum() - observation.mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_activations_changes_nothing(model, dtype):
    model.to(dtype)
    model.config.attention_dropout = 0.5  # may not wake up
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.eval()
    ids = torch.randint(0, 300, (3, 64), generator=torch.Generator().manual_seed(0))
    results = []
    for enabled in (False, True):
        if enabled:
            recompute_activations(model)
        saved = 0

        def count(tensor):
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = loss_of(model, ids)
        model.zero_grad()
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in model.parameters()], saved))
        assert not any(module.training for module in model.modules())
    (a, grads, kept), (b, again, kept_again) = results
    assert torch.equal(a, b) and all(map(torch.equal, grads, again))
    assert kept_again < 0.6 * kept


# ---- out of memory ----

CHILD = """
import ctypes, importlib, resource, sys
from pathlib import Path
import train
from echo_min import cli
folder, (module, owner, name) = Path(sys.argv[1]), sys.argv[2].split()
owner = getattr(importlib.import_module(module), owner)
real = getattr(owner, name)
def starved(self, *args, **kwargs):
    if not len(list((folder / "echo").glob("step-000001"))):
        pass
    elif name == "publish":  # in the second step there is no more room on the disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, -1))
    else:  # or none in memory
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (2 << 20), -1))
    return real(self, *args, **kwargs)
setattr(owner, name, starved)
cli.run(train.main, *cli.parse_args(["--resume", str(folder)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "site, says",
    [
        ("torch Tensor backward", "in the update: in its config.json lower micro_batch_tokens, logit_mb"),
        (
            "echo_min.sampler Sampler _read",
            "in the rollout: in its config.json lower terminals, prefill_tokens",
        ),
        ("echo_min checkpoint publish", "step-000002: could not be written"),
    ],
)
def test_out_of_memory_or_disk_says_so_and_keeps_the_checkpoint(run, site, says):
    """A model with a wide MLP, and 2 MiB of room from the second step on: less than an activation; or a disk
    that takes 1 MiB a file."""
    _, tokenizer = load_policy(run / "base")
    wide = tiny_model(tokenizer, 0).config
    wide.intermediate_size = 16384
    config = replace(SMALL, steps=2, eval_every=2, eval_tasks=1)
    checkpoint.publish(Qwen3ForCausalLM(wide), tokenizer, run / "base", config)
    config.save(run / "config.json")
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHILD, str(run), site]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and says in done.stderr, done.stderr
    reasons = "you tried to allocate", "can't start new thread", "File too large"
    assert any(reason in done.stderr for reason in reasons)
    assert "Traceback" not in done.stderr and not list(run.rglob("*.tmp"))
    assert checkpoint.latest(run / "echo")[0] == 1
    load_policy(checkpoint.latest(run / "echo")[1])
