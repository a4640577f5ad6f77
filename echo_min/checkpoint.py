"""Load, save and resume. A checkpoint is a folder in Hugging Face format with the optimizer's state.

All randomness is keyed by (seed, step, ...), so weights, optimizer and step are the whole state of a run.
On the same hardware it repeats bit for bit where its commands do: `a & b` prints in either order.
"""

import fcntl
import json
import os
import shutil
import sys
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

from echo_min import ranks
from echo_min.config import Config
from echo_min.harness import END
from echo_min.machine import ran_out
from echo_min.optimizer import make_optimizer
from echo_min.policy import marker_ids
from echo_min.report import first_alone
from kernels.segment_logprob import head_weight

logging.disable_progress_bar()
MAY_CHANGE = """name device threads terminals allow_network prefill_tokens micro_batch_tokens logit_mb
    gradient_checkpointing shard steps save_every eval_every tracker""".split()  # where, how long, what fits
OF_BASE = """seed tasks harness max_turns max_action_tokens output_chars context model format_stage
    base_demonstrations base_steps base_batch base_learning_rate base_observation_weight""".split()


@contextmanager
def foreign(what: str):
    """The errors of every kind that foreign and torn files raise, as ValueError: one line, `what` first."""
    try:
        yield
    except Exception as error:
        if ran_out(error):
            raise
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{what}: {reason}") from None


def located(name: str) -> tuple[str, dict]:
    """A folder, a Hugging Face name, or a package with a GGUF file -> what from_pretrained takes."""
    if name.isidentifier() and not Path(name).exists() and (package := find_spec(name)):
        name = next(iter(package.submodule_search_locations or [name]))
    files = sorted(Path(name).glob("*.gguf"))
    return name, {"gguf_file": files[0].name} if files else {}


def load_policy(name: str | Path, device="cpu", dtype="float32", gradient_checkpointing=False):
    """-> (model, tokenizer) from a folder, a Hugging Face name, or an installed package with a GGUF file.
    Raises ValueError saying what is wrong."""
    source, options = located(str(name))
    with foreign(f"{name}: neither a checkpoint folder nor a model that can be fetched"):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if options:  # weights to train, not the blocks of few bits that the file holds
            options["quantization_config"] = GgufConfig(dequantize=True)
        options |= {"dtype": getattr(torch, dtype), "output_loading_info": True}
        model, found = AutoModelForCausalLM.from_pretrained(source, **options)
    with foreign(str(name)):
        head_weight(model)
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"no weights for {len(missing)} parameters ({missing[0]}, ...)")
        if missing := {END, "<|im_start|>"} - set(marker_ids(tokenizer).values()):
            raise ValueError(f"its tokenizer has no {' '.join(missing)}; only ChatML models will do")
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            raise ValueError(f"its tokenizer has more tokens ({len(tokenizer)}) than its embedding")
    if gradient_checkpointing:
        recompute_activations(model)
    return model.to(device), tokenizer


def recompute_activations(model) -> None:
    """A layer's activations are computed again in backward, not held."""
    names = "activation_checkpointing_enable", "gradient_checkpointing_enable"  # now, and in 5.19
    next(getattr(model, name) for name in names if hasattr(model, name))({"use_reentrant": False})


def restore_optimizer(folder: Path, optimizer) -> None:
    """Load the state saved in a checkpoint. Raises ValueError if it is not one of this model's."""
    with foreign(f"{folder}: not a checkpoint to resume from: optimizer.pt"):
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))
        for weight, state in optimizer.state.items():
            if not weight.shape == state["exp_avg"].shape == state["exp_avg_sq"].shape:
                raise ValueError("it is of another model")


@contextmanager
def in_turn():
    """The first rank goes through the block before the others do."""
    if ranks.RANK:
        ranks.gather([])
    yield
    if not ranks.RANK:
        ranks.gather([])


@contextmanager
def only_writer(folder: Path):
    """Removes what a killed writer left half done. Raises ValueError if another process is at work here."""
    if ranks.RANK:  # the first has the lock
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is writing to this run") from None
        for half in folder.rglob("*.tmp"):
            shutil.rmtree(half) if half.is_dir() else half.unlink()
        yield


@first_alone
def claim(folder: Path, config: Config) -> None:
    """Make `folder` this run's. ValueError if it has more steps or, MAY_CHANGE apart, other settings."""
    for path in sorted(folder.rglob("echo_min.json")):
        old, new = asdict(Config.load(path)), asdict(config)
        fixed = OF_BASE if path.parent.name == "base" else new.keys() - set(MAY_CHANGE)
        if was := [f"{k} {old[k]!r}" for k in new if k in fixed and old[k] != new[k]]:
            raise ValueError(f"{path.parent} was made with {', '.join(was)}: keep that, or pass a new --name")
    for arm in config.arms.split(","):
        if (found := latest(folder / arm)) and found[0] > config.steps:
            raise ValueError(f"steps: {config.steps} is less than {folder / arm} has done, {found[0]}")
    config.save(folder / "config.json")


def publish(model, tokenizer, folder: Path, config: Config, weights=None, optimizer_state=None) -> None:
    """Write the policy to `folder`, which appears complete or not at all, with the Config it was made under.
    weights: the model's state_dict, if there is one already. Raises OSError."""
    new = folder.with_name(folder.name + ".tmp")
    try:
        model.save_pretrained(new, state_dict=weights)
        tokenizer.save_pretrained(new)
        config.save(new / "echo_min.json")
        if optimizer_state:
            torch.save(optimizer_state, new / "optimizer.pt")
        for file in filter(Path.is_file, new.rglob("*")):  # on disk before the rename that makes it the truth
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(new, folder)
    except Exception as error:  # a full disk has another name in each of these libraries
        raise OSError(f"{folder}: could not be written: {error}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def save(arm: Path, step: int, model, tokenizer, optimizer, config: Config) -> None:
    """Checkpoint after `step` completed steps; once it is whole, only the one before stays beside it."""
    state = model.state_dict(), optimizer.state_dict()  # sharded, it takes all ranks to tell it to the first
    if ranks.RANK == 0:
        publish(model, tokenizer, arm / f"step-{step:06d}", config, *state)
        for _, old in checkpoints(arm)[:-2]:
            shutil.rmtree(old, ignore_errors=True)


def checkpoints(arm: Path) -> list[tuple[int, Path]]:
    """-> (completed steps, folder) of each, the newest last."""
    return sorted((int(f.name[5:]), f) for f in arm.glob("step-*") if f.name[5:].isdecimal())


def latest(arm: Path) -> tuple[int, Path] | None:
    return max(checkpoints(arm), default=None)


def restore(folder: Path, arm: str, config: Config):
    """-> (steps done, model, tokenizer, optimizer) of an arm's newest checkpoint, or None steps and the base.
    One that can't be read is set aside, with a warning, for the one before. Raises ValueError if none can, or
    if metrics.jsonl does not tell of every step done; what it tells of later ones is dropped."""
    saved, torn = checkpoints(folder / arm), {}
    for done, path in saved[::-1] or [(None, folder / "base" if config.makes_base else config.model)]:
        try:
            where = "cpu" if config.shard else config.device
            model, tokenizer = load_policy(path, where, config.dtype, config.gradient_checkpointing)
            if config.shard:
                from echo_min import shard  # seldom needed

                shard.cut_up(model, config.device)
            optimizer = (shard.make_optimizer_of_pieces if config.shard else make_optimizer)(model, config)
            if saved:
                restore_optimizer(path, optimizer)
        except ValueError as error:
            torn[path] = str(error)
            continue
        for bad, problem in torn.items():
            print(f"warning: {problem}; set aside as torn-{bad.name}, {path} goes on", file=sys.stderr)
            bad.rename(bad.with_name(f"torn-{bad.name}"))
        keep_history(folder, arm, -1 if done is None else done)
        return done, model, tokenizer, optimizer
    anew = f": put one back, or delete {folder / arm} to train this arm anew" if saved else ""
    raise ValueError("; ".join(torn.values()) + anew)


@first_alone
def keep_history(folder: Path, arm: str, last: int) -> None:
    """Drop an arm's lines of metrics.jsonl and page.jsonl after step `last`. Raises ValueError if an earlier
    one of metrics.jsonl is lost."""
    page, path = folder / "page.jsonl", folder / "metrics.jsonl"
    _, kept = (truncate_metrics(f, lambda r: (r["step"] <= last) | (r["arm"] != arm)) for f in (page, path))
    if lost := set(range(last + 1)) - {r["step"] for r in kept if r["arm"] == arm}:
        what = f"{path}: the line of {arm}'s step {min(lost)} is missing"
        raise ValueError(f"{what}: put it back, or delete {folder / arm} to train this arm anew")


def truncate_metrics(path: Path, keep) -> list[dict]:
    """Drop the lines for which keep(line as a dict) is false, and a last one that a kill cut. -> the rest.
    Raises ValueError naming a line that is not JSON, or lacks what `keep` reads."""
    if not path.exists():
        return []
    lines, kept = path.read_bytes().split(b"\n"), []  # the last is empty, or cut short
    for number, line in enumerate(lines, 1):
        try:
            if keep(record := json.loads(line)):
                kept.append((line + b"\n", record))
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                odd = f"{path}, line {number}: not JSON, or lacks a field"
                raise ValueError(f"{odd}; mend or remove it, then go on") from None
    path.with_suffix(".tmp").write_bytes(b"".join(line for line, _ in kept))
    path.with_suffix(".tmp").replace(path)
    return [record for _, record in kept]
