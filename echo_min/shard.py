"""`--shard true`, for models that do not fit on one card: FSDP2. Every rank keeps a piece of each weight, of
its gradient and of its optimizer states; in an update a layer is whole while it is at work. Checkpoints are
those of one process, which can go on with them, and the other way round."""

from contextlib import contextmanager
from functools import partial

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map
from transformers.modeling_layers import GradientCheckpointingLayer

from echo_min import ranks


def shard(model, device: str):
    """Cut a model up in place, along the first axis of each weight; this rank's pieces move to the device. The
    ranks exchange nothing here. -> the model"""
    mesh = init_device_mesh(torch.device(device).type, (ranks.WORLD,))
    for layer in [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)  # the loss reads the head after the forward pass
    for part in cut(model):
        part.set_gradient_divide_factor(1.0)  # a sum: the loss's weights hold the whole batch's normaliser
        part.set_force_sum_reduction_for_comms(True)
    # policy and sampler call base_model; embedding, last norm and head belong to the model around it
    model.read = model.base_model.forward
    register_fsdp_forward_method(model, "read")
    model.base_model.forward, model.whole = model.read, partial(whole, model)
    return model


def cut(model) -> list[FSDPModule]:
    """The model, then its layers: what is gathered at one time."""
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


@contextmanager
def whole(model):
    """Every rank holds all weights inside. All must enter; then each makes the forward passes that it likes."""
    root, *layers = cut(model)
    for part in (root, *layers):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in (root, *layers):
            part.reshard()
        for layer in layers:
            layer.set_reshard_after_forward(True)


@torch.no_grad()
def gathered(tree):
    """A tree (state_dict) of pieces -> the same of whole tensors on the CPU, on the first rank; all must call
    it. On the others they are None, so that no more than one tensor is there at a time."""
    return tree_map(lambda value: joined(value) if isinstance(value, DTensor) else value, tree)


def joined(value: DTensor):
    own = value.to(value.device_mesh.device_type).to_local()
    floats = own.dequantize() if eight_bit(own) else own.float()
    layout = {"shape": value.shape, "stride": value.stride(), "run_check": False}
    full = DTensor.from_local(floats, value.device_mesh, value.placements, **layout).full_tensor()
    if ranks.RANK:
        return None
    if eight_bit(own):
        kind = type(own).zeros(full.shape, own.signed, own.block_size, "cpu", own.dtype)
        return kind.copy_(full.cpu())
    return full.to("cpu", value.dtype)


def eight_bit(tensor) -> bool:
    """Whether it is a state of AdamW8bit: a byte a number, and a scale for each block of them."""
    return hasattr(tensor, "codes")


def pieces(states: dict, optimizer) -> None:
    """The states of a whole model's optimizer, in place: cut up like its weights. Raises ValueError if they are
    another model's."""
    for weight, state in zip(optimizer.param_groups[0]["params"], states.values(), strict=True):
        for name in [name for name, value in state.items() if value.dim()]:
            if state[name].shape != weight.shape:
                raise ValueError("it is of another model")
            state[name] = piece(state[name], weight, optimizer, signed=name == "exp_avg")


@torch.no_grad()
def piece(full: torch.Tensor, weight: DTensor, optimizer, signed: bool) -> DTensor:
    new = getattr(optimizer, "_new_buffer", lambda like, _: torch.zeros_like(like))(weight, signed)
    height = -(-len(full) // ranks.WORLD)
    full = full.dequantize() if eight_bit(full) else full
    new.to_local().copy_(full[ranks.RANK * height :][:height])
    return new
