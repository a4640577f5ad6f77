"""The command line of train.py: settings as flags, Ctrl-C, and every error as one line. Imports no torch, so
that `--help` and a wrong flag answer at once."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

from echo_min.config import Config, RunEnded
from echo_min.presets import PRESETS

ABOUT = "GRPO and ECHO on terminal tasks: a base policy, every arm from it, one picture."


def parse_args(argv: list[str] | None = None) -> tuple[Config, Path]:
    """-> (settings, run folder). A wrong flag or value ends the program with one clear line."""
    usage = "train.py [--preset NAME | --resume RUN] [--SETTING VALUE ...]   (--help lists them)"
    unset = {"allow_abbrev": False, "argument_default": argparse.SUPPRESS}
    parser = argparse.ArgumentParser("train.py", usage, ABOUT, **unset)
    parser.add_argument("--preset", choices=PRESETS, help="where the settings below start [tiny]")
    resume = "go on after the last saved step of this run folder; with --steps N, to another last step"
    parser.add_argument("--resume", type=Path, metavar="RUN", help=resume)
    for f in fields(Config):
        kind = boolean if f.type is bool else f.type
        default = PRESETS["tiny"].get(f.name, f.default)
        help = f"{f.metadata['help']} [{default}]".replace("%", "%%")
        parser.add_argument(f"--{f.name}", type=kind, metavar=kind.__name__, help=help)
    given = vars(parser.parse_args(argv))
    try:
        if "resume" not in given:
            config = Config(**PRESETS[given.pop("preset", "tiny")] | given)
            return config, config.folder
        folder = given.pop("resume")
        if others := given.keys() - {"steps"}:
            raise ValueError(f"--resume takes its settings from the run; remove --{' --'.join(others)}")
        if not (folder / "config.json").is_file():
            raise ValueError(f"--resume: {folder} holds no config.json; it is not a run folder")
        return replace(Config.load(folder / "config.json"), **given), folder
    except ValueError as error:
        parser.error(str(error))


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def run(main: Callable[[Config, Path, threading.Event], None], config: Config, folder: Path) -> None:
    """main(settings, run folder, event set by the first Ctrl-C or SIGTERM), with errors as one line."""
    try:
        with interruptible() as interrupted:
            main(config, folder, interrupted)
    except (ValueError, OSError, RunEnded, KeyboardInterrupt) as error:
        problem = " ".join(str(error).split()) or "interrupted"
        if (folder / "config.json").exists() and not isinstance(error, ValueError):  # nothing to mend first
            script = "figures/controls.py" if config.control else "train.py"
            problem += f"; what is saved stays: python {script} --resume {folder}"
        sys.exit(f"train.py: {problem}")


@contextmanager
def interruptible():
    """-> an event that the first Ctrl-C or SIGTERM sets; a second one raises KeyboardInterrupt."""
    interrupted = threading.Event()

    def on_signal(*_) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()
        os.write(2, b"\nends after this step; once more ends now\n")  # print may be at work

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
