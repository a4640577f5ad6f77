"""What ECHO costs on top of GRPO: one optimizer step on the same episodes, three ways, interleaved.

    python -m kernels.price

A model in the proportions of Qwen3-8B (the head holds 7 % of the weights), smaller: width 256, 8 layers; on a
GPU in bfloat16 with all 36 layers, a quarter of the width, the vocabulary and the heads. 40 % of the tokens
are actions, 40 % observations. Against a GRPO that logs observation CE, ECHO adds the backward part of the
observation rows' head; against one that skips those rows, their whole head.
"""

import argparse
import random
import time
from dataclasses import replace
from math import log

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import train
from echo_min.batch import make_batch
from echo_min.config import Config
from echo_min.masking import Role, Transcript
from echo_min.rollout import Episode, StopReason
from echo_min.tasks import Task
from kernels.bench import Peak, median

SHARES = ((Role.PROMPT, 0.1), (Role.ACTION, 0.4), (Role.OBSERVATION, 0.4), (Role.SCAFFOLD, 0.1))


def make_model(device: str) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    sizes = "vocab_size hidden_size intermediate_size num_hidden_layers head_dim num_attention_heads".split()
    small, quarter = ((2048, 256, 768, 8, 32, 8), 8), ((37984, 1024, 3072, 36, 128, 8), 2)
    numbers, kv_heads = quarter if device == "cuda" else small
    shape = dict(zip(sizes, numbers, strict=True)) | {"num_key_value_heads": kv_heads}
    model = Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=False, **shape))
    return model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)


def make_episodes(vocab: int, B: int, T: int) -> list[Episode]:
    """B episodes of T tokens in groups of four, half of each rewarded; old logprobs those of a new model."""
    rng, episodes = random.Random(0), []
    for b in range(B):
        transcript = Transcript()
        for role, share in SHARES:
            ids = [rng.randrange(vocab) for _ in range(round(share * T))]
            transcript.append(role, ids, [-log(vocab)] * len(ids) if role is Role.ACTION else None)
        task, reward = Task("t", "", "", ""), float(b % 2)
        episodes.append(Episode(task, b // 4, transcript, reward=reward, stop=StopReason.DONE))
    return episodes


def without_observations(episodes: list[Episode]) -> list[Episode]:
    """The same tokens, but nobody asks for the log-probs of the observations."""
    blind = []
    for e in episodes:
        roles = [int(Role.SCAFFOLD) if role == Role.OBSERVATION else role for role in e.transcript.roles]
        blind.append(replace(e, transcript=replace(e.transcript, roles=roles)))
    return blind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8, help="episodes, B")
    parser.add_argument("--tokens", type=int, default=256, help="tokens per episode, T")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, B, T = make_model(device), args.batch, args.tokens
    vocab = model.config.vocab_size
    config = Config(device=device, learning_rate=1e-9, micro_batch_tokens=1 << 20)
    episodes = make_episodes(vocab, B, T)
    whole, blind = (make_batch(e, config) for e in (episodes, without_observations(episodes)))
    arms = {"ECHO": ("echo", whole), "GRPO": ("grpo", blind)}
    arms["GRPO that logs observation CE"] = ("grpo", whole)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
    times, peaks = {name: [] for name in arms}, {}
    for measured in range(-1, args.rounds):  # the first round only warms up
        for name, (arm, batch) in arms.items():
            with Peak(device) as peak:
                started = time.perf_counter()
                train.update(model, optimizer, batch, arm, 0, config)
                if device == "cuda":
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - started
            if measured >= 0:
                times[name].append(seconds)
                peaks[name] = max(peaks.get(name, 0), peak.MiB)
    body = sum(p.numel() for p in model.model.layers.parameters())
    head = model.lm_head.weight.numel()
    rows = round(0.4 * T) * B  # of observations, and as many of actions
    total = 3 * (body * T * B + head * rows)  # forward and backward, in products of one weight and one number
    where = f"{device}, {torch.get_num_threads()} threads: B={B} T={T} V={vocab} {model.dtype}"
    print(f"{where}, medians of {args.rounds} rounds\n")
    print("| update | ms | ECHO / this | expected from FLOPs | peak MiB |\n|---|--:|--:|--:|--:|")
    extras = (0, 3 * head * rows / total, 2 * head * rows / (total + head * rows))
    for name, extra in zip(arms, extras, strict=True):
        ratio, low, high = median([e / t for e, t in zip(times["ECHO"], times[name], strict=True)])
        print(f"| {name} | {median(times[name])[0] * 1e3:.0f} | {ratio:.3f} [{low:.3f}, {high:.3f}]", end=" ")
        print(f"| {1 + extra:.3f} | {peaks[name]:.0f} |")


if __name__ == "__main__":
    main()
