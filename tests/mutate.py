"""Break the code one line at a time and report which test notices: `make mutate`. Exit code 1 if one survives.

Works on a copy; the checkout is not touched.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
OBJECTIVE, MASKING, SAMPLER = "test_objective.py", "test_masking.py", "test_sampler.py"
ROLLOUT, TRAIN, WORLDS, HEAD = "test_rollout.py", "test_train.py", "test_worlds.py", "test_segment_logprob.py"

MUTATIONS = [  # what it breaks, file, the line's old text, the new text, the tests that should notice
    ("the shift", "kernels/segment_logprob.py", "index_select(0, rows - 1)", "index_select(0, rows)", f"{HEAD} {OBJECTIVE}"),
    ("1/T of the policy", "train.py", "o, config.temperature,", "o, 1.0,", OBJECTIVE),
    ("1/T of the sampler", "echo_min/sampler.py", "logits / self.temperature", "logits", SAMPLER),
    ("a swapped role", "echo_min/masking.py", "selected = roles == Role.OBSERVATION", "selected = roles == Role.ACTION", OBJECTIVE),
    ("warnings as targets", "echo_min/masking.py", "if warnings_as_targets else selected", "", OBJECTIVE),
    ("the sequence normaliser", "echo_min/masking.py", "share = 1 / (len(roles) * tokens)", "share = 1 / tokens", OBJECTIVE),
    ("the token normaliser", "echo_min/masking.py", "share = 1 / (len(in_group) * in_group[index])", "share = 1 / in_group[index]", MASKING),
    ("|O| of the paper", "echo_min/masking.py", "((roles == Role.OBSERVATION) | (roles == Role.WARNING))", "(roles == Role.OBSERVATION)", OBJECTIVE),
    ("weights per micro-batch", "train.py", "action_weights[rows, :T][a]", "policy_weights(roles[rows, :T], groups[rows])[a]", OBJECTIVE),
    ("the padding's role", "echo_min/masking.py", "roles = torch.full((B, T), Role.SCAFFOLD", "roles = torch.full((B, T), Role.OBSERVATION", MASKING),
    ("chat markers in output", "echo_min/masking.py", "split_special_tokens=role is not Role.SCAFFOLD", "split_special_tokens=False", MASKING),
    ("the encoder's lock", "echo_min/masking.py", "with _one_at_a_time:", "if True:", MASKING),
    ("the advantage's sign", "echo_min/grpo.py", "(r - r.mean())", "(r.mean() - r)", OBJECTIVE),
    ("equal rewards", "echo_min/grpo.py", "if not torch.equal(r, r[:1].expand_as(r)):", "if True:", OBJECTIVE),
    ("the upper clip", "echo_min/grpo.py", "1 + clip_high", "1 + clip_low", OBJECTIVE),
    ("min of the objective", "echo_min/grpo.py", "torch.minimum", "torch.maximum", OBJECTIVE),
    ("the placebo", "echo_min/echo.py", "pool[torch.randperm(len(pool), generator=generator).to(pool.device)]", "pool", OBJECTIVE),
    ("lambda in GRPO", "train.py", '0.0 if arm == "grpo" else config.env_weight', "config.env_weight", OBJECTIVE),
    ("infra errors left out", "echo_min/rollout.py", "StopReason.DONE, StopReason.MAX_TURNS, StopReason.CONTEXT_FULL)", "*StopReason,)", OBJECTIVE),
    ("the cache's positions", "echo_min/sampler.py", "<= positions[:, None, :, None]", "< positions[:, None, :, None]", SAMPLER),
    ("rows that leave", "echo_min/sampler.py", "self.length[kept]", "self.length[: len(kept)]", SAMPLER),
    ("one noise a row", "echo_min/sampler.py", "self.noise[rows, draw]", "self.noise[0, draw]", SAMPLER),
    ("the unread token", "echo_min/sampler.py", "self.unread.pop(row, []) + ids", "ids", SAMPLER),
    ("done is graded", "echo_min/rollout.py", "is not StopReason.INFRA_ERROR:", "is StopReason.MAX_TURNS:", ROLLOUT),
    ("the turn limit", "echo_min/rollout.py", "episode.turns == self.config.max_turns", "episode.turns > self.config.max_turns", ROLLOUT),
    ("the context limit", "echo_min/rollout.py", "for _, ids in encoded) > self.config.context", "for _, ids in encoded) > 1e9", ROLLOUT),
    ("the optimizer on resume", "echo_min/checkpoint.py", "    optimizer = make_optimizer(model)\n    try:", "    optimizer = make_optimizer(model)\n    return model, tokenizer, optimizer\n    try:", TRAIN),
    ("metrics on resume", "train.py", 'r["step"] <= first', 'r["step"] < first', TRAIN),
    ("the rename", "echo_min/checkpoint.py", "os.replace(new, folder)", "shutil.copytree(new, folder)", TRAIN),
    ("a verifier", "echo_min/worlds.py", '[[ $line == "{verb} {flag}" ]]', "[[ $line ]]", WORLDS),
    ("the distractor", "echo_min/worlds.py", "&& ! -s {other} ]]", "]]", WORLDS),
    ("held-out tasks", "echo_min/worlds.py", "train=tasks[200:]", "train=tasks[100:]", WORLDS),
]  # fmt: skip


def main() -> int:
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(
            ROOT, copy, ignore=shutil.ignore_patterns(".venv", "runs", ".git", "__pycache__", ".*_cache")
        )
        for name, file, old, new, tests in MUTATIONS:
            path = copy / file
            text = path.read_text()
            if text.count(old) < 1:
                print(f"STALE     {name}: {file} no longer holds {old!r}", flush=True)
                survivors += 1
                continue
            path.write_text(text.replace(old, new, 1))
            tests = [f"tests/{test}" for test in tests.split()]
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
            done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
            path.write_text(text)
            failed = [
                line.split(" - ")[0]
                for line in done.stdout.splitlines()
                if line.startswith(("FAILED", "ERROR"))
            ]
            survivors += not failed
            print(f"{'caught' if failed else 'SURVIVED':9} {name}: {' '.join(failed)}", flush=True)
    print(f"{len(MUTATIONS) - survivors} caught, {survivors} not")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
