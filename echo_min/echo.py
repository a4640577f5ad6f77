"""ECHO: next-token cross-entropy on what the terminal wrote, from the policy loss's own forward pass."""

import torch

from echo_min.masking import Role

PREDICTABLE = 0.1  # nats per token: output that the policy knew beforehand


def observation_mask(
    roles: torch.Tensor, warnings_as_targets: bool = False, parsed_only: bool = False
) -> torch.Tensor:
    """O' (paper, section 2): the tokens that the environment loss predicts. roles[B, T] -> bool[B, T].

    warnings_as_targets: the harness's warnings too. parsed_only: none of a rollout with a malformed reply.
    """
    warnings = roles == Role.WARNING
    targets = roles == Role.OBSERVATION
    if warnings_as_targets:
        targets |= warnings
    return targets & ~warnings.any(1, keepdim=True) if parsed_only else targets


def observation_weights(roles: torch.Tensor, mask: torch.Tensor, norm: str = "observation") -> torch.Tensor:
    """Share of each target in the environment loss. roles, mask[B, T] -> float32[B, T], 0 outside the mask.

    observation: 1 / (B |O_i|), eq. (3), where |O_i| counts warnings too.
    selected: 1 / (B |O'_i|). global: 1 / sum |O'_i|.
    """
    if norm == "observation":
        written = (roles == Role.OBSERVATION) | (roles == Role.WARNING)
        share = 1 / (len(roles) * written.float().sum(1))
    elif norm == "selected":
        share = 1 / (len(roles) * mask.float().sum(1))
    elif norm == "global":
        share = (1 / mask.float().sum()).expand(len(roles))
    else:
        raise ValueError(f"observation_norm: {norm!r} is not one of observation, selected, global")
    return torch.where(mask, share[:, None], 0.0)


def echo_loss(logprobs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Eq. (3): minus the weighted sum of log p(x_t | x_<t) over the observation targets.

    Both [N] float32; weights already hold the normaliser. -> scalar, nats.
    """
    return -(weights * logprobs).sum()


def predictable(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """logprobs[N] of the targets of mask[B, T] -> bool[B]: rollouts whose output the policy knew beforehand.
    A policy may come to prefer such commands: the paper's collapse (section 4)."""
    nats = torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, -logprobs.detach())
    return nats.sum(1) < PREDICTABLE * mask.sum(1)
