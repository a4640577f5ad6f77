"""The command lines. train.py: settings as flags, Ctrl-C, and every error as one line. Imports no torch, so
that `--help` and a wrong flag answer at once."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from echo_min.config import Config, RunEnded
from echo_min.presets import PRESETS

# for torch, which is not loaded yet: rollouts and updates take turns, with blocks of different sizes
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
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
            return several_if_sharded(config), Path("runs", config.name)
        folder = given.pop("resume")
        if others := given.keys() - {"steps"}:
            raise ValueError(f"--resume takes its settings from the run; remove --{' --'.join(others)}")
        if not (folder / "config.json").is_file():
            raise ValueError(f"--resume: {folder} holds no config.json; it is not a run folder")
        return several_if_sharded(replace(Config.load(folder / "config.json"), **given)), folder
    except ValueError as error:
        parser.error(str(error))


def several_if_sharded(config: Config) -> Config:
    if config.shard and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        raise ValueError("--shard needs several processes: torchrun --nproc-per-node N train.py ...")
    return config


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def run(main: Callable[[Config, Path, threading.Event], None], config: Config, folder: Path) -> None:
    """main(settings, run folder, event set by the first Ctrl-C or SIGTERM), with errors as one line. A second
    signal raises KeyboardInterrupt."""
    interrupted, rank = threading.Event(), int(os.environ.get("RANK", -1))  # -1: not under torchrun

    def on_signal(number, _) -> None:
        if rank >= 0 and number == signal.SIGTERM:
            raise KeyboardInterrupt("torchrun ends this process, as another one has died")
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()
        if rank <= 0:
            os.write(2, b"\nends after this step; once more ends now\n")  # print may be at work

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        main(config, folder, interrupted)
    except (ValueError, OSError, RunEnded, KeyboardInterrupt) as error:
        problem = " ".join(str(error).split()) or "interrupted"
        if (folder / "config.json").exists() and not isinstance(error, ValueError):  # nothing to mend first
            script = "figures/controls.py" if config.control else "train.py"
            problem += f"; what is saved stays: python {script} --resume {folder}"
        sys.exit(f"train.py: {problem}" if rank <= 0 else 1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def eval_args(about: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of eval.py. A wrong flag ends the program with one clear line."""
    usage = "eval.py [CHECKPOINT | --agent AGENT] [--tasks TASKS] [-k K] ...   (--help lists them all)"
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("eval.py", usage, about, formatter_class=plain, allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="or an arm's folder: its newest")
    parser.add_argument("--preset", choices=PRESETS, help="settings for a model that train.py did not write")
    parser.add_argument(
        "--agent", choices=["policy", "oracle", "noop", "check"], default="policy",
        help="instead of a policy: each task's solution, nothing, or both to tell which tasks are sound",
    )  # fmt: skip
    parser.add_argument("--tasks", help="world:NAME (held out), or a folder of tasks [as trained]")
    parser.add_argument("--all", action="store_true", help="of a folder also tasks that were trained on")
    parser.add_argument("--backend", choices=["sandbox", "docker"], default="sandbox", help="[sandbox]")
    parser.add_argument("--allow_network", action="store_true", help="for tasks that ask for a network")
    parser.add_argument("--strict", action="store_true", help="stop at a task that can't be played")
    parser.add_argument("-k", type=int, default=1, help="sampled rollouts per task [1]")
    parser.add_argument("--limit", type=int, default=200, help="tasks at most [200]")
    parser.add_argument("--terminals", type=int, help="in use at one time [as trained; 4 for docker]")
    parser.add_argument("--max_turns", type=int, help="commands per episode [as trained]")
    parser.add_argument("--temperature", type=float, help="sampling temperature [as trained]")
    parser.add_argument("--seed", type=int, help="of a generated world and of the sampling [as trained]")
    parser.add_argument("--out", type=Path, help="folder for trials and transcripts; a second run goes on")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N transcripts in colour [0]")
    parser.add_argument("--html", type=Path, metavar="FILE", help="a page of the first 20 trials played now")
    args = parser.parse_args(argv)
    if min(args.k, args.limit) < 1:
        parser.error("-k and --limit must be at least 1")
    if (args.agent == "policy") != (args.checkpoint is not None):
        parser.error("name a checkpoint, or pass --agent oracle, noop or check, which take none")
    if args.all and (args.tasks or "").startswith("world:"):
        parser.error("--all is for a folder of tasks; of a world only held-out ones are played")
    return args
