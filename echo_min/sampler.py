"""Batched sampling with a key-value cache that lives across an episode's turns: no token is ever fed twice.

Rows have different lengths and are not padded on the left: each row writes at its own position. A short row's
padding lands beyond its end, where no query looks (key position <= query position) before it is overwritten.
"""

import numpy as np
import torch
from transformers.cache_utils import Cache

from echo_min.config import RunStopped

Reply = tuple[list[int], list[float]]  # ids, and their logprobs under the full softmax at the temperature


class RowCache(Cache):
    """Keys and values [B, heads, S, head_dim] per layer, written at a row's own positions."""

    def __init__(self):
        super().__init__(layers=[])
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.positions = None  # [B, T], where the coming forward pass writes
        self.size = 0  # S: key slots that the coming forward pass can see

    def update(self, keys, values, layer_idx, *args, **kwargs):
        if layer_idx == len(self.keys):
            self.keys.append(keys.new_zeros(0))
            self.values.append(values.new_zeros(0))
        index = self.positions[:, None, :, None].expand_as(keys)
        for store, new in ((self.keys, keys), (self.values, values)):
            old = store[layer_idx]
            if old.dim() == 1 or old.shape[2] < self.size:  # grow in steps, so that growing stays rare
                grown = new.new_zeros(*new.shape[:2], -(-self.size // 64) * 64, new.shape[3])
                if old.dim() > 1:
                    grown[:, :, : old.shape[2]] = old
                store[layer_idx] = old = grown
            old.scatter_(2, index, new)
        return self.keys[layer_idx][:, :, : self.size], self.values[layer_idx][:, :, : self.size]

    def keep(self, rows: torch.Tensor) -> None:
        for stores in self.keys, self.values:
            for layer, store in enumerate(stores):  # one at a time: never the whole cache twice
                stores[layer] = store[rows]


class Sampler:
    """Samples replies for a batch of episodes; one Sampler serves one batch, turn after turn.

    noise[B, n]: uniform numbers in [0, 1); a row's i-th sampled token is decided by its i-th number alone, so
    a rollout does not depend on who shares its batch. None: greedy.
    """

    def __init__(self, model, stop_ids: set[int], temperature: float, noise: np.ndarray | None):
        self.model, self.temperature, self.noise = model, temperature, noise
        self.stop_ids = torch.tensor(sorted(stop_ids), device=model.device)
        self.cache = RowCache()
        self.rows: list[int] = []  # episodes in the cache, in its order
        self.length = None  # [B] tokens of each row in the cache
        self.unread: dict[int, list[int]] = {}  # a row's last sampled token, which the model has not read yet
        self.drawn: dict[int, int] = {}

    @torch.inference_mode()
    def reply(self, rows: list[int], new_ids: list[list[int]], max_new: int) -> list[Reply]:
        """Append new_ids to the given episodes and sample a reply to each: at most max_new tokens, up to and
        with the first stop id. Episodes left out are finished and leave the cache.

        Raises RunStopped if the model's logits are not finite.
        """
        device = self.model.device
        if self.length is None:
            self.rows, self.length = list(rows), torch.zeros(len(rows), dtype=torch.int64, device=device)
        elif rows != self.rows:
            kept = torch.tensor([self.rows.index(row) for row in rows], device=device)
            self.cache.keep(kept)
            self.rows, self.length = list(rows), self.length[kept]
        B = len(rows)
        logits = self._read([self.unread.pop(row, []) + ids for row, ids in zip(rows, new_ids, strict=True)])
        tokens = torch.zeros(B, max_new, dtype=torch.int64, device=device)
        logprobs = torch.zeros(B, max_new, device=device)
        counts = torch.full((B,), max_new, device=device)
        first = np.array([self.drawn.get(row, 0) for row in rows])
        for i in range(max_new):
            tokens[:, i], logprobs[:, i] = self._pick(logits, rows, first + i)
            stopped = torch.isin(tokens[:, i], self.stop_ids) & (counts == max_new)
            counts[stopped] = i + 1
            if i + 1 == max_new or bool((counts < max_new).all()):
                break
            # a row that has stopped reads on at one place beyond its end: one shape for the whole batch
            positions = self.length + torch.clamp(counts, max=i)
            logits = self._forward(tokens[:, i : i + 1], positions[:, None])
        replies = []
        for row, n, ids, logps in zip(rows, counts.tolist(), tokens.tolist(), logprobs.tolist(), strict=True):
            self.unread[row] = [ids[n - 1]]
            self.drawn[row] = self.drawn.get(row, 0) + n
            replies.append((ids[:n], logps[:n]))
        self.length += counts - 1
        return replies

    def _read(self, ids: list[list[int]]) -> torch.Tensor:
        """Prefill rows of different lengths. -> logits[B, V] after each row's last token."""
        counts = torch.tensor([len(row) for row in ids], device=self.model.device)
        padded = torch.zeros(len(ids), int(counts.max()), dtype=torch.int64, device=self.model.device)
        for b, row in enumerate(ids):
            padded[b, : len(row)] = torch.tensor(row)
        positions = self.length[:, None] + torch.arange(padded.shape[1], device=padded.device)
        logits = self._forward(padded, positions, last=counts - 1)
        self.length += counts
        return logits

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, last=0) -> torch.Tensor:
        """ids[B, T], positions[B, T] -> float32 logits[B, V] at column `last`, an int or [B]."""
        self.cache.positions, self.cache.size = positions, int(positions.max()) + 1
        slots = torch.arange(self.cache.size, device=ids.device)  # [S]
        visible = slots <= positions[:, None, :, None]  # [B, 1, T, S]
        where = {"position_ids": positions, "attention_mask": visible, "past_key_values": self.cache}
        hidden = self.model.base_model(input_ids=ids, use_cache=True, **where).last_hidden_state  # [B, T, d]
        hidden = hidden[torch.arange(len(ids), device=ids.device), last]
        return self.model.get_output_embeddings()(hidden).float()

    def _pick(self, logits: torch.Tensor, rows: list[int], draw) -> tuple[torch.Tensor, torch.Tensor]:
        """logits[B, V] -> tokens[B], their logprobs[B]."""
        logprobs = torch.log_softmax(logits / self.temperature, -1)
        if self.noise is None:
            tokens = logits.argmax(-1)
        else:
            u = torch.as_tensor(self.noise[rows, draw], device=logits.device)[:, None]
            cdf = logprobs.double().exp().cumsum(-1)
            tokens = torch.searchsorted(cdf, u * cdf[:, -1:]).squeeze(1).clamp_max(logits.shape[1] - 1)
        picked = logprobs.gather(1, tokens[:, None]).squeeze(1)
        if not torch.isfinite(picked).all():
            raise RunStopped("sampler: the logits are not finite; the policy has diverged")
        return tokens, picked
