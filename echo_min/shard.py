"""`--shard true`, for models too large for one card: FSDP2. Every rank keeps a piece of each weight, gradient
and optimizer state. A layer is whole while an update is at work in it, all are while the model is sampled.
Checkpoints are those of one process: either can go on with the other's."""

from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map
from transformers.modeling_layers import GradientCheckpointingLayer

from echo_min import ranks
from echo_min.optimizer import make_optimizer


def cut_up(model, device: str) -> None:
    """Cut each weight along its first axis, in place, without waiting for other ranks; the pieces move to the
    device. Then all must call state_dict, of model and optimizer, to give the first rank whole tensors."""
    mesh = init_device_mesh(torch.device(device).type, (ranks.WORLD,))
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for part in (*layers, model):  # whose head and embedding stay: the loss reads the head afterwards
        fully_shard(part, mesh=mesh, reshard_after_forward=part is not model)
        part.set_gradient_divide_factor(1.0)  # a sum: the losses' weights hold the batch's normaliser
        part.set_force_sum_reduction_for_comms(True)
    # policy and sampler call base_model, but embedding and head are gathered for the model around it
    model.read = model.base_model.forward
    register_fsdp_forward_method(model, "read")
    model.base_model.forward, model.whole = model.read, partial(whole, model, layers)
    model.register_state_dict_post_hook(join_weights)


@contextmanager
def whole(model, layers: list):
    """Every rank holds all weights inside, and makes the forward passes that it likes."""
    for part in (model, *layers):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in (model, *layers):
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)


def make_optimizer_of_pieces(model, config) -> torch.optim.Optimizer:
    """Of plain tensors in the memory of this rank's pieces: AdamW8bit does not take FSDP2's DTensors."""
    weights = list(model.parameters())
    pieces = torch.nn.ParameterList(weight.detach().to_local() for weight in weights)

    def take_gradients(*_) -> None:
        for piece, weight in zip(pieces, weights, strict=True):
            piece.grad, weight.grad = weight.grad.to_local(), None

    optimizer = make_optimizer(pieces, config)
    optimizer.register_step_pre_hook(take_gradients)
    join = partial(tree_map, lambda value: joined(value) if value.dim() else value)
    optimizer.register_state_dict_post_hook(lambda _, saved: saved | {"state": join(saved["state"])})
    optimizer.register_load_state_dict_pre_hook(partial(cut_states, weights))
    return optimizer


def join_weights(model, weights: dict, *_) -> None:
    weights |= {name: joined(weight.detach().to_local()) for name, weight in model.named_parameters()}
    for name in [name for name, value in weights.items() if isinstance(value, DTensor)]:
        del weights[name]  # the head, which is the embedding


def joined(piece: torch.Tensor) -> torch.Tensor | None:
    """All ranks' pieces -> the tensor, on the CPU of the first; None on the others."""
    dist.gather_object(piece.cpu(), pieces := None if ranks.RANK else [None] * ranks.WORLD)
    if pieces and all(hasattr(p, "codes") for p in pieces):  # of 8 bits, and a scale for each block
        codes, scale = (torch.cat([getattr(p, name) for p in pieces]) for name in ("codes", "scale"))
        return type(piece)(codes, scale, pieces[0].qmap, piece.signed, piece.dtype)
    return pieces and torch.cat([p.dequantize() if hasattr(p, "codes") else p for p in pieces])


def cut_states(weights: list[DTensor], _, saved: dict) -> dict:
    """A whole model's optimizer.state_dict() -> this rank's. Raises ValueError if it is of another model."""

    def own(value: torch.Tensor, weight: DTensor) -> torch.Tensor:
        if value.shape not in ((), weight.shape):
            raise ValueError("it is of another model")
        height = -(-len(weight) // ranks.WORLD)
        piece = slice(ranks.RANK * height, (ranks.RANK + 1) * height)
        try:
            return value[piece] if value.dim() else value
        except (ValueError, ZeroDivisionError):  # of 8 bits, and not whole blocks
            return value.dequantize()[piece]

    states = zip(saved["state"].items(), weights, strict=False)
    return saved | {"state": {i: {k: own(v, w) for k, v in state.items()} for (i, state), w in states}}
