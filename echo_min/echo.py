"""ECHO: next-token cross-entropy on what the terminal wrote, from the policy loss's own forward pass."""

import torch


def echo_loss(logprobs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Eq. (3): minus the weighted sum of log p(x_t | x_<t) over the observation targets.

    Both [N] float32; weights already hold the normaliser. -> scalar, nats.
    """
    return -(weights * logprobs).sum()


def permuted_targets(ids: torch.Tensor, selected: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The placebo: the same observation tokens as targets, dealt out at random over the batch's positions.

    ids[B, T] int64, selected[B, T] bool -> targets[B, T]; the model still reads the true ids.
    """
    targets = ids.clone()
    pool = ids[selected]
    targets[selected] = pool[torch.randperm(len(pool), generator=generator).to(pool.device)]
    return targets
