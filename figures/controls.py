"""Controls: each takes one thing away from what ECHO learns from and leaves the rest as it is.

    python figures/controls.py NAME [train.py's flags]    trains the arm echo under control NAME: runs/NAME
    python figures/controls.py --resume RUN               goes on with such a run

A control is a function (batch, context) -> batch; train.Context says what it may look at. It returns
dataclasses.replace(batch, ...) with other targets, masks or weights, or more rows. A batch in which there is
nothing to change comes back itself; a world in which there never can be is refused. True targets must stay
batch.ids itself: by that train.update knows what the terminal wrote. Numbers put into context.metrics join
the step's line in metrics.jsonl. All randomness is from `noise`, so that a resumed run repeats it.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from echo_min import cli
from echo_min.batch import Batch
from echo_min.config import RunEnded
from train import Context

PATIENCE = 10  # batches at the start of a run, one of which a control must change


def noise(context: Context) -> torch.Generator:
    return torch.Generator().manual_seed(context.config.seed * 1_000_003 + context.step)


def with_targets(batch: Batch, context: Context, targets: Tensor, **new: Tensor) -> Batch:
    """The batch with these targets, and the share of them that are true all the same in the metrics. If all
    are true, the batch itself."""
    if torch.equal(targets, batch.ids):
        return batch
    changed = replace(batch, targets=targets, **new)
    true = (targets == batch.ids)[changed.observation_mask]
    context.metrics["true_targets"] = true.float().mean().item()
    return changed


def placebo(batch: Batch, context: Context) -> Batch:
    """The same tokens, dealt out at random: neither form nor information is left."""
    targets, mask = batch.ids.clone(), batch.observation_mask
    pool = batch.ids[mask]  # [N]
    targets[mask] = pool[torch.randperm(len(pool), generator=noise(context))]
    return with_targets(batch, context, targets)


def placebo_words(batch: Batch, context: Context) -> Batch:
    """The words that tell what to do, dealt out at random over their places in the batch's outputs: form
    stays, information goes. A word changes places with words of as many tokens.

    Raises ValueError if the world names no such words."""
    if not context.telling:
        raise ValueError(f"control placebo_words: {context.config.tasks} names no telling words to exchange")
    forms = [form for word in context.telling for form in (word, f" {word}")]
    words = [context.tokenizer.encode(form, add_special_tokens=False) for form in forms]
    targets, left, generator = batch.ids.clone(), batch.observation_mask.clone(), noise(context)
    for n in sorted(set(map(len, words)), reverse=True):
        rows, places = occurrences(batch.ids, left, [word for word in words if len(word) == n])
        found = batch.ids[rows, places]  # [N, n]
        targets[rows, places] = found[torch.randperm(len(found), generator=generator)]
        left[rows, places] = False
    return with_targets(batch, context, targets)


def occurrences(ids: Tensor, mask: Tensor, words: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Where one of the words, of n tokens each, stands within mask[B, T]. -> rows[N, 1], positions[N, n]"""
    n = len(words[0])
    if n > ids.shape[1]:
        return torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, n, dtype=torch.int64)
    windows = ids.unfold(1, n, 1)[:, :, None] == torch.tensor(words)  # [B, T - n + 1, words, n]
    starts = (windows.all(3).any(2) & mask.unfold(1, n, 1).all(2)).nonzero()  # [N, 2]
    return starts[:, :1], starts[:, 1:] + torch.arange(n)


def placebo_outputs(batch: Batch, context: Context) -> Batch:
    """Each output's targets are another's, drawn among those that differ: well-formed, of another command.

    Where the other one is shorter, the end has no target; what is left takes over its weight, so that every
    output keeps the weight that it has in ECHO."""
    spans, generator = outputs(batch.observation_mask), noise(context)
    texts = [batch.ids[b, first:end].tolist() for b, first, end in spans]
    targets, mask, weights = (
        batch.ids.clone(),
        batch.observation_mask.clone(),
        batch.observation_weights.clone(),
    )
    for (b, first, end), text in zip(spans, texts, strict=True):
        # an output that begins with all of the other differs nowhere that counts
        others = [other for other in texts if any(x != y for x, y in zip(text, other, strict=False))]
        if others:
            other = others[int(torch.randint(len(others), (), generator=generator))]
            n = min(len(text), len(other))
            targets[b, first : first + n] = torch.tensor(other[:n])
            weights[b, first : first + n] *= len(text) / n
            mask[b, first + n : end], weights[b, first + n : end] = False, 0.0
    new = {"observation_mask": mask, "observation_weights": weights}
    return with_targets(batch, context, targets, **new)


def outputs(mask: Tensor) -> list[tuple[int, int, int]]:
    """The runs of mask[B, T]: (row, first position, position after the last)."""
    edges = F.pad(mask.int(), (1, 1)).diff(dim=1)  # 1 where a run begins, -1 after its end
    firsts, ends = (edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist()
    return [(b, first, end) for (b, first), (_, end) in zip(firsts, ends, strict=True)]


CONTROLS = {
    "placebo": placebo,  # tokens in random order
    "placebo_words": placebo_words,  # telling words exchanged
    "placebo_outputs": placebo_outputs,  # outputs exchanged
}


def named(name: str):
    """The control, or None for "". Raises RunEnded if the first PATIENCE batches of a run pass it unchanged:
    that run would be plain ECHO."""
    if not name:
        return None
    changed = False

    def control(batch: Batch, context: Context) -> Batch:
        nonlocal changed
        after = CONTROLS[name](batch, context)
        changed |= after is not batch
        if not changed and context.step == PATIENCE - 1:
            nothing = f"found nothing to change in {PATIENCE} batches of {context.config.tasks}"
            raise RunEnded(f"control {name}: {nothing}; this run is plain ECHO")
        return after

    return control


def main(arguments: list[str]) -> None:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        sys.exit(print(f"{__doc__}\nNAME: {', '.join(CONTROLS)}"))
    if name in CONTROLS:
        flags = ["--name", name, "--arms", "echo", *arguments[1:], "--control", name]
    elif name.startswith("--resume"):
        flags = arguments
    else:
        sys.exit(f"controls.py: {name!r} is no control; there is {', '.join(CONTROLS)}")
    config, folder = cli.parse_args(flags)
    if config.arms != "echo" or config.control not in CONTROLS:
        has = f"{folder} has the arms {config.arms} and the control {config.control!r}"
        sys.exit(f"controls.py: {has}; it takes the arm echo and one of {', '.join(CONTROLS)}")
    cli.run(partial(train.main, control=named(config.control)), config, folder)


if __name__ == "__main__":
    main(sys.argv[1:])
