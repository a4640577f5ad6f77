"""What only a GPU can show, in ten minutes on one card: `make gpu`; `make gpu PY=python3` installs nothing.

Parts, each in a process with a time limit of its own; one that fails, or lacks a package, ends no other. What
they print comes at once; at the end a table to paste, and figures/data/gpu.jsonl. Refuses without a GPU.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
DATA = ROOT / "figures" / "data" / "gpu.jsonl"
PARTS = {  # name -> (seconds at most, arguments of Python)
    "kernel tests": (100, ["-m", "pytest", "tests/test_segment_logprob.py", "-m", "", "-q"]),
    "loss head": (90, ["-m", "kernels.bench", "--rounds", "5"]),
    "price of ECHO": (50, ["-m", "kernels.price", "--tokens", "2048", "--rounds", "10"]),
    "sampler": (70, ["figures/gpu.py", "sampler"]),
    "memory": (80, ["figures/gpu.py", "memory"]),
    "learning": (200, ["figures/gpu.py", "learning"]),
}
DEVICE, QWEN = "cuda", "Qwen/Qwen3-0.6B"  # its shape; the weights are random
ROWS, PROMPT, REPLY, TURNS = 12, 500, 100, 3  # of the sampler's dialogues


def refusal() -> str:
    """Why there is no GPU to use, with the driver's version if there is one; '' if there is."""
    try:
        import torch

        torch.zeros(1, device="cuda")
        return ""
    except ImportError as error:
        return str(error)
    except (RuntimeError, AssertionError) as error:  # among them: a driver too old for torch's CUDA
        said = str(error).strip().split("\n")[0]
        return f"{said} (torch {torch.__version__}, CUDA {torch.version.cuda}, driver {driver() or 'none'})"


def driver() -> str:
    try:
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(ask, capture_output=True, text=True, timeout=20).stdout.strip().split("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        return ""


def run_part(name: str, limit: float, arguments: list[str]) -> dict:
    """-> how it ended, how long it took, and the rows of tables that it printed."""
    print(f"\n## {name} (at most {limit:g} s)\n", flush=True)
    started, lines, late = time.monotonic(), [], threading.Event()
    settings = {"CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    settings |= {"PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
    child = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | settings, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip

    def end() -> None:
        late.set()
        os.killpg(child.pid, signal.SIGKILL)

    timer = threading.Timer(limit, end)
    timer.start()
    try:
        for line in child.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
        code = child.wait()
    finally:
        timer.cancel()
        if child.poll() is None:  # we are being interrupted
            end()
    ended = "ok" if code == 0 else f"failed: {([''] + [line for line in lines if line])[-1]}"
    if missing := re.search(r"No module named '?([\w.]+)", "\n".join(lines)):
        ended = f"needs the package {missing[1]}" if code else ended
    ended = f"ended at its limit of {limit:g} s" if late.is_set() else ended
    rows = [line for line in lines if line.startswith("|")]
    return {"part": name, "ended": ended, "seconds": round(time.monotonic() - started, 1), "rows": rows}


def run_all(parts: dict, data: Path, about: dict) -> bool:
    """Every part, the table, the file. -> whether all went well."""
    done = []
    for name, (limit, arguments) in parts.items():
        done.append(run_part(name, limit, arguments))
        data.write_text("".join(json.dumps(about | result) + "\n" for result in done))
    print(f"\n# {', '.join(map(str, about.values()))}\n\n| part | ended | seconds |\n|---|---|--:|")
    for result in done:
        print(f"| {result['part']} | {result['ended']} | {result['seconds']} |")
    for result in done:
        if result["rows"]:
            print(f"\n{result['part']}:\n", *result["rows"], sep="\n")
    return all(result["ended"] == "ok" for result in done)


# ---- parts that are not programs of their own ----


def random_policy(name: str, dtype: str):
    """A model of the shape of `name`, on the GPU."""
    import torch
    from transformers import AutoModelForCausalLM

    from echo_min.estimate import skeleton

    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(skeleton(name).config, dtype=getattr(torch, dtype)).eval()


def sampler() -> None:
    """Tokens a second, and the logprobs beside those of a full forward pass."""
    import numpy as np
    import torch

    from echo_min.config import Config
    from echo_min.machine import on_this_machine
    from echo_min.sampler import Sampler

    config, rows = on_this_machine(Config(context=4096, device=DEVICE)), list(range(ROWS))
    print(f"| sampler, {QWEN} | tokens/s | ms a pass | largest logprob error, nats |\n|---|--:|--:|--:|")
    for dtype, allowed in (("bfloat16", 0.5), ("float32", 1e-3)):
        model = random_policy(QWEN, dtype)
        ours = Sampler(model, set(), config, [np.random.default_rng(row) for row in rows])
        dialogue, sampled, seconds = [[] for _ in rows], [[] for _ in rows], []
        for _ in range(TURNS):
            new = [[50 + (7 * row + i) % 900 for i in range(PROMPT - row)] for row in rows]
            started = time.perf_counter()  # a reply ends in a copy to the host, which waits
            replies = ours.reply(rows, new, REPLY)
            seconds.append(time.perf_counter() - started)
            for row, (ids, logprobs) in enumerate(replies):
                first = len(dialogue[row]) + PROMPT - row
                dialogue[row] += new[row] + ids
                sampled[row] += enumerate(logprobs, first)
        error = 0.0
        for ids, marks in zip(dialogue, sampled, strict=True):
            ids = torch.tensor(ids, device=DEVICE)
            with torch.inference_mode():
                logprobs = model(ids[None]).logits[0].float().log_softmax(-1)
            at, given = (torch.tensor(values, device=DEVICE) for values in zip(*marks, strict=True))
            error = max(error, (logprobs[at - 1, ids[at]] - given).abs().max().item())
        best = min(seconds[1:])
        cells = f"{ROWS * REPLY / best:.0f} | {best / REPLY * 1e3:.1f} | {error:.1e}"
        print(f"| {dtype}, {ROWS} rows | {cells} |", flush=True)
        assert error < allowed, "sampler and full forward pass differ"
        del model, ours


def memory() -> None:
    """Peaks of a rollout and of three steps, beside the estimate's."""
    import numpy as np
    import torch

    import train
    from echo_min.batch import make_batch
    from echo_min.checkpoint import recompute_activations
    from echo_min.config import Config
    from echo_min.estimate import Estimate
    from echo_min.optimizer import make_optimizer
    from echo_min.presets import PRESETS
    from echo_min.sampler import Sampler
    from kernels.price import make_episodes

    print("| peak, GB | measured | estimate |\n|---|--:|--:|")
    changed = {"context": 4096, "micro_batch_tokens": 8192, "terminals": 8, "learning_rate": 1e-4}
    for name, preset in (("tiny", {}), (QWEN, PRESETS["qwen3_0_6b"] | changed | {"optimizer": "adamw"})):
        config = Config(**preset | {"device": DEVICE})
        model, rows = random_policy(name, config.dtype), list(range(config.terminals))
        if config.gradient_checkpointing:
            recompute_activations(model)
        optimizer = make_optimizer(model, config)
        batch = make_batch(make_episodes(model.config.vocab_size, 8, config.context), config)

        def rollout(model=model, config=config, rows=rows) -> None:
            noise = [np.random.default_rng(row) for row in rows]
            full = [[5] * (config.context - 9)] * len(rows)
            Sampler(model, set(), config, noise).reply(rows, full, 8)

        def update(model=model, config=config, optimizer=optimizer, batch=batch) -> None:
            for step in range(3):
                train.update(model, optimizer, batch, "echo", step, config)

        for phase, expected in zip((rollout, update), Estimate(model, config).peaks(), strict=True):
            torch.cuda.reset_peak_memory_stats()
            phase()
            got = torch.cuda.max_memory_allocated()
            print(f"| {name}, {phase.__name__} | {got / 1e9:.3f} | {expected / 1e9:.3f} |", flush=True)


def learning() -> None:
    """A short run that has to learn."""
    import shutil

    import train
    from echo_min import report
    from echo_min.config import Config
    from echo_min.presets import PRESETS

    folder, short = ROOT / "runs" / "gpu_learns", {"steps": 60, "eval_every": 60, "save_every": 60}
    shutil.rmtree(folder, ignore_errors=True)
    train.main(Config(**PRESETS["tiny"] | short | {"arms": "echo", "device": DEVICE}), folder)
    lines = report.read(folder / "metrics.jsonl")
    before, after = (line["pass_rate"] for line in lines if "pass_rate" in line)
    seconds = [line["rollout_seconds"] + line["update_seconds"] for line in lines if "reward" in line]
    print("| world:hard, ECHO, 60 steps | pass rate before | after | seconds a step |\n|---|--:|--:|--:|")
    print(f"| tiny | {before:.2f} | {after:.2f} | {sum(seconds) / len(seconds):.2f} |")
    assert after > before + 0.1, "it has not learned"


if __name__ == "__main__":
    if part := sys.argv[1:]:
        sys.path.insert(0, str(ROOT))
        sys.exit({"sampler": sampler, "memory": memory, "learning": learning}[part[0]]())
    if why := refusal():
        sys.exit(f"gpu.py: needs an NVIDIA GPU that torch can use: {why}")
    import torch

    about = {"gpu": torch.cuda.get_device_name(), "driver": driver(), "torch": torch.__version__}
    sys.exit(0 if run_all(PARTS, DATA, about) else 1)
