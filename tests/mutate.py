"""Break the code one line at a time and report which test notices: `make mutate`. Fails if one survives.

Works on a copy; the checkout is not touched. `tests/mutate.py REGEX`: those whose "FILE: NAME" matches.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

# file -> (what breaks, old text, new text, the test file that should notice)
MUTATIONS = {
    "kernels/segment_logprob.py": [
        ("the shift", "index_select(0, rows - 1)", "index_select(0, rows)", "segment_logprob"),
        ("the shift, seen from the loss", "index_select(0, rows - 1)", "index_select(0, rows)", "objective"),
    ],
    "train.py": [
        ("1/T of the policy loss", "head = config.temperature,", "head = 1.0,", "objective"),
        (
            "lambda in plain GRPO",
            '0.0 if arm == "grpo" else config.env_weight',
            "config.env_weight",
            "objective",
        ),
        (
            "weights of a micro-batch",
            "w_a[a], config",
            "w_a[a] * len(ids) / len(rows), config",
            "objective",
        ),
        ("no verifier", "config.policy_weight * policy_loss", "policy_loss", "objective"),
        ("parsed rollouts only", "if config.parsed_only:", "if False:", "objective"),
        ("the telling words", "& torch.isin(ids, torch.tensor(words))", "", "objective"),
        ("Ctrl-C saves", " or stopping:", ":", "kill"),
        ("lines kept on resume", 'r["step"] <= first', 'r["step"] < first', "train"),
    ],
    "echo_min/grpo.py": [
        ("the advantage's sign", "(r - r.mean())", "(r.mean() - r)", "objective"),
        ("equal rewards", "if (r != r[0]).any():", "if True:", "objective"),
        ("the upper clip", "1 + clip_high", "1 + clip_low", "objective"),
        ("the pessimistic minimum", "torch.minimum", "torch.maximum", "objective"),
    ],
    "echo_min/echo.py": [
        ("exchanged outputs", "n = min(len(own), len(outputs[other]))", "n = len(own)", "objective"),
        ("the placebo", "targets[selected] = pool[", "targets[selected] = pool  # [", "objective")
    ],
    "echo_min/masking.py": [
        (
            "a swapped role",
            "selected = roles == Role.OBS",
            "selected = roles == Role.ACTION  # ",
            "objective",
        ),
        ("warnings left out", "if warnings_as_targets else selected", "", "objective"),
        ("the sequence normaliser", "1 / (len(roles) * tokens)", "1 / tokens", "objective"),
        ("the token normaliser", "1 / (len(in_group) * in_group[index])", "1 / in_group[index]", "masking"),
        ("|O| of the paper", "| (roles == Role.WARNING)).float()", ").float()", "objective"),
        (
            "the padding's role",
            "roles = torch.full((B, T), Role.SCAFFOLD",
            "roles = torch.full((B, T), 2",
            "masking",
        ),
        (
            "markers in hostile text",
            '"split_special_tokens": role is not',
            '"split_special_tokens": role is',
            "masking",
        ),
        ("the tokenizer's lock", "with _one_at_a_time:", "if True:", "masking"),
    ],
    "echo_min/sampler.py": [
        ("1/T of the sampler", "logits / self.config.temperature", "logits", "sampler"),
        ("what a query sees", "slots <= positions", "slots < positions", "sampler"),
        ("rows that leave", "store[i] = old[rows]", "store[i] = old[: len(rows)]", "sampler"),
        ("one noise a row", "self.noise[row].random", "self.noise[0].random", "sampler"),
        ("noise that was not used", "self.rows[row].drawn[len(ids) :]", "np.empty(0)", "sampler"),
        ("the unread token", "self.rows[row].unread + ids", "ids", "sampler"),
        ("a prompt read in parts", "range(start, stop)", "range(stop - start)", "sampler"),
        ("the last logits of a part", "hidden[ends] = out", "hidden[ends] = 0 * out", "sampler"),
        ("a smaller batch", "self._arrange(batch +", "(batch +", "sampler"),
        ("layers of another kind", 'kind != "full_attention"', 'kind == "mamba"', "sampler"),
    ],
    "echo_min/rollout.py": [
        ("a sandbox that cannot be had", "(TerminalDied, RunEnded)", "TerminalDied", "sick"),
        ("too many failures", "if 2 * len(failed) > len(episodes):", "if False:", "sick"),
        ("infra errors in the loss", "in (StopReason.DONE,", "in (*StopReason,", "objective"),
        ("seats in use", "- len(unread) - len(leaving)", "", "rollout"),
        ("who is graded", "is not StopReason.INFRA_ERROR:", "is StopReason.MAX_TURNS:", "rollout"),
        ("the turn limit", "episode.turns == self.config", "episode.turns > self.config", "rollout"),
        (
            "the context limit",
            "for _, ids in encoded) > self.config.context",
            "for _, ids in encoded) > 1e9",
            "rollout",
        ),
    ],
    "echo_min/harness.py": [
        ("an empty reply", "if not reply.strip():", "if False:", "rollout"),
        ("first call", 'CALL.match(reply, reply.index("<tool_call>"))', "CALL.search(reply)", "harness"),
        ("thinking that does not end", "if not closed:", "if False:", "harness"),
    ],
    "echo_min/optimizer.py": [
        ("rounding keyed by step", "torch.manual_seed(seed)", "pass", "optimizer"),
    ],
    "echo_min/checkpoint.py": [
        ("the optimizer on resume", "        optimizer.load_state_dict(", "        print(", "train"),
        ("one writer", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", "kill"),
        ("what a kill left", 'folder.rglob("*.tmp")', 'folder.rglob("*.none")', "kill"),
        ("whole or absent", 'folder.with_name(folder.name + ".tmp")', "folder", "train"),
    ],
    "echo_min/worlds/tool.py": [
        ("the verifier's line", '$line == "{verb} {words}"', "$line", "worlds"),
        ("the distractor", "&& ! -s {other} ]]", "]]", "worlds"),
        ("held-out tasks", "for pair in pairs[200:]", "for pair in pairs[100:]", "worlds"),
        ("facts in plain sight", 'f"\\\\{ord(char):03o}"', "char", "worlds"),
        ("a trace", "case $- in *x*) exit 2 ;; esac", "", "worlds"),
        ("what the terminal tells", "shown=$right", "shown=", "worlds"),
    ],
    "echo_min/worlds/file.py": [
        ("more than the word", "! read -r -d", "read -r -d", "worlds"),
    ],
    "echo_min/terminals/sandbox.py": [
        ("the verdict", 'return 1.0 if answer == b"0" else 0.0', "return 1.0", "sandbox"),
        ("no verdict", 'if answer not in (b"0", b"1"):', "if False:", "sandbox"),
        ("large files", "if len(content) <= INLINE_BYTES:", "if True:", "limits"),
    ],
    "echo_min/terminal.py": [
        ("output that was cut", "len(text) > len(shown))", "False)", "sandbox"),
        ("a command with a NUL", 'data.count(b"\\0") > 1 or ', "", "sandbox"),
        ("a file outside of the work folder", 'or ".." in name.split("/")', "", "sandbox"),
    ],
    "echo_min/tasks.py": [
        ("a limit that is none", "or not 0 < value < math.inf:", "or False:", "limits"),
        ("too few processes", "if self.processes < 4:", "if False:", "limits"),
    ],
    "echo_min/terminals/bubblewrap.py": [
        ("a box that is not clean", '== b"1 0"', "is not None", "sandbox"),
        ("the pipe's flags", "fcntl.fcntl(self.printed, fcntl.F_SETFL, 0)", "pass", "sandbox"),
        ("the pipe's lock", "fcntl.flock(self.printed, fcntl.LOCK_UN)", "pass", "sandbox"),
        ("devices of its own", "--dev /dev --remount-ro /dev {tmpfs}", "{tmpfs}", "sandbox"),
        ("a box of another kind", "if box.kind == (limits, tools):", "if True:", "sandbox"),
        ("a relay that can be traced", '("/opt/bash", "0111")', '("/opt/bash", "0555")', "limits"),
        ("the host's limits", "if 0 <= hard < value * unit:", "if False:", "limits"),
        ("a read-only system", '"--remount-ro", "/", ', "", "sandbox"),
        ("no network", "--unshare-all", "--unshare-user --unshare-pid --unshare-uts", "sandbox"),
        ("the limit on processes", "limits='-u {n}'", "limits='-c 0'", "limits"),
        ("the limit on memory", 'if letter != "u")', 'if letter not in "uv")', "sandbox"),
        ("the limit on files", 'if letter != "u")', 'if letter not in "uf")', "sandbox"),
        ("its own pid namespace", "--disable-userns --unshare-pid", "--disable-userns", "sandbox"),
    ],
    "echo_min/terminals/seccomp.py": [
        ("the filter", "0x00050000 | errno.ENOSYS", "0x7FFF0000", "sandbox"),
        ("calls with arguments", "[allow, refuse]", "[allow, allow]", "limits"),
        ("which argument", "16 + 8 * argument", "16", "limits"),
        ("leases", "1038, 1024, 1026", "1038, 1026", "limits"),
        ("attributes", "[0x40086602, ", "[", "sandbox"),
        ("limits of the relay", "RELAY = (0, [1]", "RELAY = (0, [0]", "limits"),
    ],
    "echo_min/terminals/supervisor.sh": [
        ("the relay's own limits", "ulimit $limits -u $((processes + 8))", "true", "limits"),
        ("processes left behind", "kill -KILL -- -1", ":", "sandbox"),
        ("files left behind", 'rm -rf -- "${list[@]}"', ":", "sandbox"),
        ("the verifier's files", "list=(/work/* /tmp/*)", "list=(/work/*)", "sandbox"),
        ("the folder's mode", "chmod 00755 /work", "chmod 755 /work", "sandbox"),
        ("the folder's times", "touch /work", ":", "sandbox"),
        ("traffic", "|| list+=(sent)", "", "sandbox"),
        ("the verifier's home", "HOME=/tmp PYTHONSAFEPATH=1", "PYTHONSAFEPATH=1", "sandbox"),
        ("the verifier's modules", "HOME=/tmp PYTHONSAFEPATH=1", "HOME=/tmp", "sandbox"),
        ("the filter's descriptor", "exec {filter}</opt/filter", "filter=9; exec 9</opt/filter", "sandbox"),
    ],
    "echo_min/terminals/relay.sh": [
        ("late processes", "if [[ $late ]]; then reap; fi", "", "sandbox"),
    ],
    "echo_min/terminals/docker.py": [
        ("the verifier's script", '"-c", BY_STDIN]', '"-c", script]', "container"),
        ("private files", "chmod -R a+rX /work", ":", "container"),
        ("what it holds", "size < 0 or ", "", "container"),
        ("raw sockets", '["NET_RAW"]', "[]", "container"),
    ],
    "echo_min/worlds/harbor.py": [
        ("several containers", "(found := folder / \"environment\" / name).exists()", "False", "harbor"),
    ],
}


def caught_by(copy: Path, file: str, old: str, new: str, test: str) -> list[str]:
    """-> names of the tests that fail when file's first `old` becomes `new`."""
    path = copy / file
    text = path.read_text()
    if old not in text:
        raise SystemExit(f"stale mutation: {file} no longer holds {old!r}")
    path.write_text(text.replace(old, new, 1))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/test_{test}.py"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    path.write_text(text)
    return [line.split(" - ")[0] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]


def main() -> int:
    survivors, done, only = [], 0, sys.argv[1] if sys.argv[1:] else ""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignore = shutil.ignore_patterns(".venv", "runs", ".git", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, copy, ignore=ignore)
        for file, mutations in MUTATIONS.items():
            for name, *mutation in mutations:
                if not re.search(only, f"{file}: {name}"):
                    continue
                done += 1
                tests = caught_by(copy, file, *mutation)
                survivors += [] if tests else [name]
                print(f"{'caught  ' if tests else 'SURVIVED'} {file}: {name}: {' '.join(tests)}", flush=True)
    print(f"{done - len(survivors)} passed, {len(survivors)} failed")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
