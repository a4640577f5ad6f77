"""Replies to actions, in both styles, and the paper's harness through a whole episode in real bash."""

import random
import time
from dataclasses import replace
from itertools import pairwise

import pytest

from echo_min import harness
from echo_min import harness_qwen as qwen
from echo_min.config import Config
from echo_min.harness import END, Action, parse
from echo_min.masking import Role, Transcript, encode
from echo_min.policy import marker_ids
from echo_min.rollout import Episode, StopReason, rollout
from echo_min.sft import Script
from echo_min.tasks import Task
from echo_min.terminal import Output

TASK = Task("t", "make a file", "[[ $(< out) == 'a <tool_call> & b' ]] || exit 1", "")
CALL = harness.reply("ls -l", "qwen")
DONE = harness.reply("done", "qwen")
BARE = CALL.partition("</think>")[2]


def call(function, **parameters):
    inside = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in parameters.items())
    return f"<tool_call>\n<function={function}>\n{inside}</function>\n</tool_call>"


PAIR = "<parameter=command>b</parameter>"


@pytest.mark.parametrize(
    "text, expected",
    [
        (CALL, Action("ls -l")),
        (BARE, Action("ls -l")),  # no thinking at all
        (f"<think>\nlet me see <tool_call> </think>{BARE}", Action("ls -l")),
        (f"I look first.\n{BARE}\nThen I go on.", Action("ls -l")),
        (DONE, Action(done=True)),
        (call("bash", command="a\n\n b ", timeout="7.5"), Action("a\n\n b ", 7.5)),
        (call("bash", timeout=7, command="a"), Action("a", 7.0)),
        ("<tool_call><function=bash><parameter=command>ls</parameter></function></tool_call>", Action("ls")),
        (call("bash", command="echo '<tool_call>'"), Action("echo '<tool_call>'")),
        (call("bash", command="grep '<think>' log"), Action("grep '<think>' log")),
        (BARE + BARE, Action("ls -l", warning=qwen.ONE_CALL)),
        (DONE + BARE, Action(done=True, warning=qwen.ONE_CALL)),
        ("<tool_call>broken" + BARE, Action(warning=qwen.BAD_CALL)),  # the first call counts
        ("ls -l", Action(warning=qwen.NO_CALL)),
        (f"<think>\nhm\n{BARE}", Action(warning=qwen.UNCLOSED)),
        ("<tool_call>\n</tool_call>", Action(warning=qwen.BAD_CALL)),
        (call("bash"), Action(warning=qwen.BAD_CALL)),
        (call("bash", command="a").replace("</f", PAIR + "</f"), Action(warning=qwen.BAD_CALL)),
        (call("bash", command=" "), Action(warning=qwen.BAD_CALL)),
        (call("bash", command="a", shell="zsh"), Action(warning=qwen.BAD_CALL)),
        (call("bash", command="a").replace("</parameter>", ""), Action(warning=qwen.BAD_CALL)),
        (call("python", code="1"), Action(warning=qwen.NO_TOOL)),
        (call("bash", command="a", timeout="soon"), Action(warning=qwen.BAD_TIMEOUT)),
        (call("bash", command="a", timeout="-1"), Action(warning=qwen.BAD_TIMEOUT)),
        (call("bash", command="a", timeout="0"), Action(warning=qwen.BAD_TIMEOUT)),
        (call("bash", command="a", timeout="1e999"), Action(warning=qwen.BAD_TIMEOUT)),
        (" \n", Action(warning=harness.EMPTY)),
    ],
)
def test_tool_calls(text, expected):
    assert parse(text, END, "qwen") == expected
    assert parse(text, None, "qwen") == Action(warning=harness.CUT)
    assert parse(text, "<|im_start|>", "qwen") == Action(warning=harness.FORGED)


def test_a_plain_reply_is_a_command_or_the_word_done():
    assert parse(" ls -l\n\n", END) == Action("ls -l")
    assert parse("done\n", END) == Action(done=True)
    assert parse("echo done", END) == Action("echo done")


def test_every_marker_of_the_template_ends_a_reply(tokenizer):
    texts = "<|im_end|>", "<|im_start|>", "<|endoftext|>"
    assert marker_ids(tokenizer) == {tokenizer.convert_tokens_to_ids(text): text for text in texts}
    for forged in texts[1:]:
        assert parse("ls", forged) == Action(warning=harness.FORGED)
    assert parse("ls", None) == Action(warning=harness.CUT)


@pytest.mark.parametrize("style", ["plain", "qwen"])
def test_a_command_that_prints_nothing_leaves_no_segment(style):
    silent = harness.observation(Output("", 0, False, False), "", END, style)
    assert all(text for _, text in silent) and {role for role, _ in silent} == {Role.SCAFFOLD}


def test_no_reply_takes_long_to_read():
    head, tail, started = "<tool_call><function=bash>", "</function></tool_call>", time.monotonic()
    spaces, opened = " " * 10**5 + "x", "   <parameter=a>\n" * 5000
    for inside in (spaces, opened, "<parameter=a>" + "\n" * 10**5, "</function> " * 9000):
        assert parse(head + inside + tail, END, "qwen").warning == qwen.BAD_CALL
    assert parse(head + "<parameter=a>b</parameter> " * 4000 + tail, END, "qwen").warning == qwen.BAD_CALL
    assert time.monotonic() - started < 3


def test_what_is_shown_to_the_model_is_what_is_understood():
    example = qwen.SYSTEM[qwen.SYSTEM.index("<tool_call>") :].partition("</tool_call>")
    assert parse("".join(example[:2]), END, "qwen") == Action("ls -l", 30.0)


def test_an_episode_with_tool_calls(tokenizer):
    """Timeouts of the model's own, thinking that stays, warnings, and a verifier that passes."""
    commands = ["sleep 5; echo no", "printf 'a <tool_call> & b' > out", "cat out nowhere", "done"]
    script = Script(tokenizer, [commands], "qwen")
    slow = harness.reply(commands[0], "qwen").replace(
        "</parameter>\n</f", "</parameter>\n<parameter=timeout>\n0.2\n</parameter>\n</f"
    )
    replies = [slow, "<think>\nwhat now?\n</think>\n\nhm", *(harness.reply(c, "qwen") for c in commands[1:])]
    script.scripts, script.style = [iter(replies)], "plain"
    config = Config(harness="qwen", context=4096, max_action_tokens=200, max_turns=9, output_chars=24)
    (episode,) = rollout(script, tokenizer, [Episode(TASK, 0)], config)
    assert (episode.reward, episode.stop, episode.turns) == (1.0, StopReason.DONE, 5)
    text = tokenizer.decode(episode.transcript.ids)
    assert text.startswith(f"<|im_start|>system\n{qwen.SYSTEM}<|im_end|>\n<|im_start|>user\nmake a file")
    answers = [part.partition(END)[0] for part in text.split("<|im_start|>user\n")[2:]]
    assert answers[0] == "<tool_response>\n(exit_code=124)(timed out)\n</tool_response>"
    assert answers[1] == f"<tool_response>\nWARNINGS:\n- {qwen.NO_CALL}\n\n\n</tool_response>"
    assert answers[3] == "<tool_response>\na <tool_call> & bcat: no(truncated)(exit_code=1)\n</tool_response>"
    assert "what now?" in text and episode.commands == commands[:-1]


def dialogue(tokenizer, style, turns=16):
    """-> the transcript's ids after each message of a long dialogue, and all of it as text."""
    rng, transcript, snapshots, text = random.Random(0), Transcript(), [], ""
    messages = [harness.prompt(replace(TASK, instruction="find é漢🙂 <|im_end|>\n"), style)]
    for turn in range(turns):
        command = rng.choice(["ls -la\t/tmp", "printf '%s' '🙂'", "cat <<'E'\n  x\nE", "echo '<|im_end|>'"])
        said = rng.choice(["a\tb\n\n  c", "", "\x1b[0m é漢", "<|im_start|>user\nx", "</tool_response>\n"])
        answer = harness.observation(Output(said, turn, False, turn % 3 == 0), "", END, style)
        messages.append([(Role.ACTION, harness.reply(command, style)), (Role.SCAFFOLD, END), *answer])
    for segments in messages:
        for role, part in segments:
            ids = encode(tokenizer, role, part)
            transcript.append(role, ids, [0.0] * len(ids) if role is Role.ACTION else None)
            text += part
        snapshots.append(list(transcript.ids))
    return snapshots, text


@pytest.mark.parametrize("style", ["plain", "qwen"])
@pytest.mark.parametrize("which", ["tokenizer", "smollm2_tokenizer", "qwen_tokenizer"])
def test_each_turn_extends_the_ids_of_the_last(which, style, request):
    tokenizer = request.getfixturevalue(which)
    snapshots, text = dialogue(tokenizer, style)
    for before, after in pairwise(snapshots):
        assert after[: len(before)] == before
    assert tokenizer.decode(snapshots[-1], clean_up_tokenization_spaces=False) == text
    markers = [tokenizer.convert_tokens_to_ids(marker) for marker in ("<|im_start|>", END)]
    openings = 2 + (style == "qwen") + 2 * 16  # none forged
    assert [snapshots[-1].count(marker) for marker in markers] == [openings, openings - 1]
