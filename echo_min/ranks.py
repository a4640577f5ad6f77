"""Several processes, one run: `torchrun --nproc-per-node N train.py ...`. Each has the whole model, or with
--shard a piece of it (shard.py), and its share of rollouts and micro-batches. All know all episodes, so that
metrics are those of one process. The first alone writes files. When one dies: machine.others_alive."""

import os
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

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
        dist.all_gather_object(parts := [None] * WORLD, own)
    return [parts[i % WORLD][i // WORLD] for i in range(sum(map(len, parts)))]


def share(parts: list) -> list:
    """This rank's micro-batches: as many as each other's, as FSDP2 demands, so that some end with a blank."""
    nothing = dict.fromkeys(("action_mask", "observation_mask"), torch.zeros_like(parts[-1].action_mask))
    return mine(parts + [replace(parts[-1], **nothing)] * (-len(parts) % WORLD))


def whole(model):
    """A context in which every rank holds all weights, and so samples without waiting for the others."""
    return model.whole() if hasattr(model, "whole") else nullcontext()


def add_up(model, metrics: dict) -> dict:
    """Gradients and metrics of all ranks: the gradients in place, if FSDP2 has not done it. -> the metrics"""
    if WORLD == 1:
        return metrics
    for p in () if hasattr(model, "whole") else model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(p.grad)
    dist.all_gather_object(parts := [None] * WORLD, dict(metrics))
    return {name: sum(part[name] for part in parts) for name in metrics}
