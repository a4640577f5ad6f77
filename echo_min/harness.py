"""The conversation: how a task becomes a prompt, a reply an action, and a command's output the next message.

Everything here is text with a role; ids are made elsewhere. The template is ChatML; messages are appended and
never rendered again, so earlier thinking stays in context. Two styles, Config's `harness`:

plain: a reply is one bash command as it would be typed, or the word `done`.
qwen: the paper's. A reply is thinking and one tool call in Qwen's XML: bash(command, timeout) or done().
"""

import re
from dataclasses import dataclass

from echo_min.masking import Role, Segment
from echo_min.tasks import Task
from echo_min.terminal import Output

END = "<|im_end|>"  # closes a message; the only token that ends a reply well
MARKERS = (END, "<|im_start|>", "<|endoftext|>")  # a reply stops at any of them
DONE = "done"
PLAIN_WARNINGS = CUT, FORGED, EMPTY = (
    "The reply was cut at its token limit; nothing was run.",
    "The reply contained a chat marker; nothing was run.",
    "The reply was empty; nothing was run.",
)
CALL_WARNINGS = NO_CALL, UNCLOSED, BAD_CALL, NO_TOOL, BAD_TIMEOUT, ONE_CALL = (
    "The reply called no tool; nothing was run.",
    "The thinking did not end with </think>; nothing was run.",
    "The tool call is malformed; nothing was run.",
    "There is no such tool, only bash and done; nothing was run.",
    "The timeout is not a positive number of seconds; nothing was run.",
    "Only the first tool call of a reply is run.",
)
WARNINGS = {"plain": PLAIN_WARNINGS, "qwen": PLAIN_WARNINGS + CALL_WARNINGS}
SYSTEM = """You are an agent at a Linux terminal. Solve the user's task with bash commands.

Think first, then call exactly one tool:

<tool_call>
<function=bash>
<parameter=command>
ls -l
</parameter>
<parameter=timeout>
30
</parameter>
</function>
</tool_call>

bash(command, timeout) runs the command in a fresh shell and shows what it prints. Files stay from one command
to the next, variables and the current folder do not. timeout is in seconds and may be left out. done() has no
parameter and ends the task: call it when the work is finished. Tests then decide whether you have passed."""
CALL = re.compile(r"<tool_call>\s*<function=([^>\n]*)>(.*?)</function>\s*</tool_call>", re.DOTALL)
PARAMETER = re.compile(r"<parameter=(\w+)>\n?(.*?)\n?</parameter>", re.DOTALL)


@dataclass(frozen=True)
class Action:
    """What a reply asks for: a command, or the episode's end, or, with a warning, nothing."""

    command: str = ""
    timeout: float | None = None  # seconds
    done: bool = False
    warning: str = ""


def prompt(task: Task, style: str = "plain") -> list[Segment]:
    system = []
    if style == "qwen":
        system = [(Role.SCAFFOLD, "<|im_start|>system\n"), (Role.PROMPT, SYSTEM), (Role.SCAFFOLD, f"{END}\n")]
    return [
        *system,
        (Role.SCAFFOLD, "<|im_start|>user\n"),
        (Role.PROMPT, task.instruction),
        (Role.SCAFFOLD, f"{END}\n<|im_start|>assistant\n"),
    ]


def reply(command: str, style: str = "plain") -> str:
    """A command, or DONE, as a policy would have written it."""
    if style == "plain":
        return command
    parameter = f"<parameter=command>\n{command}\n</parameter>\n"
    call = "<function=done>\n" if command == DONE else f"<function=bash>\n{parameter}"
    return f"<think>\n\n</think>\n\n<tool_call>\n{call}</function>\n</tool_call>"


def parse(reply: str, stopped_by: str | None, style: str = "plain") -> Action:
    """reply: its text without the marker that stopped it; stopped_by: None if the token limit cut it."""
    if stopped_by != END:
        return Action(warning=FORGED if stopped_by else CUT)
    if not reply.strip():
        return Action(warning=EMPTY)
    if style == "qwen":
        return _parse_call(reply)
    command = reply.strip()
    return Action(done=True) if command == DONE else Action(command)


def _parse_call(reply: str) -> Action:
    if "<think>" in reply.partition("<tool_call>")[0]:
        _, closed, reply = reply.partition("</think>")
        if not closed:
            return Action(warning=UNCLOSED)
    if "<tool_call>" not in reply:
        return Action(warning=NO_CALL)
    call = CALL.match(reply, reply.index("<tool_call>"))
    if not call:
        return Action(warning=BAD_CALL)
    parameters, rest = {}, call[2].strip()
    while rest:  # one by one from the left: a search would take minutes of a reply made for it
        parameter = PARAMETER.match(rest)
        if not parameter or parameter[1] in parameters:
            return Action(warning=BAD_CALL)
        parameters[parameter[1]], rest = parameter[2], rest[parameter.end() :].lstrip()
    if call[1] not in ("bash", "done"):
        return Action(warning=NO_TOOL)
    warning = ONE_CALL if "<tool_call>" in reply[call.end() :] else ""
    if call[1] == "done":
        return Action(done=True, warning=warning)
    if set(parameters) - {"timeout"} != {"command"} or not parameters["command"].strip():
        return Action(warning=BAD_CALL)
    if "timeout" not in parameters:
        return Action(parameters["command"], warning=warning)
    if not re.fullmatch(r"\s*\d{1,9}(\.\d*)?\s*", parameters["timeout"]) or not float(parameters["timeout"]):
        return Action(warning=BAD_TIMEOUT)
    return Action(parameters["command"], float(parameters["timeout"]), warning=warning)


def warning_block(warning: str) -> str:
    return f"WARNINGS:\n- {warning}\n\n"


def observation(
    output: Output | None, warning: str, stopped_by: str | None, style: str = "plain"
) -> list[Segment]:
    """The message that answers a reply; output is None when nothing was run."""
    head, tail = {"plain": ("tool\n", ""), "qwen": ("user\n<tool_response>\n", "\n</tool_response>")}[style]
    segments = [(Role.SCAFFOLD, ("" if stopped_by == END else END) + f"\n<|im_start|>{head}")]
    if warning:
        segments.append((Role.WARNING, warning_block(warning)))
    note = ""
    if output is not None:
        segments.append((Role.OBSERVATION, output.text))
        note = "(truncated)" * output.truncated + f"(exit_code={output.exit_code})"
        note += "(timed out)" * output.timed_out
    segments.append((Role.SCAFFOLD, f"{note}{tail}{END}\n<|im_start|>assistant\n"))
    return [(role, text) for role, text in segments if text]
