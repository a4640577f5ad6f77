"""The policy's forward pass, one for both losses. It is loaded by checkpoint.py and sampled by sampler.py."""

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from echo_min.harness import MARKERS
from kernels.segment_logprob import dual_segment_logprobs, head_weight


def segment_logprobs(
    model, ids: Tensor, targets: Tensor, action_mask: Tensor, observation_mask: Tensor,
    logit_mb: int = 3072, action_temperature: float = 1.0, observation_temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One forward pass. ids, targets, masks [B, T] -> float32 logprobs (actions[Na], observations[No]),
    each in the order of its mask. Padding must be on the right. logit_mb: MiB of logits held; beyond it they
    are computed again in backward."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:  # it recomputes in training only; what is inside it stays as it is, so no dropout
        layer.training = layer.gradient_checkpointing and torch.is_grad_enabled()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, d]
    for layer in layers:
        layer.training = False  # the sampler keeps its cache
    masks = action_mask.to(ids.device), observation_mask.to(ids.device)
    temperatures = action_temperature, observation_temperature
    head = head_weight(model)
    return dual_segment_logprobs(hidden, head, targets, *masks, *temperatures, logit_bytes=logit_mb << 20)


def marker_ids(tokenizer) -> dict[int, str]:
    """The ids at which a reply ends, and their text."""
    ids = {tokenizer.convert_tokens_to_ids(marker): marker for marker in MARKERS}
    return {i: m for i, m in ids.items() if i is not None and tokenizer.convert_ids_to_tokens(i) == m}
