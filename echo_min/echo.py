"""ECHO: next-token cross-entropy on what the terminal wrote, from the policy loss's own forward pass."""

import torch
from torch import Tensor

from echo_min.masking import Role

PREDICTABLE = 0.1  # nats per token: output that the policy knew beforehand


def observation_mask(roles: Tensor, warnings_as_targets: bool = False, parsed_only: bool = False) -> Tensor:
    """O' (paper, section 2): the tokens that the environment loss predicts. roles[B, T] -> bool[B, T].

    warnings_as_targets: the harness's warnings too. parsed_only: none of a rollout with a malformed reply.
    """
    targets, warnings = roles == Role.OBSERVATION, roles == Role.WARNING
    if warnings_as_targets:
        targets |= warnings
    return targets & ~warnings.any(1, keepdim=True) if parsed_only else targets


def observation_weights(roles: Tensor, mask: Tensor, norm: str = "observation") -> Tensor:
    """Share of each target in the environment loss. roles, mask[B, T] -> float32[B, T], 0 outside the mask.

    observation: 1 / (B |O_i|), eq. (3), where |O_i| counts warnings too.
    selected: 1 / (B |O'_i|). global: 1 / sum |O'_i|.
    """
    written = (roles == Role.OBSERVATION) | (roles == Role.WARNING)
    share = {
        "observation": 1 / (len(roles) * written.float().sum(1, keepdim=True)),
        "selected": 1 / (len(roles) * mask.float().sum(1, keepdim=True)),
        "global": 1 / mask.float().sum(),
    }
    return torch.where(mask, share[norm], 0.0)


def echo_loss(logprobs: Tensor, weights: Tensor) -> Tensor:
    """Eq. (3): minus the weighted sum of log p(x_t | x_<t) over the observation targets. Both [N] float32;
    weights already hold the normaliser. -> scalar, nats."""
    return -(weights * logprobs).sum()


def predictable(logprobs: Tensor, mask: Tensor) -> Tensor:
    """logprobs[N] of the targets of mask[B, T] -> bool[B]: rollouts whose output the policy knew beforehand.
    A policy may come to prefer such commands: the paper's collapse (section 4)."""
    nats = torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, -logprobs.detach())
    return nats.sum(1) < PREDICTABLE * mask.sum(1)
