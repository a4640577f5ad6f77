"""ECHO: next-token cross-entropy on what the terminal wrote, from the policy loss's own forward pass."""

import torch


def echo_loss(logprobs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Eq. (3): minus the weighted sum of log p(x_t | x_<t) over the observation targets.

    Both [N] float32; weights already hold the normaliser. -> scalar, nats.
    """
    return -(weights * logprobs).sum()


def permuted_targets(ids: torch.Tensor, selected: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The placebo: the same observation tokens as targets, dealt out at random over the batch's positions.

    ids[B, T] int64, selected[B, T] bool -> targets[B, T]; the model still reads the true ids. With `selected`
    narrowed to the words that tell what to do, form stays and information goes.
    """
    targets = ids.clone()
    pool = ids[selected]
    targets[selected] = pool[torch.randperm(len(pool), generator=generator).to(pool.device)]
    return targets


def exchanged_targets(
    ids: torch.Tensor, selected: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A milder placebo: each output's targets are the tokens of another command's output, in their order.

    Outputs are the runs of `selected`. -> (targets[B, T], selected[B, T]); of the longer of two outputs the
    end has no counterpart and is no target.
    """
    edge = torch.diff(selected.int(), prepend=torch.zeros_like(selected[:, :1]).int()) == 1
    run = (edge.flatten().cumsum(0) * selected.flatten())[selected.flatten()]  # [N] from 1, in order
    outputs = [ids[selected][run == r] for r in range(1, int(run.max()) + 1)] if len(run) else []
    targets, kept = ids.clone(), selected.clone()
    new, keep = [], []
    for own, other in zip(outputs, torch.randperm(len(outputs), generator=generator).tolist(), strict=True):
        n = min(len(own), len(outputs[other]))
        new.append(torch.cat([outputs[other][:n], own[n:]]))
        keep.append(torch.arange(len(own), device=ids.device) < n)
    if outputs:
        targets[selected], kept[selected] = torch.cat(new), torch.cat(keep)
    return targets, kept
