"""The command line of train.py: settings as flags, Ctrl-C, and every error as one line. Imports no torch, so
that `--help` and a wrong flag answer at once."""

import argparse
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
    parser = argparse.ArgumentParser("train.py", usage, ABOUT, allow_abbrev=False)
    first = PRESETS["tiny"]
    parser.add_argument("--preset", choices=PRESETS, help="where the settings below start [tiny]")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on after its last saved step; with"
                        " --steps N, to another last step")  # fmt: skip
    for f in fields(Config):
        kind = boolean if f.type is bool else f.type
        help = f"{f.metadata['help']} [{first.get(f.name, f.default)}]".replace("%", "%%")
        options = {"type": kind, "metavar": kind.__name__, "default": argparse.SUPPRESS, "help": help}
        parser.add_argument(f"--{f.name}", **options)
    given = vars(parser.parse_args(argv))
    resume, preset = given.pop("resume"), given.pop("preset")
    try:
        if resume is None:
            config = Config(**PRESETS[preset or "tiny"] | given)
            return config, config.folder
        given |= {"preset": preset} if preset else {}
        if given.keys() - {"steps"}:
            raise ValueError(f"--resume takes its settings from the run; remove --{' --'.join(given)}")
        if not (resume / "config.json").is_file():
            raise ValueError(f"--resume: {resume} holds no config.json; it is not a run folder")
        return replace(Config.load(resume / "config.json"), **given), resume
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
        saved = any(folder.glob("*/step-*")) or (folder / "base").exists()
        saved |= isinstance(error, RunEnded) and (folder / "config.json").exists()  # to be edited
        script = "figures/controls.py" if config.control else "train.py"
        hint = f"\nWhat is saved stays: python {script} --resume {folder}" if saved else ""
        sys.exit(f"train.py: {str(error) or 'interrupted'}{hint}")


@contextmanager
def interruptible():
    """-> an event that the first Ctrl-C or SIGTERM sets; a second one raises KeyboardInterrupt."""
    interrupted, signals = threading.Event(), (signal.SIGINT, signal.SIGTERM)

    def on_signal(*_) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()
        print("\nends after this step; once more ends now", file=sys.stderr)

    before = [signal.signal(number, on_signal) for number in signals]
    try:
        yield interrupted
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
