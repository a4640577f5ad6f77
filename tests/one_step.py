"""Which files does one training step enter? Prints each with its lines, then `total N`.

From picking the tasks to the optimizer step, settings and tasks included; only terminals/, worlds/ and
kernels/ are left out.
"""

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
APART = "echo_min/terminals/", "echo_min/worlds/", "kernels/"


def entered_files() -> set[str]:
    """Paths below ROOT of all files in which some function runs while one step of a tiny run is made."""
    import train
    from echo_min import checkpoint
    from echo_min.config import Config
    from echo_min.machine import on_this_machine
    from echo_min.sft import make_base
    from echo_min.worlds.registry import load_tasks

    small = {"base_steps": 1, "base_demonstrations": 8, "tasks_per_step": 2, "group_size": 2}
    config, found = on_this_machine(Config(device="cpu", **small)), set()

    def trace(frame, *_):
        found.add(frame.f_code.co_filename)

    with tempfile.TemporaryDirectory() as folder:
        world = load_tasks("world:tool", False, config.seed)
        make_base(config, world, Path(folder, "base"))
        _, model, tokenizer, optimizer = checkpoint.restore(Path(folder), "echo", config)
        import threading

        threading.setprofile(trace)
        sys.setprofile(trace)
        try:
            config = Config(device="cpu", **small)
            train.train_step(model, optimizer, tokenizer, world, "echo", 0, config, None)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    names = {os.path.relpath(name, ROOT) for name in found if name.startswith(str(ROOT))}
    names |= {"echo_min/tasks.py", "echo_min/limits.py"}  # of which a step only reads fields
    return {name for name in names if not name.startswith((".venv", "tests/", *APART))}


def main() -> None:
    counts = {name: len((ROOT / name).read_text().splitlines()) for name in entered_files()}
    for name, lines in sorted(counts.items(), key=lambda item: -item[1]):
        print(f"{lines:5}  {name}")
    print(f"total {sum(counts.values())}")


if __name__ == "__main__":
    main()
