"""The conversation: how a task becomes a prompt, a reply an action, and a command's output the next message.

Everything here is text with a role; ids are made elsewhere. The template is ChatML; messages are appended and
never rendered again, so earlier thinking stays in context. Two styles, Config's `harness`: plain, where a
reply is one bash command as it would be typed, or the word `done`; and qwen, the paper's, where a reply is
thinking and one tool call (harness_qwen.py)."""

from dataclasses import dataclass

from echo_min.masking import Role, Segment
from echo_min.tasks import Task
from echo_min.terminal import Output

END = "<|im_end|>"  # closes a message; the only token that ends a reply well
MARKERS = (END, "<|im_start|>", "<|endoftext|>")  # a reply ends at any of them
DONE = "done"  # a plain reply, or a script's line, that ends the episode
ASSISTANT = f"{END}\n<|im_start|>assistant\n"  # closes a message and opens the reply to it
WARNINGS = CUT, FORGED, EMPTY = (
    "The reply was cut at its token limit; nothing was run.",
    "The reply contained a chat marker; nothing was run.",
    "The reply was empty; nothing was run.",
)


@dataclass(frozen=True)
class Action:
    """What a reply asks for: a command, or the episode's end, or, with a warning, nothing."""

    command: str = ""
    timeout: float | None = None  # seconds
    done: bool = False
    warning: str = ""


def prompt(task: Task, style: str = "plain") -> list[Segment]:
    task_message = [(Role.SCAFFOLD, "<|im_start|>user\n"), (Role.PROMPT, task.instruction)]
    if style == "qwen":
        system = [(Role.SCAFFOLD, "<|im_start|>system\n"), (Role.PROMPT, _qwen().SYSTEM)]
        task_message = [*system, (Role.SCAFFOLD, f"{END}\n"), *task_message]
    return [*task_message, (Role.SCAFFOLD, ASSISTANT)]


def reply(command: str, style: str = "plain") -> str:
    """A command, or DONE, as a policy would have written it."""
    return _qwen().reply(command) if style == "qwen" else command


def parse(reply: str, ended_by: str | None, style: str = "plain") -> Action:
    """reply: its text without the marker that ended it; ended_by: that marker, None if the limit cut it."""
    if ended_by != END:
        return Action(warning=FORGED if ended_by else CUT)
    if not reply.strip():
        return Action(warning=EMPTY)
    if style == "qwen":
        return _qwen().parse(reply)
    command = reply.strip()
    return Action(done=True) if command == DONE else Action(command)


def observation(output: Output | None, warning: str, ended_by: str | None, style="plain") -> list[Segment]:
    """The message that answers a reply; output is None when nothing was run."""
    head, tail = {"plain": ("tool\n", ""), "qwen": ("user\n<tool_response>\n", "\n</tool_response>")}[style]
    segments = [(Role.SCAFFOLD, ("" if ended_by == END else END) + f"\n<|im_start|>{head}")]
    if warning:
        segments.append((Role.WARNING, warning_block(warning)))
    if output is not None:
        note = "(truncated)" * output.truncated + f"(exit_code={output.exit_code})"
        tail = note + "(timed out)" * output.timed_out + tail
        segments.append((Role.OBSERVATION, output.text))
    return [(role, text) for role, text in [*segments, (Role.SCAFFOLD, tail + ASSISTANT)] if text]


def warning_block(warning: str) -> str:
    return f"WARNINGS:\n- {warning}\n\n"


def warnings(style: str) -> tuple[str, ...]:
    """All that a style can complain of."""
    return WARNINGS + (_qwen().WARNINGS if style == "qwen" else ())


def _qwen():
    from echo_min import harness_qwen  # here, as it takes Action from this module

    return harness_qwen
