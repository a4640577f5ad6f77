"""`--shard true`, for models that are too large for one card: FSDP2. Every rank keeps a piece of each weight,
gradient and optimizer state; in an update a layer is whole only while it is at work. To sample, all weights
are whole. Checkpoints are those of one process: either can go on with the other's."""

from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map
from transformers.modeling_layers import GradientCheckpointingLayer

from echo_min import ranks
from echo_min.config import Config
from echo_min.optimizer import make_optimizer


def cut_up(model, device: str) -> None:
    """Cut each weight along its first axis, in place; this rank's pieces move to the device. Ranks need not do
    it at the same time."""
    mesh = init_device_mesh(torch.device(device).type, (ranks.WORLD,))
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)  # the loss reads the head, afterwards
    for part in (model, *layers):
        part.set_gradient_divide_factor(1.0)  # a sum: the losses' weights hold the batch's normaliser
        part.set_force_sum_reduction_for_comms(True)
    # policy and sampler call base_model, but the embedding and the head are gathered for the model around it
    model.read = model.base_model.forward
    register_fsdp_forward_method(model, "read")
    model.base_model.forward, model.whole = model.read, partial(whole, model, layers)


@contextmanager
def whole(model, layers: list[FSDPModule]):
    """Every rank holds all weights inside; each makes the forward passes that it likes."""
    for part in (model, *layers):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in (model, *layers):
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)


def optimizer_of_pieces(model, config: Config) -> torch.optim.Optimizer:
    """Of this rank's pieces as plain tensors, in the model's memory: AdamW8bit does not take DTensors."""
    weights = list(model.parameters())
    pieces = torch.nn.ParameterList(weight.detach().to_local() for weight in weights)

    def take_gradients(*_) -> None:
        for piece, weight in zip(pieces, weights, strict=True):
            piece.grad, weight.grad = weight.grad if weight.grad is None else weight.grad.to_local(), None

    optimizer = make_optimizer(pieces, config)
    optimizer.register_step_pre_hook(take_gradients)
    return optimizer


@torch.no_grad()
def gathered(model, optimizer) -> tuple[dict, dict]:
    """-> (name -> weight, optimizer.state_dict()), whole, on the CPU of the first rank. All must call it."""
    weights = {name: value for name, value in model.state_dict().items() if not isinstance(value, DTensor)}
    for name, weight in model.named_parameters():  # without the head, if it is the embedding
        weights[name] = joined(weight.to_local())
    saved = optimizer.state_dict()
    saved["state"] = tree_map(lambda value: joined(value) if value.dim() else value, saved["state"])
    return weights, saved


def joined(piece: Tensor) -> Tensor | None:
    """All ranks' pieces -> the tensor, on the CPU; None but for the first rank: one is there at a time."""
    pieces = [None] * ranks.WORLD if ranks.RANK == 0 else None
    dist.gather_object(piece.cpu(), pieces)
    if pieces is None or not any(map(eight_bit, pieces)):
        return pieces and torch.cat(pieces)
    if all(map(eight_bit, pieces)):  # numbers, and a scale for each block of them
        codes, scale = (torch.cat([getattr(p, name) for p in pieces]) for name in ("codes", "scale"))
        return type(piece)(codes, scale, pieces[0].qmap, piece.signed, piece.dtype)
    return torch.cat([p.dequantize() if eight_bit(p) else p for p in pieces])


def eight_bit(tensor: Tensor) -> bool:
    return hasattr(tensor, "codes")  # of AdamW8bit


def cut_states(states: dict, model, optimizer) -> None:
    """The optimizer states of a whole model, in place, to this rank's pieces. Raises ValueError if they are
    another model's."""
    pairs = zip(model.parameters(), optimizer.param_groups[0]["params"], strict=True)
    for (weight, piece), values in zip(pairs, states.values(), strict=False):
        start = ranks.RANK * -(-len(weight) // ranks.WORLD)
        own = slice(start, start + len(piece))
        for name in [name for name, value in values.items() if value.dim()]:
            if values[name].shape != weight.shape:
                raise ValueError("it is of another model")
            try:
                values[name] = values[name][own]
            except (ValueError, ZeroDivisionError):  # 8 bits, and not in whole blocks
                values[name] = values[name].dequantize()[own]
