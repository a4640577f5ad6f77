"""A task: what the agent is asked, what lies in its work folder, and the script that decides the reward."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from echo_min.limits import Limits


@dataclass(frozen=True)
class Task:
    """`verify` and `solution` are bash scripts; both run in the work folder. verify exits with 0 for reward 1
    and with 1 for reward 0; any other exit is an error of the infrastructure. With an environment, it writes
    the reward to a file instead (terminals/docker.py)."""

    name: str
    instruction: str
    verify: str
    solution: str
    files: dict[str, bytes] = field(default_factory=dict)  # path below the work folder -> content
    tools: dict[str, bytes] = field(default_factory=dict)  # name -> executable on PATH, read-only
    limits: Limits = field(default_factory=Limits)
    environment: Any = None  # the container that a Harbor task asks for (worlds/harbor.py)


@dataclass(frozen=True)
class World:
    """A family of generated tasks; train and held_out share none. A script is what an agent types, blindly.
    The weak agent's demonstrations teach a base policy the world's form and none of its facts. The expert's
    trajectories are never trained on; observation CE is measured on them."""

    train: list[Task]
    held_out: list[Task]
    weak: Callable[[random.Random], tuple[Task, list[str]]]  # a fresh demonstration
    expert: Callable[[Task, random.Random], list[str]]
    telling: tuple[str, ...] = ()  # words of an observation that tell what to do
