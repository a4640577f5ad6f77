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
    """The batch with other targets, and the share of them that are true all the same in the metrics."""
    changed = replace(batch, targets=targets, **new)
    true = (targets == batch.ids)[changed.observation_mask]
    context.metrics["true_targets"] = true.float().mean().item()
    return changed


def dealt_out(batch: Batch, context: Context, selected: Tensor) -> Batch:
    """The targets at the selected positions, bool[B, T], in random order over all of these positions."""
    pool = batch.ids[selected]  # [N]
    if len(pool.unique()) < 2:
        return batch
    targets = batch.ids.clone()
    targets[selected] = pool[torch.randperm(len(pool), generator=noise(context))]
    return with_targets(batch, context, targets)


def placebo(batch: Batch, context: Context) -> Batch:
    """The same tokens, dealt out at random: neither form nor information is left."""
    return dealt_out(batch, context, batch.observation_mask)


def placebo_words(batch: Batch, context: Context) -> Batch:
    """The words that tell what to do, exchanged between outputs: form stays, information goes.

    Raises ValueError if the world names no such words."""
    if not context.telling:
        raise ValueError(f"control placebo_words: {context.config.tasks} names no telling words to exchange")
    forms = [form for word in context.telling for form in (word, f" {word}")]
    words = [context.tokenizer.encode(form, add_special_tokens=False) for form in forms]
    return dealt_out(batch, context, occurrences(batch.ids, batch.observation_mask, words))


def occurrences(ids: Tensor, mask: Tensor, words: list[list[int]]) -> Tensor:
    """Where one of the words stands, all of its tokens within mask[B, T]. -> bool[B, T]"""
    found = torch.zeros_like(mask)
    for word in words:
        n = len(word)
        if n <= ids.shape[1]:
            windows = ids.unfold(1, n, 1) == torch.tensor(word)  # [B, T - n + 1, n]
            starts = (windows & mask.unfold(1, n, 1)).all(2)
            for i in range(n):
                found[:, i : i + starts.shape[1]] |= starts
    return found


def placebo_outputs(batch: Batch, context: Context) -> Batch:
    """Each output's targets are another's, drawn among those that differ: well-formed, of another command.

    Where the other one is shorter, the end has no target; what is left takes over its weight, so that every
    output keeps the weight that it has in ECHO."""
    spans = outputs(batch.observation_mask)
    texts = [tuple(batch.ids[b, first:end].tolist()) for b, first, end in spans]
    if len(set(texts)) < 2:
        return batch
    targets, mask, weights = (
        x.clone() for x in (batch.ids, batch.observation_mask, batch.observation_weights)
    )
    generator = noise(context)
    for (b, first, end), text in zip(spans, texts, strict=True):
        others = [other for other in texts if other != text]
        other = others[int(torch.randint(len(others), (), generator=generator))]
        n = min(len(text), len(other))
        targets[b, first : first + n] = torch.tensor(other[:n])
        mask[b, first + n : end] = False
        weights[b, first : first + n] *= len(text) / n
        weights[b, first + n : end] = 0.0
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
