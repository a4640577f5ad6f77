"""Roles: who wrote each token. Every mask and every loss weight is read off them.

A transcript only appends. What the model sampled is stored as sampled; all other text is tokenised segment by
segment, so a role boundary is a token boundary and nothing is ever decoded and encoded again."""

import threading
from dataclasses import dataclass, field
from enum import IntEnum


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
        if (len(ids) if role is Role.ACTION else -1) != (-1 if logprobs is None else len(logprobs)):
            raise ValueError("logprobs: exactly the ACTION tokens have one each")
        self.ids += ids
        self.roles += [int(role)] * len(ids)
        self.logprobs += logprobs or [0.0] * len(ids)

    def count(self, role: Role) -> int:
        return self.roles.count(role)

    def __len__(self) -> int:
        return len(self.ids)
