"""Batched sampling with a key-value cache that lives across an episode's turns: no token is ever fed twice.

Rows have different lengths and are not padded on the left: each row writes at its own position. A short row's
padding lands beyond its end, where no query looks (none looks ahead) before it is overwritten."""

from math import isfinite

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, get_layer_types_and_kwargs

from echo_min.config import Config, RunEnded

Reply = tuple[list[int], list[float]]  # ids, and their logprobs under the full softmax at the temperature
WORTH = 32  # tokens: a reply with fewer to come does not pay for a copy of the cache
BUCKET = 256  # slots: on CUDA attention sees a multiple of it, as kernels are chosen anew for every new shape


class RowCache(Cache):
    """Keys and values [B, heads, slots, head_dim] per layer, written at a row's own positions."""

    def __init__(self, limit: int):
        super().__init__(layers=[])
        self.keys, self.values = [], []  # a tensor for each layer
        self.positions = None  # [n, T], where the coming forward pass, of the first n rows, writes
        self.size, self.limit = 0, limit  # S: slots that it can see; slots at most

    def update(self, keys, values, layer_idx, *args, **kwargs):
        n = len(keys)
        for store, new in ((self.keys, keys), (self.values, values)):
            if layer_idx == len(store):
                store.append(new[:, :, :0])
            old = store[layer_idx]
            if old.shape[2] < self.size:  # doubled, so that growing stays rare
                slots = min(max(-(-self.size // 64) * 64, 2 * old.shape[2]), self.limit)
                store[layer_idx] = torch.nn.functional.pad(old, (0, 0, 0, slots - old.shape[2]))
            store[layer_idx][:n].scatter_(2, self.positions[:, None, :, None].expand_as(new), new)
        return self.keys[layer_idx][:n, :, : self.size], self.values[layer_idx][:n, :, : self.size]

    def arrange(self, rows: list[int]) -> None:
        """Row b becomes what row rows[b] was; a layer at a time, as two whole caches may not fit."""
        for store in (self.keys, self.values):
            for i, old in enumerate(store):
                store[i] = old[rows]


class Sampler:
    """Samples replies for a batch of episodes, turn after turn. An episode is a number. noise[episode]: its
    i-th sampled token is decided by the i-th number drawn from this generator alone, so a rollout does not
    depend on who shares its batch; None: greedy. Raises ValueError for a model with layers that do not attend
    to every token before."""

    def __init__(self, model, end_ids: set[int], config: Config, noise: list[np.random.Generator] | None):
        self.model, self.end_ids, self.noise, self.config = model, end_ids, noise, config
        kinds, options = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
        for kind, option in zip(kinds, options, strict=True):
            if kind != "full_attention" and (option.get("sliding_window") or 0) < config.context:
                raise ValueError(f"model: it has layers of {kind}; the sampler's cache is for full attention")
        # no less than 512: padding may be that far out, and results depend on the width seen, by rounding
        self.cache = RowCache(max(config.context, 512))
        self.length: dict[int, int] = {}  # episode -> tokens in the cache; in the order of its rows
        self.unread: dict[int, list[int]] = {}  # episode -> the last sampled token, not in the cache yet

    @torch.inference_mode()
    def reply(self, episodes: list[int], new_ids: list[list[int]], max_new: int) -> list[Reply]:
        """Append new_ids to the given episodes and sample a reply to each: at most max_new tokens, up to and
        with the first end id. Episodes that are new enter the cache, those left out are finished and leave.
        Raises RunEnded if the model's logits are not finite, ValueError if the context can't hold a reply."""
        held = [e for e in self.length if e in episodes]
        self._arrange(held + [e for e in episodes if e not in held])
        new = {e: self.unread.get(e, []) + ids for e, ids in zip(episodes, new_ids, strict=True)}
        if max(self.length[e] + len(ids) for e, ids in new.items()) + max_new > self.config.context:
            raise ValueError(f"context: {self.config.context} tokens do not hold a reply of {max_new}")
        if len(new) * max(map(len, new.values())) > self.config.prefill_tokens:
            self._arrange(sorted(self.length, key=lambda e: -len(new[e])))
        logits = self._read([new[e] for e in self.length])
        replies: dict[int, Reply] = {e: ([], []) for e in episodes}
        batch, ended = list(self.length), set()  # sampled from in one pass; those whose reply is complete
        for i in range(max_new):
            noise = [0.0 if self.noise is None or e in ended else self.noise[e].random() for e in batch]
            tokens, logprobs = self._pick(logits, noise)
            for e, token, logprob in zip(batch, tokens.tolist(), logprobs.tolist(), strict=True):
                if e in ended:
                    continue
                if not isfinite(logprob):
                    raise RunEnded("sampler: the logits are not finite; the policy has diverged")
                replies[e][0].append(token)
                replies[e][1].append(logprob)
                if token in self.end_ids:
                    ended.add(e)
            going = [e for e in batch if e not in ended]
            if not going or i + 1 == max_new:
                break
            if 2 * len(going) <= len(batch) and max_new - i > WORTH:  # go on with a smaller batch
                tokens, batch = tokens[[b for b, e in enumerate(batch) if e not in ended]], going
                self._arrange(batch + [e for e in self.length if e not in batch])
            # a row whose reply has ended reads on at one place beyond its end: one shape for the whole batch
            places = [self.length[e] + min(len(replies[e][0]), i) for e in batch]
            logits = self._logits(self._forward(tokens[:, None], torch.tensor(places)[:, None])[:, 0])
        self.unread = {e: ids[-1:] for e, (ids, _) in replies.items()}
        self.length = {e: n + len(replies[e][0]) - 1 for e, n in self.length.items()}
        return [replies[e] for e in episodes]

    def _arrange(self, episodes: list[int]) -> None:
        """Let the cache's rows hold these episodes, in this order. A newcomer gets a copy of some row, of
        which it sees nothing."""
        row = {e: b for b, e in enumerate(self.length)}
        if episodes != list(self.length):
            self.cache.arrange([row.get(e, 0) for e in episodes])
            self.length = {e: self.length.get(e, 0) for e in episodes}

    def _read(self, ids: list[list[int]]) -> Tensor:
        """Prefill every episode with its ids. -> logits[B, V] after each one's last. In parts of columns, of
        at most prefill_tokens with the padding; if there are several, ids come longest first."""
        first, hidden = 0, None
        while n := sum(len(new) > first for new in ids):
            end = min(len(max(ids, key=len)), first + max(1, self.config.prefill_tokens // n))
            parts = [new[first:end] for new in ids[:n]]
            padded = torch.tensor([part + [0] * (end - first - len(part)) for part in parts])
            lengths = torch.tensor([*self.length.values()][:n])
            # rows differ in length: the padding of a long one would end beyond the context
            positions = (lengths[:, None] + torch.arange(first, end)).clamp_max(self.cache.limit - 1)
            out = self._forward(padded, positions)
            ends = [b for b in range(n) if len(ids[b]) <= end]
            hidden = out.new_empty(len(ids), out.shape[2]) if hidden is None else hidden
            hidden[ends] = out[ends, [len(parts[b]) - 1 for b in ends]]
            first = end
        self.length = {e: n + len(new) for (e, n), new in zip(self.length.items(), ids, strict=True)}
        return self._logits(hidden)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids[n, T] for the first n rows at positions[n, T]. -> hidden[n, T, d]"""
        # on the CPU still: nothing waits for the device
        size, fresh = int(positions.max()) + 1, not positions[:, 0].any()
        ids, positions = ids.to(self.model.device), positions.to(self.model.device)
        if positions.is_cuda:
            size = min(-(-size // BUCKET) * BUCKET, self.cache.limit)
        self.cache.size, self.cache.positions = size, positions
        visible = None  # rows at their start: the causal flag says it all, and lets CUDA take its fast kernel
        if not fresh:
            visible = torch.arange(size, device=ids.device) <= positions[:, None, :, None]  # [n, 1, T, S]
        where = {"position_ids": positions, "attention_mask": visible, "past_key_values": self.cache}
        return self.model.base_model(input_ids=ids, use_cache=True, **where).last_hidden_state

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(hidden).float()

    def _pick(self, logits: Tensor, noise: list[float]) -> tuple[Tensor, Tensor]:
        """logits[B, V], noise[B] in [0, 1) -> tokens[B], their logprobs[B]."""
        logprobs = torch.log_softmax(logits / self.config.temperature, -1)
        if self.noise is None:
            tokens = logits.argmax(-1)
        else:
            cdf = logprobs.double().exp().cumsum(-1)
            share = torch.tensor(noise, dtype=cdf.dtype, device=cdf.device)[:, None]
            tokens = torch.searchsorted(cdf, share * cdf[:, -1:]).squeeze(1).clamp_max(logits.shape[1] - 1)
        return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)
