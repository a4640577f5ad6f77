"""The optimizer: AdamW, or AdamW for bfloat16 weights whose small updates must not be rounded away.

A bfloat16 number has 8 significant bits: rounding to the nearest loses an update below 1/512 of its weight,
every time. Rounded up or down at random, with the chance that the remainder says, it is kept on average, and
no float32 copy of the weights is needed. AdamW's two means take one byte a weight each, not two or four."""

import torch

from echo_min.config import Config, RunEnded


def make_optimizer(model, config: Config) -> torch.optim.Optimizer:
    """AdamW over all weights; its learning rate is set by each step. Raises RunEnded without torchao."""
    options = {"betas": (config.beta1, config.beta2), "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        fused = next(model.parameters()).is_cuda or None  # one pass over the weights, no copies of them
        return torch.optim.AdamW(model.parameters(), fused=fused, **options)
    try:
        from torchao.optim import AdamW8bit  # also makes its states known to torch.load
    except ImportError as error:
        raise RunEnded(f"optimizer: adamw8bit needs torchao: pip install '.[gpu]' ({error})") from None
    return AdamW8bit(model.parameters(), bf16_stochastic_round=True, **options)


def optimizer_step(optimizer, learning_rate: float, seed: int) -> None:
    """One step, and the gradients are gone. seed decides the rounding, so a resumed run rounds alike."""
    group = optimizer.param_groups[0]
    if isinstance(group["lr"], torch.Tensor):  # adamw8bit: an argument of a compiled step
        group["lr"].fill_(learning_rate)
        torch.manual_seed(seed)  # nothing else in a run draws from torch's own generator
    else:
        group["lr"] = learning_rate
    states_to_device(optimizer, lambda weight: weight.device)
    optimizer.step()
    states_to_device(optimizer, lambda weight: "cpu")  # room for activations, and for the sampler's cache
    optimizer.zero_grad()


def states_to_device(optimizer, device_for) -> None:
    """Move AdamW's means; its counts of steps stay where they are. On a CPU nothing moves."""
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            state[name] = value.to(device_for(weight)) if value.dim() else value
