"""What a run takes: memory on one GPU, part by part, and days. `python -m echo_min.estimate --preset NAME`

It counts the bytes of tensors alive at one time, as torch.cuda.max_memory_allocated does, for decoders like
Qwen3 and Llama. Rollouts and updates alternate; weights and optimizer states stay through both, gradients and
the KV cache do not. Attention is taken to be fused (flash or memory-efficient on CUDA, flash on a CPU):
scores [T, T] are never stored. A GPU's GB are 10^9 bytes; the 7 % that it has beyond them are left to the
CUDA context and fragmentation.
"""

import inspect
import sys
from dataclasses import replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

from echo_min.checkpoint import located
from echo_min.cli import parse_args
from echo_min.config import Config
from echo_min.machine import lost_updates
from echo_min.tiny import tiny_model, tiny_tokenizer

GB, GPUS = 1e9, (24, 48, 80, 141)
QWEN3 = dict(vocab_size=151936, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960)
SMALL = dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16)
LARGE = dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32)
PUBLISHED = {  # so that the presets need no hub
    "Qwen/Qwen3-0.6B": QWEN3 | SMALL | dict(tie_word_embeddings=True),
    "Qwen/Qwen3-8B": QWEN3 | LARGE | dict(tie_word_embeddings=False),
}


def skeleton(name: str):
    """The model on the meta device: sizes without weights. Raises ValueError if its config can't be had."""
    try:
        if name == "tiny":
            config = tiny_model(tiny_tokenizer([]), 0).config
            config.vocab_size = 1024
        else:
            source, options = located(name)
            known = Qwen3Config(**PUBLISHED[name]) if name in PUBLISHED else None
            config = known or AutoConfig.from_pretrained(source, **options)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # foreign files, or no hub: every kind of error comes out of them
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{name}: its config can't be read or fetched ({reason})") from None


class Estimate:
    """In bytes, of a transformers model (only its shapes are read) trained under `config`."""

    def __init__(self, model, config: Config, cuda: bool = True):
        c = model.config
        self.config, self.cuda, self.size = config, cuda, getattr(torch, config.dtype).itemsize
        self.layers, self.d, self.mlp = c.num_hidden_layers, c.hidden_size, c.intermediate_size
        self.vocab, self.tied = c.vocab_size, c.tie_word_embeddings
        self.heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        head_dim = getattr(c, "head_dim", None) or self.d // self.heads
        self.q, self.kv = self.heads * head_dim, kv_heads * head_dim  # numbers per token
        counts = [p.numel() for p in model.parameters()]
        self.count, self.largest = sum(counts), max(counts)
        # AdamW's two means; those of 8 bits have a float32 scale for every 256
        state = self.size if config.optimizer == "adamw" else 1 + 4 / 256
        self.fixed = {"weights": self.count * self.size, "optimizer states": 2 * self.count * state}
        # What a layer keeps of a token for its backward pass: a norm its input in float32, and the result for
        # its weight's gradient; linear maps, attention and silu what they read; some float32 sums.
        norm, norms, sums = 4 + self.size, 2 * self.d, 2 + self.heads
        if any("q_norm" in name for name, _ in model.named_parameters()):
            norms, sums = norms + self.q + self.kv, sums + self.heads + kv_heads
        read = 2 * self.d + 2 * self.q + 2 * self.kv + 4 * self.mlp
        self.kept = norms * norm + read * self.size + 4 * sums

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
        workspace = self.count * s if self.cuda else 2 * self.largest * s  # on CUDA of all weights at once
        if c.optimizer == "adamw8bit":
            workspace = 8 * self.largest  # measured: two float32 copies
        return {
            "loss head": forward
            | {"logits": min(logits, room), "gradient of the head": head}
            | {"hidden rows, and their gradient": tokens * d * (2 * s + (4 if logits > room else s))},
            "backward of a layer": forward
            | again
            | {"gradients inside the layer": (tokens * (2 * self.mlp + d) + self.mlp * d) * s}
            | {"gradient of the head": head * self.tied},
            "backward of the embedding": always | {"its gradients": (1 + self.tied) * head},
            "optimizer step": always | {"workspace": workspace},
        }

    def rollout(self) -> dict[str, dict[str, float]]:
        """Moment -> part -> bytes, when the episodes of all terminals have filled the context."""
        c, s, B = self.config, self.size, self.config.terminals
        layer_cache = B * -(-c.context // 64) * 64 * self.kv * s  # a layer's keys, or its values
        tokens = min(max(c.prefill_tokens, B), B * c.context)
        attention = tokens * (2 * self.d + 2 * self.q + 2 * self.kv + c.context) * s  # its mask in numbers
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
        return tuple(
            max(sum(m.values()) for m in phase.values()) for phase in (self.rollout(), self.update())
        )


def days(estimate: Estimate, filled=0.5, sampled=0.5, decode=25.0, mfu=0.4, flops=989e12) -> dict[str, float]:
    """Part of the run -> days, without the terminals' own time.

    filled: share of the context that a rollout fills; sampled: share of its tokens that the policy wrote;
    decode: tokens/s of one episode while all terminals' episodes are decoded at once; mfu: share of the GPU's
    flops/s (dense, bfloat16) that prefill and updates reach.
    """
    c = estimate.config
    tokens = c.steps * c.tasks_per_step * c.group_size * c.context * filled
    forward = 2 * estimate.count + 2 * estimate.layers * estimate.q * c.context * filled  # FLOPs per token
    passes = 4 if c.gradient_checkpointing else 3
    return {
        "decoding": tokens * sampled / (decode * c.terminals) / 86400,
        "prefill": tokens * (1 - sampled) * forward / (mfu * flops) / 86400,
        "updates": tokens * passes * forward / (mfu * flops) / 86400,
    }


def described(config: Config) -> str:
    """All of it as text. Raises ValueError if the model's config can't be had or is of another kind."""
    model = skeleton(config.model)
    try:
        estimate = Estimate(model, config)
    except AttributeError as error:
        raise ValueError(f"{config.model}: not a decoder like Qwen3 or Llama ({error})") from None

    def largest(name: str, values, size: int) -> int:
        """The largest value of a setting for which both phases fit, or 0."""
        peaks = {v: max(Estimate(model, replace(config, **{name: v})).peaks()) for v in values}
        return max((v for v, peak in peaks.items() if peak <= size * GB), default=0)

    lines = [
        f"{config.model}: {estimate.count / 1e9:.3f} billion weights, {config.dtype}, {config.optimizer},"
    ]
    lines[0] += f" context {config.context}, {config.terminals} terminals; GB alive together"
    for phase, moments in (("rollout", estimate.rollout()), ("update", estimate.update())):
        total = {moment: sum(parts.values()) for moment, parts in moments.items()}
        top = max(total, key=total.get)
        lines.append(f"\n{phase}, fullest in: {top}")
        lines += [f"  {part:32}{size / GB:9.2f}" for part, size in moments[top].items()]
        others = ", ".join(f"{moment} {size / GB:.2f}" for moment, size in total.items() if moment != top)
        lines.append(f"  {'together':32}{total[top] / GB:9.2f}   ({others})")
    lines.append("\n  GPU, GB   fits   largest context   most terminals (a larger group is played in parts)")
    contexts = range(1024, model.config.max_position_embeddings + 1, 1024)
    for size in GPUS:
        fits = "yes" if max(estimate.peaks()) <= size * GB else "no"
        context, terminals = largest("context", contexts, size), largest("terminals", range(1, 257), size)
        lines.append(f"  {size:7}   {fits:>4}   {context:15}   {terminals:14}")
    spent, assumed = days(estimate), inspect.signature(days).parameters.values()
    parts = ", ".join(f"{part} {value:.2f}" for part, value in spent.items())
    lines.append(f"\n{config.steps} steps of one arm: {sum(spent.values()):.1f} days on one GPU")
    lines.append(f"  terminals not counted: {parts}")
    lines.append("  assumed: " + ", ".join(f"{p.name} {p.default:g}" for p in list(assumed)[1:]))
    return "\n".join([*lines, lost_updates(config)]).rstrip()


if __name__ == "__main__":
    try:
        print(described(parse_args()[0]))
    except ValueError as error:
        sys.exit(f"estimate: {error}")
