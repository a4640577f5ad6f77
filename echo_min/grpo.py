"""GRPO: the group's mean reward is the baseline, the policy ratio is clipped; no KL, no critic."""

import torch


def group_advantages(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
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


def grpo_loss(logprobs, old_logprobs, advantages, weights, clip_low: float, clip_high: float) -> torch.Tensor:
    """Eq. (2): minus the weighted sum of min(ratio * A, clip(ratio, 1 - low, 1 + high) * A) over actions.

    All [N] float32, one entry an action token; weights already hold the normaliser. -> scalar.
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -(weights * torch.minimum(ratio * advantages, clipped * advantages)).sum()
