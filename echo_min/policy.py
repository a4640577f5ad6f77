"""The policy: a causal language model and its tokenizer, from scratch or in Hugging Face format."""

from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from echo_min.config import Config, RunEnded
from echo_min.harness import END, MARKERS
from kernels.segment_logprob import dual_segment_logprobs, head_weight

logging.disable_progress_bar()

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SAVED = "in its config.json"
ADVICE = {  # phase -> what to do when memory runs out in it
    "rollout": f"{SAVED} lower terminals, prefill_tokens or context",
    "update": f"{SAVED} lower micro_batch_tokens, logit_mb or context, or set gradient_checkpointing",
    "supervised stage": f"{SAVED} lower prefill_tokens or logit_mb, or set gradient_checkpointing",
    "evaluation": "pass a lower --terminals",
    "loading of the model": "take a smaller one, or dtype bfloat16",
}


@contextmanager
def enough_memory(phase: str):
    """Raises RunEnded that says what to do if memory runs out in this phase of ADVICE."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        what = str(error).split("\n")[0].rpartition("DefaultCPUAllocator: ")[2]
        raise RunEnded(f"out of memory in the {phase}: {ADVICE[phase]} ({what})") from None


def ran_out(error: Exception) -> bool:
    texts = "can't allocate memory", "can't start new thread", "CUDA error: out of memory", "ALLOC_FAILED"
    said = any(text in str(error) for text in texts)  # by torch, Python, CUDA, cuBLAS
    return said or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def tiny_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the given texts: frequent words are one token, any other byte string has
    tokens too, and decoding gives the text back exactly."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r" ?[^\s]+|\s"), "isolated")
    by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, by_byte])
    tokenizer.decoder = decoders.ByteLevel()
    options = {"special_tokens": list(MARKERS), "initial_alphabet": sorted(by_byte.alphabet())}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **options)
    tokenizer.train_from_iterator(texts, trainer)
    special = {"eos_token": END, "pad_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>"]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHATML, **special)


def tiny_model(tokenizer, seed: int) -> Qwen3ForCausalLM:
    """Qwen3's architecture with two layers, from random weights."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def located(name: str) -> tuple[str, dict]:
    """A folder, a Hugging Face name, or a package with a GGUF file -> what from_pretrained takes."""
    if name.isidentifier() and not Path(name).exists() and (package := find_spec(name)):
        name = next(iter(package.submodule_search_locations or [name]))
    files = sorted(Path(name).glob("*.gguf"))
    return name, {"gguf_file": files[0].name} if files else {}


@enough_memory("loading of the model")
def load_policy(
    name: str | Path, device: str = "cpu", dtype: str = "float32", gradient_checkpointing: bool = False
):
    """-> (model, tokenizer) from a folder, a Hugging Face name, or an installed package with a GGUF file.

    Raises ValueError saying what is wrong, RunEnded if memory runs out.
    """
    source, options = located(str(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if options:  # weights to train, not the blocks of few bits that the file holds
            options["quantization_config"] = GgufConfig(dequantize=True)
        model, found = AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, dtype), output_loading_info=True, **options
        )
    except Exception as error:  # foreign files: every kind of error comes out of them
        if ran_out(error):
            raise
        reason = str(error).strip().split("\n")[0]
        problem = f"{name}: neither a checkpoint folder nor a model that can be fetched ({reason})"
        raise ValueError(problem) from None
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{name}: no weights for {len(missing)} parameters ({missing[0]}, ...)")
    if missing := {END, "<|im_start|>"} - set(marker_ids(tokenizer).values()):
        raise ValueError(f"{name}: its tokenizer has no {' '.join(missing)}; only ChatML models will do")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise ValueError(f"{name}: its tokenizer has more tokens ({len(tokenizer)}) than its embedding")
    try:
        head_weight(model)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from None
    if gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.to(device), tokenizer


def on_this_machine(config: Config) -> Config:
    """Set torch's threads and settle device "auto". Raises ValueError if the device is not there."""
    if config.threads:
        torch.set_num_threads(config.threads)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {device!r} can't be used here: {error}") from None
    return replace(config, device=device)


def marker_ids(tokenizer) -> dict[int, str]:
    """The ids at which a reply stops, and their text."""
    ids = {tokenizer.convert_tokens_to_ids(marker): marker for marker in MARKERS}
    return {i: m for i, m in ids.items() if i is not None and tokenizer.convert_ids_to_tokens(i) == m}


def segment_logprobs(
    model,
    ids: torch.Tensor,
    targets: torch.Tensor,
    action_mask: torch.Tensor,
    observation_mask: torch.Tensor,
    action_temperature: float = 1.0,
    observation_temperature: float = 1.0,
    logit_mb: int = 3072,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward pass. ids, targets, masks [B, T] -> float32 logprobs (action[Na], observation[No]).

    targets is ids, except in a placebo. Padding must be on the right.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:  # it recomputes in training only; what is inside it stays as it is, so no dropout
        layer.training = layer.gradient_checkpointing and torch.is_grad_enabled()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, d]
    for layer in layers:
        layer.training = False  # the sampler keeps its cache
    masks = action_mask.to(ids.device), observation_mask.to(ids.device)
    rest = *masks, action_temperature, observation_temperature
    return dual_segment_logprobs(hidden, head_weight(model), targets, *rest, logit_bytes=logit_mb << 20)
