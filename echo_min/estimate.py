"""What a run will take: memory on one GPU, part by part, and days. `python train.py --preset NAME --estimate`

It counts the bytes of tensors alive at one time, as torch.cuda.max_memory_allocated does, for decoders like
Qwen3 and Llama. Rollouts and updates alternate; weights and optimizer states stay through both, gradients and
the KV cache do not. Attention is taken to be fused (flash or memory-efficient on CUDA, flash on a CPU): scores
[T, T] are never stored. A GPU's GB are 10^9 bytes; the 7 % that it has beyond that are left to the CUDA
context and fragmentation.
"""

import inspect
from dataclasses import replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

from echo_min.config import Config
from echo_min.optimizer import lost_updates
from echo_min.policy import tiny_model, tiny_tokenizer

GB, GPUS = 1e9, (24, 48, 80, 141)
QWEN3 = dict(vocab_size=151936, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960)
PUBLISHED = {  # the hub is not asked for these
    "Qwen/Qwen3-0.6B": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                            num_attention_heads=16, tie_word_embeddings=True),
    "Qwen/Qwen3-8B": dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
                          num_attention_heads=32, tie_word_embeddings=False),
}  # fmt: skip


def skeleton(name: str):
    """The model on the meta device: sizes without weights. Raises ValueError if its config can't be had."""
    if name == "tiny":
        config = tiny_model(tiny_tokenizer([]), 0).config
        config.vocab_size = 1024
    elif name in PUBLISHED:
        config = Qwen3Config(**QWEN3, **PUBLISHED[name])
    else:
        try:
            config = AutoConfig.from_pretrained(name)
        except Exception as error:  # foreign files, or no hub: every kind of error comes out of them
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"{name}: its config can't be read or fetched ({reason})") from None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


class Estimate:
    """Bytes, for a transformers model (only its shapes are read) trained under `config`."""

    def __init__(self, model, config: Config, cuda: bool = True):
        c = model.config
        self.config, self.cuda, self.size = config, cuda, getattr(torch, config.dtype).itemsize
        self.layers, self.d, self.mlp, self.vocab = (
            c.num_hidden_layers, c.hidden_size, c.intermediate_size, c.vocab_size
        )  # fmt: skip
        self.heads, self.kv_heads = c.num_attention_heads, c.num_key_value_heads
        self.head_dim = getattr(c, "head_dim", None) or self.d // self.heads
        self.q, self.kv, self.tied = (
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
            c.tie_word_embeddings,
        )
        self.head_norms = any("q_norm" in name for name, _ in model.named_parameters())
        counts = [p.numel() for p in model.parameters()]
        self.count, self.largest = sum(counts), max(counts)
        # AdamW's two means; of 8 bits with a float32 scale for every 256
        per_weight = 2 * self.size if config.optimizer == "adamw" else 2 * (1 + 4 / 256)
        self.fixed = {"weights": self.count * self.size, "optimizer states": self.count * per_weight}

    def kept(self) -> float:
        """Bytes per token that one layer keeps for its backward pass."""
        norm = (
            4 + self.size
        )  # a norm keeps its input in float32, and the normalised one for its weight's gradient
        numbers = 2 * self.d + 2 * self.q + 2 * self.kv + 4 * self.mlp  # what linear maps and attention read
        wide = 4 * (self.heads + 2)  # attention's log-sum-exp, two reciprocal norms
        if self.head_norms:
            wide += (self.q + self.kv) * norm + 4 * (self.heads + self.kv_heads)
        return 2 * self.d * norm + numbers * self.size + wide

    def update(self) -> dict[str, dict[str, float]]:
        """Moment -> part -> bytes, from the second micro-batch on, if every token carries a loss."""
        c, s = self.config, self.size
        tokens = max(c.micro_batch_tokens // c.context, 1) * c.context
        gradients = self.fixed | {"gradients": self.count * s}
        final_norm = tokens * self.d * (4 + s)
        if c.gradient_checkpointing:
            activations = {"layer inputs": tokens * self.layers * self.d * s + final_norm}
            again = {"activations of one layer": tokens * self.kept()}
        else:
            activations, again = {"activations": tokens * self.layers * self.kept() + final_norm}, {}
        logits = tokens * self.vocab * s
        sliced = logits > c.logit_mb << 20
        head = (
            self.vocab * self.d * s
        )  # its gradient before it is added up; a tied one waits for the embedding's
        loss_head = {
            "logits": min(logits, c.logit_mb << 20),
            "hidden rows and their gradient": tokens * self.d * (2 * s + (4 if sliced else s)),
            "gradient of the head": head,
        }
        backward = {
            "gradients inside a layer": tokens * (2 * self.mlp + self.d) * s + self.mlp * self.d * s,
            "gradient of the head": head * self.tied,
        }
        if c.optimizer == "adamw8bit":
            step = 8 * self.largest  # of the compiled step, measured
        else:
            step = self.count * s if self.cuda else 2 * self.largest * s  # CUDA: for all weights at once
        return {
            "loss head": gradients | activations | loss_head,
            "backward of a layer": gradients | activations | again | backward,
            "backward of the embedding": gradients | {"gradients of the embedding": (1 + self.tied) * head},
            "optimizer step": gradients | {"workspace": step},
        }

    def rollout(self) -> dict[str, dict[str, float]]:
        """Moment -> part -> bytes, when all terminals' episodes have filled the context."""
        c, s, B = self.config, self.size, self.config.terminals
        slots = B * -(-c.context // 64) * 64
        cache = slots * 2 * self.layers * self.kv * s
        tokens = min(max(c.prefill_tokens, B), B * c.context)
        mask = tokens * c.context
        attention = tokens * (2 * self.d + 2 * self.q + 2 * self.kv) * s + mask * s
        if self.heads > self.kv_heads:  # under a mask the keys and values are repeated for every head
            attention += B * c.context * 2 * self.q * s
        mlp = tokens * (2 * self.d + 3 * self.mlp) * s
        cache = self.fixed | {"KV cache": cache}
        return {
            "prefill": cache | {"mask": mask, "workspace of a layer": max(attention, mlp)},
            "sampling": cache | {"logits and float64 cdf": B * self.vocab * 24},
            "growing the cache": cache | {"a layer's keys again": cache["KV cache"] / (2 * self.layers)},
        }

    def peak(self) -> tuple[float, float]:
        """-> bytes of (rollout, update)"""
        return tuple(
            max(sum(m.values()) for m in phase.values()) for phase in (self.rollout(), self.update())
        )


def days(estimate: Estimate, filled=0.5, sampled=0.5, decode=25.0, mfu=0.4, flops=989e12) -> dict[str, float]:
    """Part of the run -> days, without the terminals' own time.

    filled: share of the context that a rollout fills; sampled: share of its tokens that the policy wrote;
    decode: tokens/s of one episode, all terminals at once; mfu: share of the GPU's flops (bfloat16, dense)
    that prefill and training reach.
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


def largest(model, config: Config, field: str, values, room: float) -> int:
    """-> the largest of the rising values of a field of Config for which both phases fit, or 0."""
    fits = [v for v in values if max(Estimate(model, replace(config, **{field: v})).peak()) <= room]
    return max(fits, default=0)


def report(config: Config) -> str:
    """Everything above as text. Raises ValueError if the model's config can't be had."""
    model = skeleton(config.model)
    estimate = Estimate(model, config)
    lines = [
        f"{config.model}: {estimate.count / 1e9:.3f} billion weights, {config.dtype}, {config.optimizer},"
        f" context {config.context}, {config.terminals} terminals; GB of tensors alive together"
    ]
    for name, phase in (("rollout", estimate.rollout()), ("update", estimate.update())):
        moment, parts = max(phase.items(), key=lambda item: sum(item[1].values()))
        lines.append(f"\n{name}, fullest in: {moment}")
        lines += [f"  {part:32}{size / GB:9.2f}" for part, size in parts.items()]
        others = [f"{k} {sum(v.values()) / GB:.2f}" for k, v in phase.items() if k != moment]
        lines.append(f"  {'together':32}{sum(parts.values()) / GB:9.2f}   ({', '.join(others)})")
    lines.append("\n  GPU, GB   fits   largest context   most terminals")
    contexts = range(1024, model.config.max_position_embeddings + 1, 1024)
    for size in GPUS:
        fits = "yes" if max(estimate.peak()) <= size * GB else "no"
        context = largest(model, config, "context", contexts, size * GB)
        terminals = largest(model, config, "terminals", range(1, 257), size * GB)
        lines.append(f"  {size:7}   {fits:>4}   {context:15}   {terminals:14}")
    lines.append("  a group may be larger than the number of terminals: it is then played in parts")
    names = inspect.signature(days).parameters.values()
    assumed = ", ".join(f"{p.name} {p.default:g}" for p in names if p.name != "estimate")
    spent = days(estimate)
    lines.append(f"\n{config.steps} steps: {sum(spent.values()):.1f} days on one GPU, if {assumed}")
    lines.append("  " + ", ".join(f"{part} {value:.2f}" for part, value in spent.items()))
    return "\n".join([*lines, lost_updates(config)]).rstrip()
