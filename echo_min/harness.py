"""The conversation: how a task becomes a prompt, a reply a command, and a command's output the next message.

Everything here is text with a role; ids are made elsewhere. The template is ChatML. A reply is one bash
command as it would be typed, or the word `done`.
"""

from echo_min.masking import Role, Segment
from echo_min.sandbox import Output
from echo_min.tasks import Task

END = "<|im_end|>"  # closes a message; the only token that ends a reply well
MARKERS = (END, "<|im_start|>", "<|endoftext|>")  # a reply stops at any of them
DONE = "done"
WARNINGS = CUT, FORGED, EMPTY = (
    "The reply was cut at its token limit; nothing was run.",
    "The reply contained a chat marker; nothing was run.",
    "The reply was empty; nothing was run.",
)


def prompt(task: Task) -> list[Segment]:
    return [
        (Role.SCAFFOLD, "<|im_start|>user\n"),
        (Role.PROMPT, task.instruction),
        (Role.SCAFFOLD, "<|im_end|>\n<|im_start|>assistant\n"),
    ]


def parse(reply: str, stopped_by: str | None) -> tuple[str, str]:
    """-> (command, warning), one of them empty. reply: its text without the marker that stopped it;
    stopped_by: None if the token limit cut it."""
    if stopped_by is None:
        return "", CUT
    if stopped_by != END:
        return "", FORGED
    command = reply.strip()
    return command, "" if command else EMPTY


def warning_block(warning: str) -> str:
    return f"WARNINGS:\n- {warning}\n\n"


def observation(output: Output | None, warning: str, stopped_by: str | None) -> list[Segment]:
    """The message that answers a reply; output is None when nothing was run."""
    segments = [(Role.SCAFFOLD, ("" if stopped_by == END else END) + "\n<|im_start|>tool\n")]
    if warning:
        segments.append((Role.WARNING, warning_block(warning)))
    note = ""
    if output is not None:
        segments.append((Role.OBSERVATION, output.text))
        note = "(truncated)" * output.truncated + f"(exit_code={output.exit_code})"
        note += "(timed out)" * output.timed_out
    segments.append((Role.SCAFFOLD, f"{note}<|im_end|>\n<|im_start|>assistant\n"))
    return [(role, text) for role, text in segments if text]
