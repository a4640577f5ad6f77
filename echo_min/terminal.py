"""The terminal of one episode: what every backend promises, and the one list of backends."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module

from echo_min.tasks import Task

BACKENDS = {  # name -> module and class; imported when used, so nobody needs another's packages
    "sandbox": ("echo_min.terminals.sandbox", "Sandbox"),  # bubblewrap, on this machine
    "docker": ("echo_min.terminals.docker", "Container"),  # the engine that DOCKER_HOST names
}
COMMAND_BYTES = 64 * 1024  # of one command at most
GRACE_SECONDS = 3.0  # beyond a time limit, to kill what is late: milliseconds, but the machine may be crowded


@dataclass(frozen=True)
class Output:
    """What a command printed, stdout and stderr as they came, and how it ended. Timed out: exit code 124."""

    text: str
    exit_code: int
    timed_out: bool
    truncated: bool  # text is only the first output_chars characters


class TerminalDied(RuntimeError):
    """The environment itself is gone, or the verifier gave no verdict. Says nothing about the agent."""


class BrokenByAgent(TerminalDied):
    """The same, while engine and host are well: what an agent broke, once it ran a command, is graded 0."""


class Terminal(AbstractContextManager):
    """One episode's terminal, for a `with` block, in a fresh copy of the task's work folder. Many may run at
    once in many threads; each serves one thread at a time. A backend adds these, and `run` is common:

    _command(data: bytes, seconds) -> str    run a command that ends in NUL, _keep what it prints
                                             -> its exit code, or "late"
    copy_in(folder: Path, target: str)       copy a folder's content to an absolute path; ValueError where
                                             the backend has no such path
    verify() -> float                        the reward, as the task's verifier says
    close()                                  end every process of the episode; may be called again

    All raise TerminalDied.
    """

    def __init__(self, task: Task, output_chars: int, at_once: int = 1):
        """at_once: so many share the machine. ValueError: a file or tool would lie elsewhere."""
        self.task, self.output_chars, self.at_once = task, output_chars, at_once
        self._text = bytearray()  # of the command at work
        self.verifier_output = ""  # the last 64 KiB of what a container's verifier printed
        for name in [*task.files, *task.tools]:
            if not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
                raise ValueError(f"task {task.name}: file {name!r} must have a path below the work folder")

    def run(self, command: str, timeout: float | None = None) -> Output:
        """Run it in a fresh bash in the work folder. timeout: seconds; None means the task's command_seconds.
        Its background processes live on, unless it timed out. Raises TerminalDied if the environment is gone,
        or has to go because it holds more than the task's work_mb."""
        data = command.encode(errors="replace") + b"\0"
        if data.count(b"\0") > 1 or len(data) > COMMAND_BYTES:
            return Output("bash: the command holds a NUL byte or is too long\n", 126, False, False)
        self._text = bytearray()
        said = self._command(data, self.task.limits.command_seconds if timeout is None else timeout)
        text, late = self._text.decode(errors="replace"), said == "late"
        shown, cut = text[: self.output_chars], len(text) > self.output_chars
        return Output(shown, 124 if late else int(said), late, cut)

    def __exit__(self, *_):
        self.close()

    def _keep(self, data: bytes) -> None:
        """As much as can be shown, and a little more: a character has up to 4 bytes."""
        self._text += data[: max(0, 4 * self.output_chars + 4 - len(self._text))]


def open_terminal(task: Task, backend="sandbox", output_chars: int = 50_000, at_once: int = 1) -> Terminal:
    """backend: one of BACKENDS. output_chars: kept of one command's output. Raises ValueError for an unknown
    backend or files that can't be laid out, RunEnded when this machine has no such backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} does not exist; there is {', '.join(BACKENDS)}")
    if task.environment and backend == "sandbox":
        raise ValueError(f"task {task.name} asks for a container of its own: --backend docker")
    module, name = BACKENDS[backend]
    return getattr(import_module(module), name)(task, output_chars, at_once)
