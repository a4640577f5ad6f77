"""The paper's conversation: the policy thinks, then makes one tool call in Qwen's XML: bash(command, timeout)
or done(). Only the first call of a turn is run."""

import re

from echo_min.harness import DONE, Action

WARNINGS = NO_CALL, UNCLOSED, BAD_CALL, NO_TOOL, BAD_TIMEOUT, ONE_CALL = (
    "The reply called no tool; nothing was run.",
    "The thinking did not end with </think>; nothing was run.",
    "The tool call is malformed; nothing was run.",
    "There is no such tool, only bash and done; nothing was run.",
    "The timeout is not a positive number of seconds; nothing was run.",
    "Only the first tool call of a reply is run.",
)
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


def reply(command: str) -> str:
    """A command, or DONE, as a policy would have written it."""
    command = f"bash>\n<parameter=command>\n{command}\n</parameter>" if command != DONE else "done>"
    return f"<think>\n\n</think>\n\n<tool_call>\n<function={command}\n</function>\n</tool_call>"


def parse(reply: str) -> Action:
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
    timeout = parameters.get("timeout")
    if timeout and not (re.fullmatch(r"\s*\d{1,9}(\.\d*)?\s*", timeout) and float(timeout)):
        return Action(warning=BAD_TIMEOUT)
    return Action(parameters["command"], float(timeout) if timeout else None, warning=warning)
