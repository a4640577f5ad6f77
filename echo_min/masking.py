"""Roles: who wrote each token. Every mask and every loss weight is read off them.

A transcript only appends. What the model sampled is stored as sampled; all other text is tokenised segment by
segment, so a role boundary is a token boundary and nothing is ever decoded and encoded again.
"""

import threading
from dataclasses import dataclass, field
from enum import IntEnum

import torch


class Role(IntEnum):
    PROMPT = 0  # system and task text
    ACTION = 1  # sampled by the model, its end-of-turn token included
    OBSERVATION = 2  # what the terminal printed
    WARNING = 3  # the harness's complaint about a malformed reply
    SCAFFOLD = 4  # chat markers, role headers, exit-code line, truncation note


Segment = tuple[Role, str]
_one_at_a_time = threading.Lock()  # split_special_tokens is state of the tokenizer: threads would mix it up


def encode(tokenizer, role: Role, text: str) -> list[int]:
    """Token ids of one segment. Only SCAFFOLD, which this code wrote, may contain chat markers: in a task or
    in terminal output `<|im_end|>` stays text and cannot forge a turn."""
    text = text.encode("utf-8", "replace").decode()  # lone surrogates have no tokens
    options = {"add_special_tokens": False, "split_special_tokens": role is not Role.SCAFFOLD}
    with _one_at_a_time:
        return tokenizer.encode(text, **options)


@dataclass
class Transcript:
    """One episode's tokens: an id, a role and a logprob each; the sampler's logprob, or 0 if not ACTION."""

    ids: list[int] = field(default_factory=list)
    roles: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def append(self, role: Role, ids: list[int], logprobs: list[float] | None = None) -> None:
        if (role is Role.ACTION) != (logprobs is not None) or len(ids) != len(logprobs or ids):
            raise ValueError("logprobs: exactly the ACTION tokens have one each")
        self.ids += ids
        self.roles += [int(role)] * len(ids)
        self.logprobs += logprobs or [0.0] * len(ids)

    def count(self, role: Role) -> int:
        return self.roles.count(role)

    def __len__(self) -> int:
        return len(self.ids)


def pad(transcripts: list[Transcript], pad_id: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> ids[B, T] int64, roles[B, T] int8, logprobs[B, T] float32. Padding is on the right, where a causal
    model never looks, and has the role SCAFFOLD, which no loss reads."""
    B, T = len(transcripts), max(map(len, transcripts))
    ids = torch.full((B, T), pad_id, dtype=torch.int64)
    roles = torch.full((B, T), Role.SCAFFOLD, dtype=torch.int8)
    logprobs = torch.zeros(B, T)
    for b, transcript in enumerate(transcripts):
        n = len(transcript)
        ids[b, :n] = torch.tensor(transcript.ids)
        roles[b, :n] = torch.tensor(transcript.roles, dtype=torch.int8)
        logprobs[b, :n] = torch.tensor(transcript.logprobs)
    return ids, roles, logprobs


def observation_targets(roles: torch.Tensor, warnings_as_targets: bool = False) -> torch.Tensor:
    """O' (paper, section 2): the tokens that the environment loss predicts. roles[B, T] -> bool[B, T]."""
    selected = roles == Role.OBSERVATION
    return selected | (roles == Role.WARNING) if warnings_as_targets else selected


def policy_weights(roles: torch.Tensor, groups: torch.Tensor, norm: str = "sequence") -> torch.Tensor:
    """Share of each action token in the policy loss. roles[B, T], groups[B] -> float32[B, T], 0 elsewhere.

    sequence: 1 / (B |A_i|), the mean over rollouts of each rollout's token mean: what the released code ran.
    token: 1 / (groups * sum of |A_j| over the group), eq. (2) as printed: the groups' mean of a token mean.
    """
    action = (roles == Role.ACTION).float()
    tokens = action.sum(1)  # [B] |A_i|
    if norm == "sequence":
        share = 1 / (len(roles) * tokens)
    elif norm == "token":
        _, index = groups.unique(return_inverse=True)
        in_group = torch.zeros(int(index.max()) + 1).index_add_(0, index, tokens)  # [groups] sum of |A_j|
        share = 1 / (len(in_group) * in_group[index])
    else:
        raise ValueError(f"policy_norm: {norm!r} is not one of sequence, token")
    return torch.where(action > 0, share[:, None], 0.0)


def observation_weights(
    roles: torch.Tensor, norm: str = "observation", warnings_as_targets: bool = False
) -> torch.Tensor:
    """Share of each observation target in the environment loss. roles[B, T] -> float32[B, T], 0 outside O'.

    observation: 1 / (B |O_i|), eq. (3), where |O_i| counts warnings too.
    selected: 1 / (B |O'_i|). global: 1 / sum |O'_i|.
    """
    selected = observation_targets(roles, warnings_as_targets).float()
    if norm == "observation":
        share = 1 / (len(roles) * ((roles == Role.OBSERVATION) | (roles == Role.WARNING)).float().sum(1))
    elif norm == "selected":
        share = 1 / (len(roles) * selected.sum(1))
    elif norm == "global":
        share = (1 / selected.sum()).expand(len(roles))
    else:
        raise ValueError(f"observation_norm: {norm!r} is not one of observation, selected, global")
    return torch.where(selected > 0, share[:, None], 0.0)


def micro_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Rows, longest first, in parts of at most `budget` padded tokens (or one row)."""
    parts: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if parts and (len(parts[-1]) + 1) * lengths[parts[-1][0]] <= budget:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts
