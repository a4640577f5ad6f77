"""How much code one training step is, ours and TRL's: `python figures/trl_lines.py`.

One step of each is run under a profiler that notes every Python function entered, in every thread. Counted
are the functions' lines without blank ones, each once, comments and docstrings included, with those of the
loop around the step; and all such lines of the files that hold them. Of torch, the standard library and other
packages nothing is counted. Both need transformers' model and tokenizer, this library's roles and terminals.
"""

import argparse
import inspect
import sys
import tempfile
import threading
from pathlib import Path
from types import CodeType

import common
import torch
import trl_echo
from transformers import PrinterCallback, Trainer, TrainerCallback
from trl_speed import SETTINGS, Ours

import train
from echo_min.config import Config
from echo_min.terminals import bubblewrap

PACKAGES = "trl", "transformers", "accelerate"


def watch(codes: set[CodeType] | None) -> None:
    """From here on note the code of each function that is entered, in new threads too; or no longer."""
    while bubblewrap._kept:  # both sides open their terminals anew
        bubblewrap._kept.pop().close()

    def see(frame, event, _):
        if event == "call":
            codes.add(frame.f_code)

    threading.setprofile(see if codes is not None else None)
    sys.setprofile(see if codes is not None else None)


class Watch(TrainerCallback):
    codes = {Trainer._run_epoch.__code__}  # noqa: RUF012

    def on_step_begin(self, *_, **__):
        watch(self.codes)

    def on_step_end(self, *_, **__):
        watch(None)


def lines(codes: set[CodeType]) -> set[tuple[str, str, int]]:
    """-> (package, file, line number)"""
    found = set()
    for code in codes:
        path = Path(code.co_filename)
        package = next((part for part in path.parts if part in PACKAGES), "")
        if path.name in ("trl_echo.py", "trl_speed.py", "trl_lines.py"):
            package = "trl_echo.py" if path.name == "trl_echo.py" else ""
        elif path.is_relative_to(common.ROOT) and "site-packages" not in path.parts:
            package = "this library"
        if package:
            source, first = inspect.getsourcelines(code)
            found |= {(package, str(path), first + i) for i, line in enumerate(source) if line.strip()}
    return found


def main() -> None:
    config = Config(**SETTINGS)
    base, world = common.from_base(config).model, common.world_of(config)
    tasks = train.pick_tasks(world.train, 0, config)
    with tempfile.TemporaryDirectory() as folder:
        prompts = [task.instruction for task in tasks]
        trainer = trl_echo.trl_trainer(base, prompts, world.train, config, folder)
        trainer.add_callback(Watch)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    ours, codes = Ours(base, [tasks], config), {train.train_arm.__code__, train.train_step.__code__}
    watch(codes)
    ours.step(0)
    watch(None)
    print("| lines that one step enters | ours | whole files | TRL | whole files |\n|---|--:|--:|--:|--:|")
    sides = lines(codes), lines(Watch.codes)
    for name in ("this library", "trl_echo.py", *PACKAGES, "all"):
        cells = []
        for side in sides:
            part = [line for line in side if name in (line[0], "all")]
            files = {Path(path).read_text() for _, path, _ in part}
            cells += [len(part), sum(bool(line.strip()) for text in files for line in text.splitlines())]
        print(f"| {name} |", " | ".join(map(str, cells)), "|")
    for name, side in zip(("ours", "TRL"), sides, strict=True):
        print(f"{name}: {' '.join(sorted({Path(path).name for p, path, _ in side if p != 'transformers'}))}")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    main()
