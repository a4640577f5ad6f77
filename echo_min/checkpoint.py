"""Save and resume. A checkpoint is a folder in Hugging Face format plus the optimizer's state and the step.

All randomness is keyed by (seed, step, ...), so weights, optimizer and step are the whole state of a run.
"""

import fcntl
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch

from echo_min.config import Config
from echo_min.policy import enough_memory, ran_out


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


@enough_memory("loading of the model")
def restore_optimizer(folder: Path, optimizer) -> None:
    """Load the state saved in a checkpoint. Raises ValueError if it is not one of ours, RunEnded if memory
    runs out."""
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
