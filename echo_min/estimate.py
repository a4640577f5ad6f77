"""What a run takes: memory on one GPU, part by part, and days. `python -m echo_min.estimate --preset NAME`

It counts the bytes of tensors alive at one time, as torch.cuda.max_memory_allocated does, for decoders like
Qwen3 and Llama. Rollouts and updates alternate; weights and optimizer states stay through both, gradients and
the KV cache do not. Attention is taken to be fused: scores [T, T] are never stored. A GPU's GB are 10^9
bytes; the 7 % that it has beyond them are left to the CUDA context and fragmentation. Days follow from bytes
read in decoding, and from operations; none was measured. More GPUs share the episodes of a step.
"""

import sys
from dataclasses import replace
from itertools import product

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

from echo_min.checkpoint import foreign, located
from echo_min.cli import parse_args
from echo_min.config import Config
from echo_min.machine import lost_updates
from echo_min.tiny import tiny_model, tiny_tokenizer

GB, GPUS = 1e9, (24, 48, 80, 141)
QWEN3 = dict(vocab_size=151936, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960)
SIZES = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings"
PUBLISHED = {  # so that the presets need no hub
    "Qwen/Qwen3-0.6B": (1024, 3072, 28, 16, True),
    "Qwen/Qwen3-8B": (4096, 12288, 36, 32, False),
}
CARDS = {80: "H100", 141: "H200"}  # by their GB
ASSUMED = {
    "H100": 3.35e12, "H200": 4.8e12,  # bytes a second
    "ours": 0.45, "vllm": 0.7,  # share of it that decoding reaches
    "launch": 12e-6,  # seconds that our sampler takes to start a kernel; a pass has 56 a layer, and 34
    "flops": 989e12,  # a second, dense, bfloat16
    "mfu": 0.4,  # share of it that prefill and updates reach
    "filled": 0.5,  # share of the context that a rollout fills
    "sampled": 0.5,  # share of its tokens that the policy wrote
}  # fmt: skip


def skeleton(name: str):
    """The model on the meta device: sizes without weights. Raises ValueError if its config can't be had."""
    with foreign(f"{name}: its config can't be read or fetched"):
        if name == "tiny":
            config = tiny_model(tiny_tokenizer([]), 0).config
            config.vocab_size = 1024
        elif name in PUBLISHED:
            config = Qwen3Config(**QWEN3, **dict(zip(SIZES, PUBLISHED[name], strict=True)))
        else:
            source, options = located(name)
            config = AutoConfig.from_pretrained(source, **options)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)


class Estimate:
    """In bytes, of a transformers model (only its shapes are read) trained under `config`."""

    def __init__(self, model, config: Config, cuda: bool = True):
        c, s = model.config, getattr(torch, config.dtype).itemsize
        self.config, self.cuda, self.size = config, cuda, s
        self.layers, self.d, self.mlp = c.num_hidden_layers, c.hidden_size, c.intermediate_size
        self.vocab, self.tied = c.vocab_size, c.tie_word_embeddings
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        head_dim = getattr(c, "head_dim", None) or self.d // heads
        self.q, self.kv = heads * head_dim, kv_heads * head_dim  # numbers per token
        counts = [p.numel() for p in model.parameters()]
        self.count, self.largest = sum(counts), max(counts)
        # AdamW's two means; those of 8 bits have a float32 scale for every 256
        state = s if config.optimizer == "adamw" else 1 + 4 / 256
        states = {"optimizer states": 2 * self.count * state}  # on CUDA they wait on the host
        self.fixed = {"weights": self.count * s} | ({} if cuda else states)
        self.stepping = self.fixed | states | {"gradients": self.count * s}
        # What a layer keeps of a token for its backward pass: a norm its input in float32, and the result for
        # its weight's gradient; linear maps, attention and silu what they read; some float32 sums.
        norms, sums, self.read = 2 * self.d, 2 + heads, (2 * self.d + 2 * self.q + 2 * self.kv) * s
        if any("q_norm" in name for name, _ in model.named_parameters()):
            norms, sums = norms + self.q + self.kv, sums + heads + kv_heads
        self.kept = norms * (4 + s) + self.read + 4 * self.mlp * s + 4 * sums

    def update(self) -> dict[str, dict[str, float]]:
        """Moment -> part -> bytes, from the second micro-batch on, if every token carries a loss."""
        c, s, d = self.config, self.size, self.d
        tokens = max(c.micro_batch_tokens, c.context)
        logits, room = tokens * self.vocab * s, c.logit_mb << 20
        head = self.vocab * d * s  # a tied head's gradient waits for that of the embedding
        activations, again = self.layers * self.kept, {}
        if c.gradient_checkpointing:
            activations, again = self.layers * d * s, {"activations of one layer": tokens * self.kept}
        always = self.fixed | {"gradients": self.count * s}
        forward = always | {"activations": tokens * (activations + d * (4 + s))}  # the last norm's, too
        workspace = 0 if self.cuda else 2 * self.largest * s  # on CUDA one fused kernel
        if c.optimizer == "adamw8bit":
            workspace = 8 * self.largest  # measured: two float32 copies
        at_head = {"logits": min(logits, room), "gradient of the head": head}
        at_head["hidden rows, and their gradient"] = tokens * d * (2 * s + (4 if logits > room else s))
        in_layer = {"gradients inside the layer": (tokens * (2 * self.mlp + d) + self.mlp * d) * s}
        in_layer["gradient of the head"] = head * self.tied
        return {
            "loss head": forward | at_head,
            "backward of a layer": forward | again | in_layer,
            "backward of the embedding": always | {"its gradients": (1 + self.tied) * head},
            "optimizer step": self.stepping | {"workspace": workspace},
        }

    def rollout(self) -> dict[str, dict[str, float]]:
        """Moment -> part -> bytes, when the episodes of all terminals have filled the context."""
        c, s, B = self.config, self.size, self.config.terminals
        layer_cache = B * -(-c.context // 64) * 64 * self.kv * s  # a layer's keys, or its values
        tokens = min(max(c.prefill_tokens, B), B * c.context)
        attention = tokens * (self.read + c.context * s)  # its mask in numbers
        if self.q > self.kv:  # under a mask, keys and values are repeated for every head
            attention += B * c.context * 2 * self.q * s
        workspace = max(attention, tokens * (2 * self.d + 3 * self.mlp) * s)
        cache = self.fixed | {"KV cache": 2 * self.layers * layer_cache}
        return {
            "prefill": cache | {"mask": tokens * c.context, "workspace of a layer": workspace},
            "sampling": cache | {"logits and float64 cdf": B * self.vocab * 24},
            "growing the cache": cache | {"a layer's keys again": layer_cache},
        }

    def peaks(self) -> tuple[float, float]:
        """-> bytes of (rollout, update)"""
        phases = self.rollout(), self.update()
        return tuple(max(sum(parts.values()) for parts in moments.values()) for moments in phases)


def days(estimate: Estimate, sampler: str, gpus: int, gb: int) -> dict[str, float]:
    """Part of the run -> days of one arm, without the terminals' own time; empty if it does not fit."""
    c, assumed, weights = estimate.config, ASSUMED, estimate.fixed["weights"]
    episodes, length = c.tasks_per_step * c.group_size / gpus, c.context * assumed["filled"]
    sampled, token = length * assumed["sampled"], 2 * estimate.layers * estimate.kv * estimate.size
    rollout, update = estimate.peaks()
    if sampler == "vllm":  # its own weights beside those in training; asleep during updates
        rollout, rows = 0, min(episodes, (gb * GB - 2 * weights) // (length * token))
    else:
        rows = min(episodes, c.terminals)
    if rows < 1 or max(rollout, update) > gb * GB:
        return {}
    longest = sum(1 / n for n in range(1, round(rows) + 1))  # of rows of exponential length, over their mean
    if sampler == "vllm":  # a place is handed on at once; the last episodes end alone
        passes = sampled * (episodes / rows - 1 + min(longest, 1 / assumed["filled"]))
        read = episodes * sampled * length / 2  # tokens in the cache
    else:  # every turn lasts as long as its longest reply, and all rows are read up to the longest's end
        passes = sampled * episodes / rows * min(longest, max(c.max_action_tokens * c.max_turns / sampled, 1))
        read = passes * rows * length
    decoding = (passes * weights + read * token) / (assumed[CARDS[gb]] * assumed[sampler])
    launches = passes * (56 * estimate.layers + 34) if sampler == "ours" else 0
    forward = 2 * estimate.count + 2 * estimate.layers * estimate.q * length  # FLOPs per token
    once = episodes * length * forward / (assumed["mfu"] * assumed["flops"])
    parts = {
        "decoding": max(decoding, launches * assumed["launch"]),
        "prefill": once * (1 - assumed["sampled"]),
        "updates": once * (4 if c.gradient_checkpointing else 3),
    }
    return {part: c.steps * seconds / 86400 for part, seconds in parts.items()}


def described(config: Config) -> str:
    """All of it as text. Raises ValueError if the model's config can't be had or is of another kind."""
    model = skeleton(config.model)
    with foreign(f"{config.model}: not a decoder like Qwen3 or Llama"):
        estimate = Estimate(model, config)

    def largest(name: str, values) -> list[int]:
        """The largest value of a setting for which both phases fit, or 0; of each GPU."""
        peaks = {v: max(Estimate(model, replace(config, **{name: v})).peaks()) for v in values}
        return [max((v for v, peak in peaks.items() if peak <= gpu * GB), default=0) for gpu in GPUS]

    about = f"{estimate.count / 1e9:.3f} billion weights, {config.dtype}, {config.optimizer}, context"
    lines = [f"{config.model}: {about} {config.context}, {config.terminals} terminals; GB alive together"]
    for phase, moments in (("rollout", estimate.rollout()), ("update", estimate.update())):
        together = {moment: sum(parts.values()) for moment, parts in moments.items()}
        top = max(together, key=together.get)
        parts = moments[top] | {"together": together[top]}
        lines += [f"\n{phase}, fullest in: {top}", *(f"  {p:32}{n / GB:9.2f}" for p, n in parts.items())]
    lines.append("\n  GPU, GB   fits   largest context   most terminals (a larger group is played in parts)")
    contexts = largest("context", range(1024, model.config.max_position_embeddings + 1, 1024))
    for row in zip(GPUS, contexts, largest("terminals", range(1, 257)), strict=True):
        fits = "yes" if max(estimate.peaks()) <= row[0] * GB else "no"
        lines.append("  {:7}   {:>4}   {:15}   {:14}".format(row[0], fits, *row[1:]))
    lines.append(f"\n{config.steps} steps of one arm, terminals not counted; vllm: if it were built in")
    for sampler, gb, gpus in product(("ours", "vllm"), CARDS, (1, 2, 8)):
        total = sum(days(estimate, sampler, gpus, gb).values())
        lines.append(f"days {sampler} {gpus}x{gb}: " + (f"{total:.1f}" if total else "does not fit"))
    spent = days(estimate, "vllm", 1, 141).items()
    lines.append("  of vllm 1x141: " + ", ".join(f"{part} {n:.2f}" for part, n in spent))
    lines.append("  assumed: " + ", ".join(f"{name} {value:g}" for name, value in ASSUMED.items()))
    return "\n".join([*lines, lost_updates(config)]).rstrip()


if __name__ == "__main__":
    try:
        print(described(parse_args()[0]))
    except ValueError as error:
        sys.exit(f"estimate: {error}")
