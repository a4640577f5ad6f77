"""How long a command may run, and what else one episode of a task may take."""

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """What one episode of a task may take. Times in seconds, sizes in MiB. ValueError names a bad field."""

    command_seconds: float = 5.0  # one command
    agent_seconds: float = 60.0  # all turns together
    verifier_seconds: float = 5.0
    memory_mb: int = 256  # address space of one process; a Harbor task's container has sizes of its own
    work_mb: int = 16  # the work folder
    processes: int = 32  # alive at one time

    def __post_init__(self):
        for limit in fields(self):
            value, whole = getattr(self, limit.name), limit.type is int
            if type(value) not in ((int,) if whole else (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{limit.name}: expected a {'whole ' * whole}number above 0, got {value!r}")
        if self.processes < 4:
            raise ValueError(f"processes: expected at least 4, for bash and a pipe, got {self.processes}")
