"""Break the code one line at a time and report which test notices: `make mutate`. Fails if one survives.

tests/mutations.py lists what is broken and which test file should notice. It works on copies, one a worker;
the checkout is not touched. `tests/mutate.py REGEX`: those whose "FILE: NAME" matches. `--table FILE` writes
the table that is printed at the end.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

import numpy  # noqa: F401  # the tests run in forks of this process, which has loaded what takes seconds
import pytest
import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from mutations import MUTATIONS  # noqa: E402

transformers.Qwen3ForCausalLM, transformers.AutoModelForCausalLM  # noqa: B018  # loaded by being named
torch.set_num_threads(1)
HANGS = 150  # seconds without a word; no test takes as long


def noticed_by(copy: Path, target: str) -> list[str]:
    """-> names of the tests that fail. target: test_TARGET.py, or one test of it, as FILE::TEST."""
    file, _, test = target.partition("::")
    path, log = f"tests/test_{file}.py" + (f"::test_{test}" if test else ""), copy / "log"
    if not (child := os.fork()):
        os.setsid()
        os.chdir(copy)
        sys.path[:] = [str(copy), *(p for p in sys.path if not p.startswith(str(ROOT / "tests")))]
        with open(log, "w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--rootdir", ".", path])))
    said, since = 0, time.monotonic()
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        time.sleep(0.05)
        if said != (said := log.stat().st_size if log.exists() else 0):
            since = time.monotonic()
        if time.monotonic() - since > HANGS:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return ["hangs"]
    failed = [line.split(" - ")[0].split("::")[-1] for line in log.read_text().splitlines()
              if line.startswith(("FAILED ", "ERROR "))]  # fmt: skip
    if os.waitstatus_to_exitcode(done[1]) and not failed:
        return ["the test file does not load or end: " + log.read_text()[-300:]]
    return failed


def work(todo, results) -> None:
    """Take mutations until there are none, each in this worker's copy."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        ignore = shutil.ignore_patterns(".venv*", "runs", ".git", "__pycache__", ".*_cache", "png", "*.jsonl")
        shutil.copytree(ROOT, copy, ignore=ignore)
        while mutation := todo.get():
            file, name, old, new, target = mutation
            text = (copy / file).read_text() if (copy / file).exists() else ""
            if text.count(old) != 1:
                results.put((file, name, None, target))
                continue
            (copy / file).write_text(text.replace(old, new))
            results.put((file, name, noticed_by(copy, target), target))
            (copy / file).write_text(text)


def run(mutations: list[tuple], workers: int) -> Counter:
    """-> (file, outcome) -> how many. Outcome: caught, SURVIVED or STALE."""
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": ""}
    sys.dont_write_bytecode = True
    fork = get_context("fork")
    todo, results = fork.SimpleQueue(), fork.SimpleQueue()
    for _ in range(workers):
        fork.Process(target=work, args=(todo, results)).start()
    for mutation in [*mutations, *[None] * workers]:
        todo.put(mutation)
    counts = Counter()
    for _ in mutations:
        file, name, failed, target = results.get()
        outcome = "STALE" if failed is None else "caught" if failed else "SURVIVED"
        counts[file, outcome] += 1
        print(f"{outcome:8} {file}: {name}  [{target}] {' '.join(failed or [])}", flush=True)
    return counts


def table(counts: Counter) -> str:
    rows = ["| file | mutations | caught |", "|---|---:|---:|"]
    for file in sorted({file for file, _ in counts}):
        total = sum(n for (name, _), n in counts.items() if name == file)
        rows.append(f"| {file} | {total} | {counts[file, 'caught']} |")
    caught = sum(n for (_, outcome), n in counts.items() if outcome == "caught")
    return "\n".join([*rows, f"| all | {sum(counts.values())} | {caught} |"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("regex", nargs="?", default="")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    every = [(file, *mutation) for file, of_file in MUTATIONS.items() for mutation in of_file]
    counts = run([m for m in every if re.search(args.regex, f"{m[0]}: {m[1]}")], args.workers)
    print(f"\n{table(counts)}")
    if args.table:
        args.table.write_text(f"Each mutation breaks one line. `make mutate`\n\n{table(counts)}\n")
    return sum(counts.values()) - sum(n for (_, outcome), n in counts.items() if outcome == "caught")


if __name__ == "__main__":
    sys.exit(main())
