"""GRPO: the group's mean reward is the baseline, the policy ratio is clipped; no KL, no critic."""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    """(r - mean) / (std + 1e-6) within each group, unbiased std (paper, section 3).

    rewards[B] float32, groups[B] int64 -> advantages[B] float32, exactly 0 for equal rewards.

    >>> group_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1])).tolist()
    [0.7071057558059692, -0.7071057558059692, 0.0, 0.0]
    """
    advantages = torch.zeros_like(rewards)
    for group in groups.unique():
        members = groups == group
        r = rewards[members]
        if (r != r[0]).any():  # else rounding in the mean would turn equal rewards into noise
            advantages[members] = (r - r.mean()) / (r.std() + 1e-6)
    return advantages


def action_weights(action_mask: Tensor, groups: Tensor, norm: str = "sequence") -> Tensor:
    """Share of each action token in the policy loss. mask[B, T], groups[B] -> float32[B, T], 0 elsewhere.

    sequence: 1 / (B |A_i|), the mean over rollouts of each rollout's token mean: what the released code ran.
    token: 1 / (groups * sum of |A_j| over the group), eq. (2) as printed: the groups' mean of a token mean.
    """
    tokens = action_mask.float().sum(1)  # [B] |A_i|
    names, group = groups.unique(return_inverse=True)
    group_tokens = torch.zeros(len(names)).index_add_(0, group, tokens)  # sum of |A_j| over each group
    share = {"sequence": 1 / (len(tokens) * tokens), "token": 1 / (len(names) * group_tokens[group])}
    return torch.where(action_mask, share[norm][:, None], 0.0)


def grpo_loss(logprobs, sampler_logprobs, advantages, weights, clip_low: float, clip_high: float):
    """Eq. (2): minus the weighted sum of min(ratio * A, clip(ratio, 1 - low, 1 + high) * A) over actions. All
    [N] float32, one entry an action token; weights already hold the normaliser. -> scalar."""
    ratio = (logprobs - sampler_logprobs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -(weights * torch.minimum(ratio * advantages, clipped * advantages)).sum()
