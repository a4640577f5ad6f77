"""Several processes, one run: `torchrun --nproc-per-node N train.py ...`. Each has the whole model and its
share of the rollouts and micro-batches. All know all episodes, so advantages, normalisers and metrics are
those of one process. The first alone writes files."""

import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from echo_min.config import RunEnded

RANK, LOCAL = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def start(device: str) -> None:
    if WORLD > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=6))


def mine(items: list) -> list:
    """This rank's share."""
    return items[RANK::WORLD]


def gather(own: list) -> list:
    """What all ranks made of their shares, in the order before `mine`."""
    parts = [own]
    if WORLD > 1:
        with others_alive():
            dist.all_gather_object(parts := [None] * WORLD, own)
    return [parts[i % WORLD][i // WORLD] for i in range(sum(map(len, parts)))]


def add_up(model, metrics: dict) -> dict:
    """Gradients and metrics of all ranks: the gradients in place. -> the metrics"""
    if WORLD == 1:
        return metrics
    with others_alive():
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # a rank may be without a micro-batch
            dist.all_reduce(p.grad)
        dist.all_gather_object(parts := [None] * WORLD, dict(metrics))
    return {name: sum(part.get(name, 0.0) for part in parts) for name in max(parts, key=len)}


@contextmanager
def others_alive():
    try:
        yield
    except RuntimeError as error:
        raise RunEnded(f"another process of this run has ended ({str(error).split(chr(10))[0]})") from None
