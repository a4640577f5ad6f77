"""The conversation: how a task becomes a prompt, a reply a command, and a command's output the next message.

Everything here is text with a role; ids are made elsewhere. The template is ChatML. A reply is one bash
command as it would be typed, or the word `done`.
"""

from dataclasses import dataclass, field

from echo_min.masking import Role, Segment
from echo_min.sandbox import Output
from echo_min.tasks import Task

END = "<|im_end|>"  # closes a message; the only token that ends a reply well
MARKERS = (END, "<|im_start|>", "<|endoftext|>")  # a reply stops at any of them
DONE = "done"


@dataclass(frozen=True)
class Action:
    """What a reply asks for: a command, or the end of the episode, or neither when it was malformed."""

    command: str | None = None
    done: bool = False
    warnings: list[str] = field(default_factory=list)


def prompt(task: Task) -> list[Segment]:
    return [
        (Role.SCAFFOLD, "<|im_start|>user\n"),
        (Role.PROMPT, task.instruction),
        (Role.SCAFFOLD, "<|im_end|>\n<|im_start|>assistant\n"),
    ]


def parse(reply: str, stopped_by: str | None) -> Action:
    """reply: the text without its stop marker. stopped_by: that marker, or None if the token limit cut the
    reply."""
    if stopped_by is None:
        return Action(warnings=["The reply was cut at its token limit; nothing was run."])
    if stopped_by != END:
        return Action(warnings=["The reply contained a chat marker; nothing was run."])
    command = reply.strip()
    if not command:
        return Action(warnings=["The reply was empty; nothing was run."])
    return Action(done=True) if command == DONE else Action(command=command)


def observation(output: Output | None, warnings: list[str], stopped_by: str | None) -> list[Segment]:
    """The message that answers a reply; output is None when nothing was run."""
    segments = [(Role.SCAFFOLD, ("" if stopped_by == END else END) + "\n<|im_start|>tool\n")]
    if warnings:
        segments.append(
            (Role.WARNING, "WARNINGS:\n" + "".join(f"- {warning}\n" for warning in warnings) + "\n")
        )
    note = ""
    if output is not None:
        segments.append((Role.OBSERVATION, output.text))
        note = "(truncated)" * output.truncated + f"(exit_code={output.exit_code})"
        note += "(timed out)" * output.timed_out
    segments.append((Role.SCAFFOLD, f"{note}<|im_end|>\n<|im_start|>assistant\n"))
    return [(role, text) for role, text in segments if text]
