"""Controls: each takes one thing away from what ECHO learns from and leaves the rest as it is.

    python figures/controls.py NAME [train.py's flags]    trains the arm echo under control NAME: runs/NAME
    python figures/controls.py --resume RUN               goes on with such a run

A control is a function (batch, context) -> batch; train.Context says what it may look at. It returns
dataclasses.replace(batch, ...) with other targets, masks or weights, or more rows. A batch in which there is
nothing to change comes back itself; a world in which there never can be is refused. True targets must stay
batch.ids itself: by that train.update knows what the terminal wrote. Numbers put into context.metrics join
the step's line in metrics.jsonl. All randomness is from `noise`, so that a resumed run repeats it.
"""

import random
import sys
from dataclasses import astuple, fields, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from echo_min import cli
from echo_min.batch import Batch, make_batch
from echo_min.config import Config, RunEnded
from echo_min.masking import Role
from echo_min.rollout import Episode
from echo_min.sft import record
from echo_min.worlds.registry import load_tasks
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


def elsewhere(batch: Batch, context: Context) -> Batch:
    """As many tokens of usage lines, but of verbs that no task asks for, in rows of their own: as learnable,
    as many facts, and none that helps. Nothing of the batch's own outputs is predicted.

    Raises ValueError in worlds without other verbs."""
    pool, generator = calls_elsewhere(context.tokenizer, astuple(context.config)), noise(context)
    left, chosen = int(batch.observation_mask.sum()), []
    if not left:
        return batch
    while left > sum(episode.transcript.count(Role.OBSERVATION) for episode in chosen):
        chosen.append(pool[int(torch.randint(len(pool), (), generator=generator))])
    other = make_batch(chosen, context.config)
    marked = other.observation_mask.nonzero()  # [N, 2]
    other.observation_mask[tuple(marked[left:].T)] = False  # of the last row, what is too much
    weights = other.observation_mask * (batch.observation_weights.sum() / left)
    return instead(batch, replace(other, observation_weights=weights))


def instead(batch: Batch, other: Batch) -> Batch:
    """The other's observations are predicted in place of the batch's own, in rows below these; its actions
    are not trained."""
    none = torch.zeros_like(other.action_mask)
    rows = {"action_mask": none, "action_weights": none.float(), "advantages": other.advantages * 0}
    other = replace(other, **rows)
    none = torch.zeros_like(batch.observation_mask)
    own = replace(batch, observation_mask=none, observation_weights=none.float())
    joined = {f.name: below(getattr(own, f.name), getattr(other, f.name)) for f in fields(Batch)}
    return Batch(**joined | {"targets": joined["ids"].clone()})  # not what the terminal told these tasks


def below(upper: Tensor, lower: Tensor) -> Tensor:
    """[B, ...] and [C, ...] -> [B + C, ...], the narrower one padded with zeros on the right."""
    if upper.dim() == 2:
        T = max(upper.shape[1], lower.shape[1])
        upper, lower = (F.pad(part, (0, T - part.shape[1])) for part in (upper, lower))
    return torch.cat([upper, lower])


@cache
def calls_elsewhere(tokenizer, settings: tuple) -> list[Episode]:
    """Wrong calls of verbs of another family. settings: a Config's, in order."""
    config = Config(*settings)
    world = load_tasks(f"{config.tasks},family=linked", False, config.seed)
    rng = random.Random(f"elsewhere {config.seed}")
    scripts = [(task, world.expert(task, rng)[:1]) for task in world.train]
    wrong = [(task, commands) for task, commands in scripts if commands != [task.solution]]
    return record(tokenizer, wrong, replace(config, max_turns=1))


CONTROLS = {
    "placebo": placebo,  # tokens in random order
    "placebo_words": placebo_words,  # telling words shuffled among the outputs
    "placebo_outputs": placebo_outputs,  # outputs exchanged
    "elsewhere": elsewhere,  # usage lines of verbs that no task asks for
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
