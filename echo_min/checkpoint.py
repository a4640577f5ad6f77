"""Load, save and resume. A checkpoint is a folder in Hugging Face format with the optimizer's state.

All randomness is keyed by (seed, step, ...), so weights, optimizer and step are the whole state of a run.
"""

import fcntl
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

from echo_min.config import Config
from echo_min.harness import END
from echo_min.machine import ran_out
from echo_min.optimizer import make_optimizer
from echo_min.policy import marker_ids
from kernels.segment_logprob import head_weight

logging.disable_progress_bar()


def located(name: str) -> tuple[str, dict]:
    """A folder, a Hugging Face name, or a package with a GGUF file -> what from_pretrained takes."""
    if name.isidentifier() and not Path(name).exists() and (package := find_spec(name)):
        name = next(iter(package.submodule_search_locations or [name]))
    files = sorted(Path(name).glob("*.gguf"))
    return name, {"gguf_file": files[0].name} if files else {}


def load_policy(
    name: str | Path, device: str = "cpu", dtype: str = "float32", gradient_checkpointing: bool = False
):
    """-> (model, tokenizer) from a folder, a Hugging Face name, or an installed package with a GGUF file.

    Raises ValueError saying what is wrong.
    """
    source, options = located(str(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if options:  # weights to train, not the blocks of few bits that the file holds
            options["quantization_config"] = GgufConfig(dequantize=True)
        model, found = AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, dtype), output_loading_info=True, **options
        )
    except Exception as error:  # foreign files: every kind of error comes out of them
        if ran_out(error):
            raise
        reason = str(error).strip().split("\n")[0]
        problem = f"{name}: neither a checkpoint folder nor a model that can be fetched ({reason})"
        raise ValueError(problem) from None
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{name}: no weights for {len(missing)} parameters ({missing[0]}, ...)")
    if missing := {END, "<|im_start|>"} - set(marker_ids(tokenizer).values()):
        raise ValueError(f"{name}: its tokenizer has no {' '.join(missing)}; only ChatML models will do")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise ValueError(f"{name}: its tokenizer has more tokens ({len(tokenizer)}) than its embedding")
    try:
        head_weight(model)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from None
    if gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.to(device), tokenizer


@contextmanager
def only_writer(folder: Path):
    """Nobody else may write to this run folder meanwhile; what a killed writer left half done is removed.

    Raises ValueError if another process is at work in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is writing to this run") from None
        for half in folder.rglob("*.tmp"):
            shutil.rmtree(half) if half.is_dir() else half.unlink()
        yield


def claim(folder: Path, config: Config) -> None:
    """Make `folder` the folder of this run. Raises ValueError if it holds a run with other settings; one that
    ended before it left anything holds none. A run may be given another last step."""
    path = folder / "config.json"
    if path.exists() and {file.name for file in folder.iterdir()} - {"config.json", "lock"}:
        old, new = asdict(Config.load(path)), asdict(config)
        if changed := [name for name in new if old[name] != new[name] and name != "steps"]:
            raise ValueError(f"{folder} holds a run with another {', '.join(changed)}: pass a new --name")
    config.save(path)


def publish(model, tokenizer, folder: Path, config: Config, **extra) -> None:
    """Write the policy to `folder`, which appears complete or not at all, with the Config it was made under.
    extra: name -> object, saved as name.pt. Raises OSError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(new, ignore_errors=True)
    try:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        config.save(new / "echo_min.json")
        for name, state in extra.items():
            torch.save(state, new / f"{name}.pt")
        for file in filter(Path.is_file, new.rglob("*")):  # on disk before the rename that makes it the truth
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    except Exception as error:  # a full disk has another name in each of these libraries
        shutil.rmtree(new, ignore_errors=True)
        raise OSError(f"{folder}: could not be written: {error}") from error
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(new, folder)


def restore(folder: Path, arm: str, config: Config):
    """-> (steps done, model, tokenizer, optimizer) of an arm's newest checkpoint, or None steps and the base.
    Lines of metrics.jsonl and page.jsonl that came after it are dropped. Raises ValueError, saying what can't
    be read."""
    found = latest(folder / arm)
    done, path = found or (None, folder / "base" if config.makes_base else config.model)
    model, tokenizer = load_policy(path, config.device, config.dtype, config.gradient_checkpointing)
    optimizer = make_optimizer(model, config)
    if found:
        restore_optimizer(path, optimizer)
    last = -1 if done is None else done
    for name in ("metrics.jsonl", "page.jsonl"):
        truncate_metrics(folder / name, lambda r: r.get("arm") != arm or r["step"] <= last)
    return done, model, tokenizer, optimizer


def save(arm: Path, step: int, model, tokenizer, optimizer, config: Config) -> None:
    """Checkpoint after `step` completed steps; the one before is removed only when the new one is whole."""
    folder = arm / f"step-{step:06d}"
    publish(model, tokenizer, folder, config, optimizer=optimizer.state_dict())
    for old in arm.glob("step-*"):
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)


def latest(arm: Path) -> tuple[int, Path] | None:
    """-> (completed steps, folder) of the newest whole checkpoint of an arm, if there is one."""
    return max(((int(f.name[5:]), f) for f in arm.glob("step-*") if f.name[5:].isdigit()), default=None)


def restore_optimizer(folder: Path, optimizer) -> None:
    """Load the state saved in a checkpoint. Raises ValueError if it is not one of ours."""
    try:
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))
    except Exception as error:  # a foreign or torn file
        if ran_out(error):
            raise
        raise ValueError(f"{folder}: not a checkpoint to resume from: optimizer.pt: {error}") from None


def truncate_metrics(path: Path, keep) -> None:
    """Drop the lines for which keep(line as a dict) is false, and a last line that a kill cut short.

    Raises ValueError naming any other line that is not JSON.
    """
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not JSON; mend or remove it, then resume") from None
        if keep(record):
            kept.append(line if line.endswith("\n") else line + "\n")
    new = path.with_suffix(".tmp")
    new.write_text("".join(kept))
    os.replace(new, path)
