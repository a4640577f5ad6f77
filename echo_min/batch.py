"""Batch: all that passes from a step's rollouts to the loss. Made once, then cut into micro-batches."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from echo_min.config import Config
from echo_min.echo import observation_mask, observation_weights
from echo_min.grpo import action_weights, group_advantages
from echo_min.masking import Role, Transcript


@dataclass
class Batch:
    """B rollouts of at most T tokens. The weights hold each term's normaliser over the whole batch, so the
    losses of micro-batches simply add up."""

    ids: Tensor  # [B, T] int64, what the model reads; padded on the right, where it never looks
    targets: Tensor  # [B, T] int64, what it shall predict: ids, unless a control says otherwise
    action_mask: Tensor  # [B, T] bool, A: what the policy wrote
    observation_mask: Tensor  # [B, T] bool, O': what the terminal wrote and the policy shall predict
    action_weights: Tensor  # [B, T] float32, share of each action in the policy loss
    observation_weights: Tensor  # [B, T] float32, share of each target in the observation loss
    sampler_logprobs: Tensor  # [B, T] float32, of the actions, as they were sampled
    advantages: Tensor  # [B] float32
    rewards: Tensor  # [B] float32
    groups: Tensor  # [B] int64, rollouts of one task share a number
    lengths: Tensor  # [B] int64, tokens without padding

    def __len__(self) -> int:
        return len(self.ids)

    def micro_batches(self, tokens: int, device: str | torch.device = "cpu") -> Iterator["Batch"]:
        """Parts of at most `tokens` padded tokens (or one rollout), longest rollouts first, on the device."""
        lengths, parts = self.lengths.tolist(), []
        for row in sorted(range(len(self)), key=lambda row: -lengths[row]):
            if parts and (len(parts[-1]) + 1) * lengths[parts[-1][0]] <= tokens:
                parts[-1].append(row)
            else:
                parts.append([row])
        for rows in [range(len(self))] if len(parts) == 1 else parts:
            yield self.part(list(rows), device)

    def part(self, rows: list[int], device: str | torch.device = "cpu") -> "Batch":
        """These rollouts alone, without padding that none of them needs."""
        T = int(self.lengths[rows].max())
        values = (getattr(self, field.name)[rows] for field in fields(self))
        return Batch(*((v[:, :T] if v.dim() == 2 else v).to(device) for v in values))


def make_batch(episodes: list, config: Config) -> Batch:
    """From rollout.Episodes; those that are not valid are left out. Reads the settings of the objective."""
    episodes = [episode for episode in episodes if episode.valid]
    ids, roles, logprobs = pad([episode.transcript for episode in episodes])  # [B, T] each
    rewards, groups = (torch.tensor([getattr(e, name) for e in episodes]) for name in ("reward", "group"))
    actions = roles == Role.ACTION
    observations = observation_mask(roles, config.warnings_as_targets, config.parsed_only)
    return Batch(
        ids=ids, targets=ids, action_mask=actions, observation_mask=observations,
        action_weights=action_weights(actions, groups, config.policy_norm),
        observation_weights=observation_weights(roles, observations, config.observation_norm),
        sampler_logprobs=logprobs, advantages=group_advantages(rewards, groups), rewards=rewards,
        groups=groups, lengths=torch.tensor([len(episode.transcript) for episode in episodes]),
    )  # fmt: skip


def pad(transcripts: list[Transcript]) -> tuple[Tensor, Tensor, Tensor]:
    """-> ids[B, T] int64, roles[B, T] int8, logprobs[B, T] float32. Padding is SCAFFOLD: no loss reads it."""

    def padded(name: str, dtype: torch.dtype, padding: int = 0) -> Tensor:
        rows = [torch.tensor(getattr(transcript, name), dtype=dtype) for transcript in transcripts]
        return pad_sequence(rows, batch_first=True, padding_value=padding)

    ids, roles = padded("ids", torch.int64), padded("roles", torch.int8, Role.SCAFFOLD)
    return ids, roles, padded("logprobs", torch.float32)
