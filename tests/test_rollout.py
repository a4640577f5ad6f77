"""Whole episodes in real bash, driven by scripts: stop reasons, roles, rewards, failures of the
environment."""

import os
import signal
import threading
import time
from dataclasses import replace

import pytest

from echo_min import harness
from echo_min import rollout as rollout_module
from echo_min.config import Config, RunEnded
from echo_min.limits import Limits
from echo_min.masking import Role, encode
from echo_min.rollout import Episode, Noise, Seat, StopReason, batch_metrics, rollout, sample_episodes
from echo_min.sft import Script
from echo_min.terminal import TerminalDied
from echo_min.terminals.sandbox import Sandbox
from echo_min.worlds.registry import load_world

CONFIG = Config(context=1000, max_action_tokens=100, max_turns=3)
TASK = load_world("tool", 1).train[0]


def play(tokenizer, *scripts, config=CONFIG, task=TASK):
    return rollout(Script(tokenizer, list(scripts)), tokenizer, [Episode(task, 0) for _ in scripts], config)


def text(tokenizer, episode, role):
    pairs = zip(episode.transcript.ids, episode.transcript.roles, strict=True)
    return tokenizer.decode([i for i, r in pairs if r == role])


def test_done_and_max_turns_are_graded(tokenizer):
    done, silent, late = play(
        tokenizer, [TASK.solution, "done"], ["done"], ["true", "true", TASK.solution, "true"]
    )
    assert (done.stop, done.reward, done.turns) == (StopReason.DONE, 1.0, 2)
    assert (silent.stop, silent.reward) == (StopReason.DONE, 0.0)
    assert (late.stop, late.reward, late.turns) == (StopReason.MAX_TURNS, 1.0, 3)
    assert late.commands == ["true", "true", TASK.solution]


def test_the_transcript_is_the_dialogue(tokenizer):
    (episode,) = play(tokenizer, ["echo hello; exit 3", "printf '<|im_end|>'", "done"])
    answer = "<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(episode.transcript.ids) == (
        f"<|im_start|>user\n{TASK.instruction}{answer}"
        f"echo hello; exit 3<|im_end|>\n<|im_start|>tool\nhello\n(exit_code=3){answer}"
        f"printf '<|im_end|>'<|im_end|>\n<|im_start|>tool\n<|im_end|>(exit_code=0){answer}"
        "done<|im_end|>"
    )
    assert text(tokenizer, episode, Role.OBSERVATION) == "hello\n<|im_end|>"
    assert text(tokenizer, episode, Role.PROMPT) == TASK.instruction
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    actions = [
        i for i, r in zip(episode.transcript.ids, episode.transcript.roles, strict=True) if r == Role.ACTION
    ]
    assert actions.count(end) == 3  # each reply's own end of turn, and none that was typed


def test_a_malformed_reply_runs_nothing_and_is_answered_by_a_warning(tokenizer):
    (episode,) = play(tokenizer, ["   ", "done"])
    assert episode.commands == []
    assert text(tokenizer, episode, Role.WARNING) == "WARNINGS:\n- The reply was empty; nothing was run.\n\n"
    assert text(tokenizer, episode, Role.OBSERVATION) == ""


def test_output_is_cut_and_says_so(tokenizer):
    (episode,) = play(
        tokenizer, ["head -c 5000 /dev/zero | tr '\\0' x", "done"], config=replace(CONFIG, output_chars=50)
    )
    assert text(tokenizer, episode, Role.OBSERVATION) == "x" * 50
    assert "(truncated)(exit_code=0)" in text(tokenizer, episode, Role.SCAFFOLD)


def test_a_full_context_ends_the_episode_graded(tokenizer):
    config = replace(CONFIG, context=260)
    (episode,) = play(tokenizer, [TASK.solution, "head -c 150 /dev/zero | tr '\\0' ~", "true"], config=config)
    assert (episode.stop, episode.reward) == (StopReason.CONTEXT_FULL, 1.0)
    assert len(episode.transcript) <= 260 and episode.valid


def test_a_context_without_room_for_a_reply_is_refused(tokenizer):
    with pytest.raises(ValueError, match="context: 105 tokens do not hold the prompt"):
        play(tokenizer, ["done"], config=replace(CONFIG, context=105))


def test_an_agent_out_of_time_is_graded_and_not_trained_on(tokenizer):
    task = replace(TASK, limits=Limits(agent_seconds=0.3))
    (episode,) = play(tokenizer, [f"{TASK.solution}; sleep 0.5", "true"], task=task)
    assert (episode.stop, episode.reward, episode.valid) == (StopReason.AGENT_TIMEOUT, 1.0, False)


@pytest.mark.parametrize("terminals", [1, 2, 3])
def test_a_seat_goes_to_the_next_episode(tokenizer, monkeypatch, terminals):
    """More episodes than terminals, of very different lengths, some of which die: each is played as if alone,
    no more than `terminals` are open at a time, and each is graded and closed as soon as it stops."""
    opened, most, log, lock = set(), [0], [], threading.Lock()
    real, run, close, verify = rollout_module.open_terminal, Sandbox.run, Sandbox.close, Sandbox.verify

    def open_or_refuse(task, *rest):
        if task.name == "refused":
            raise TerminalDied("this one cannot be had")
        terminal = real(task, *rest)
        with lock:
            opened.add(terminal)
            most.append(len(opened))
        return terminal

    def run_or_die(self, command, timeout=None):
        log.append(command)
        if command == "die":
            os.killpg(self._box.process.pid, signal.SIGKILL)
        return run(self, command, timeout)

    def closed(self):
        with lock:
            opened.discard(self)
        close(self)

    monkeypatch.setattr(rollout_module, "open_terminal", open_or_refuse)
    monkeypatch.setattr(Sandbox, "run", run_or_die)
    def verify_slowly(self):  # its terminal is open all the while
        time.sleep(0.1)
        return verify(self)

    monkeypatch.setattr(Sandbox, "verify", verify_slowly)
    monkeypatch.setattr(Sandbox, "close", closed)
    scripts = [["true"] * 7, [TASK.solution], ["die"], [], ["true"], [TASK.solution, "true"], ["echo last"]]
    episodes = [Episode(replace(TASK, name="refused") if i == 4 else TASK, 0) for i in range(7)]
    config = replace(CONFIG, terminals=terminals, max_turns=9)
    rollout(Script(tokenizer, scripts), tokenizer, episodes, config)
    scripts[4] = []
    assert [e.commands for e in episodes] == scripts and episodes[0].turns == 8
    assert [e.stop is StopReason.INFRA_ERROR for e in episodes] == [i in (2, 4) for i in range(7)]
    assert [e.reward for e in episodes if e.valid] == [0, 1, 0, 1, 0]
    assert max(most) == terminals and not opened
    if terminals == 3:  # the last one came in while the first was still at work
        assert log.index("echo last") < len(log) - 1 - log[::-1].index("true")


def test_a_terminal_that_dies_ends_its_own_episode_only(tokenizer, monkeypatch):
    run = Sandbox.run

    def run_or_die(self, command, timeout=None):
        if command == "die":  # the environment, not the agent, is killed
            os.killpg(self._box.process.pid, signal.SIGKILL)
        return run(self, command, timeout)

    monkeypatch.setattr(Sandbox, "run", run_or_die)
    dead, alive = play(tokenizer, ["die"], [TASK.solution, "done"])
    assert (
        dead.stop is StopReason.INFRA_ERROR and dead.reward != dead.reward and dead.error and not dead.valid
    )
    assert (alive.stop, alive.reward) == (StopReason.DONE, 1.0)


@pytest.mark.parametrize("turns", [1, 9])
def test_a_terminal_that_dies_is_a_failure_on_whatever_turn(tokenizer, turns):
    """Neither out of turns nor out of time nor out of context, whatever else is true of it."""
    task = replace(TASK, limits=Limits(agent_seconds=1e-9))
    config = replace(CONFIG, max_turns=turns, context=50, max_action_tokens=9)
    seat = Seat(Episode(task, 0), tokenizer, config)
    seat.open()
    os.killpg(seat.terminal._box.process.pid, signal.SIGKILL)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = [*encode(tokenizer, Role.ACTION, "true"), end]
    assert seat.answer((ids, [0.0] * len(ids))) == []
    seat.leave()
    e = seat.episode
    assert e.stop is StopReason.INFRA_ERROR and e.error and e.reward != e.reward and not e.valid
    assert e.transcript.ids[-1] == end and e.commands == ["true"]  # nothing was answered


def test_an_error_in_one_seat_leaves_no_terminal_open(tokenizer, monkeypatch):
    opened, real = [], rollout_module.open_terminal

    def open_or_fail(*args):
        if len(opened) == 2:
            raise ValueError("this one is wrong")
        opened.append(real(*args))
        return opened[-1]

    monkeypatch.setattr(rollout_module, "open_terminal", open_or_fail)
    with pytest.raises(ValueError, match="this one is wrong"):
        play(tokenizer, ["true"], ["true"], ["true"], config=replace(CONFIG, terminals=1))
    assert len(opened) == 2 and all(terminal._box is None for terminal in opened)


def test_an_error_beside_terminals_that_are_open_closes_them(tokenizer, monkeypatch):
    opened, both, real = [], threading.Barrier(3, timeout=60), rollout_module.open_terminal

    def open_or_fail(task, *rest):
        if task.name != "wrong":
            opened.append(real(task, *rest))
        both.wait()  # all three are at it
        if task.name == "wrong":
            raise ValueError("this one is wrong")
        return opened[-1] if opened[-1].task is task else opened[-2]

    monkeypatch.setattr(rollout_module, "open_terminal", open_or_fail)
    tasks = [TASK, replace(TASK, name="other"), replace(TASK, name="wrong")]
    with pytest.raises(ValueError, match="this one is wrong"):
        rollout(Script(tokenizer, [[]] * 3), tokenizer, [Episode(task, 0) for task in tasks], CONFIG)
    assert len(opened) == 2 and all(terminal._box is None for terminal in opened)


def test_a_terminal_that_cannot_open_is_an_infra_error(tokenizer, monkeypatch):
    def refuse(*_):
        raise TerminalDied("no terminal today")

    monkeypatch.setattr(rollout_module, "open_terminal", refuse)
    (episode,) = play(tokenizer, ["true"])
    assert (episode.stop, episode.error) == (StopReason.INFRA_ERROR, "no terminal today")


def test_rollouts_are_a_function_of_their_key(model, tokenizer):
    def sample(key, tasks=2, members=3):
        config = replace(CONFIG, max_action_tokens=12)
        batch = sample_episodes(model, tokenizer, load_world("tool", 1).train[:tasks], members, config, key)
        return [e.transcript.ids for e in batch]

    first = sample((1, 5, 9))
    assert first == sample((1, 5, 9))
    assert first != sample((1, 5, 10))
    assert sample((1, 5, 9), tasks=1) == first[:3]  # other groups in the batch change nothing
    assert len({tuple(ids) for ids in first}) > 1  # members differ


def test_episodes_that_wait_get_the_tokens_of_those_that_do_not(model, tokenizer):
    def sample(terminals):
        config = replace(CONFIG, max_action_tokens=40, terminals=terminals)
        key = 1, 5, 10  # no command of which holds a |: who prints first is luck
        batch = sample_episodes(model, tokenizer, load_world("tool", 1).train[:4], 2, config, key)
        return [(e.transcript.ids, e.reward, e.stop) for e in batch]

    assert sample(8) == sample(3) == sample(1)


# ---- what stops an episode, and what it counts ----


def episode(stop, reward=0.0, turns=1, actions=1, observations=0, warnings=0, commands=()):
    e = Episode(TASK, 0, commands=list(commands), reward=reward, stop=stop, turns=turns)
    e.transcript.append(Role.PROMPT, [1, 2])
    e.transcript.append(Role.ACTION, [3] * actions, [-1.0] * actions)
    e.transcript.append(Role.OBSERVATION, [4] * observations)
    e.transcript.append(Role.WARNING, [5] * warnings)
    return e


def test_which_episodes_are_trained_on():
    valid = {stop: Episode(TASK, 0, stop=stop).valid for stop in [None, *StopReason]}
    assert [stop for stop in valid if valid[stop]] == ["done", "max_turns", "context_full", "broke_terminal"]


def test_metrics_are_means_over_valid_episodes():
    batch = [
        episode(StopReason.DONE, 1.0, 3, 5, 7, 0, ["a", "b"]),
        episode(StopReason.MAX_TURNS, 0.0, 2, 1, 0, 4, ["a"]),
        episode(StopReason.AGENT_TIMEOUT, 1.0, 9, 90, 90, 90, ["x", "y"]),
        episode(StopReason.INFRA_ERROR, float("nan"), 9, 90, 90, 90, ["z"]),
    ]
    batch[3].error = "the engine is gone"
    assert batch_metrics(batch) == {
        "reward": 0.5, "turns": 2.5, "action_tokens": 3.0, "observation_tokens": 3.5, "warning_tokens": 2.0,
        "command_diversity": 2 / 3, "error": "the engine is gone",
        "stop": {"done": 1, "max_turns": 1, "context_full": 0, "broke_terminal": 0,
                 "agent_timeout": 1, "infra_error": 1},
    }  # fmt: skip
    assert batch_metrics(batch[:2])["error"] == ""
    assert batch_metrics([episode(StopReason.DONE)])["command_diversity"] == 0


def test_more_than_half_failed_ends_the_run_and_half_does_not():
    good, failed = episode(StopReason.DONE), episode(StopReason.INFRA_ERROR)
    failed.error = "no engine"
    assert batch_metrics([good, good, failed, failed])["stop"]["infra_error"] == 2
    with pytest.raises(RunEnded, match="3 of 5 episodes failed: no engine"):
        batch_metrics([good, good, failed, failed, failed])
    with pytest.raises(RunEnded, match="no episode of the batch can be trained on"):
        batch_metrics([failed, episode(StopReason.AGENT_TIMEOUT)])


def test_a_timeout_of_the_policys_own_shortens_the_limit_and_never_lengthens_it(tokenizer):
    config = replace(CONFIG, harness="qwen", context=4096, max_turns=1)
    task = replace(TASK, limits=Limits(command_seconds=1.2))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def seconds(timeout):
        call = f"<parameter=command>sleep 9</parameter>{timeout}</function></tool_call>"
        ids = encode(tokenizer, Role.ACTION, f"<tool_call><function=bash>{call}")
        seat = Seat(Episode(task, 0), tokenizer, config)
        seat.open()
        try:
            seat.answer(([*ids, end], [0.0] * (len(ids) + 1)))
        finally:
            seat.close()
        assert "(timed out)" in text(tokenizer, seat.episode, Role.SCAFFOLD)
        return seat.episode.seconds

    assert 1.2 <= seconds("") < 6
    assert 1.2 <= seconds("<parameter=timeout>30</parameter>") < 6
    assert 0.1 <= seconds("<parameter=timeout>0.1</parameter>") < 1.2


def test_time_adds_up_over_the_turns(tokenizer):
    seat, script = Seat(Episode(TASK, 0), tokenizer, CONFIG), Script(tokenizer, [["sleep 0.3"] * 3])
    seat.open()
    try:
        seat.answer(*script.reply([0], [[]], 9))
        first = seat.episode.seconds
        assert first >= 0.3 and seat.episode.stop is None
        seat.episode.task = replace(TASK, limits=Limits(agent_seconds=first + 0.2))
        seat.answer(*script.reply([0], [[]], 9))
    finally:
        seat.close()
    assert seat.episode.seconds >= first + 0.3 and seat.episode.stop is StopReason.AGENT_TIMEOUT


def test_out_of_time_on_the_last_turn_is_out_of_time(tokenizer):
    task = replace(TASK, limits=Limits(agent_seconds=0.2))
    (e,) = play(tokenizer, [f"{TASK.solution}; sleep 0.3"], task=task, config=replace(CONFIG, max_turns=1))
    assert (e.stop, e.reward, e.valid) == (StopReason.AGENT_TIMEOUT, 1.0, False)


def test_the_last_turn_in_a_full_context(tokenizer):
    """max_turns when the answer was said, context_full when it did not fit."""
    fits = play(tokenizer, ["true"], config=replace(CONFIG, max_turns=1))[0]
    room, prompt = len(fits.transcript), fits.transcript.roles.index(Role.ACTION)
    one = replace(CONFIG, max_turns=1, max_action_tokens=room - prompt)
    assert play(tokenizer, ["true"], config=replace(one, context=room))[0].stop is StopReason.MAX_TURNS
    one = replace(one, max_action_tokens=room - prompt - 1)
    short = play(tokenizer, ["true"], config=replace(one, context=room - 1))[0]
    assert short.stop is StopReason.CONTEXT_FULL and len(short.transcript) < room - 1
    assert short.transcript.roles[-1] == Role.ACTION  # a message is said whole or not at all


def test_a_reply_that_just_fits_is_asked_for(tokenizer):
    fits = play(tokenizer, ["true", "done"])[0]
    before = len(fits.transcript) - fits.transcript.roles[::-1].index(Role.SCAFFOLD)  # of the last reply
    config = replace(CONFIG, context=before + 30, max_action_tokens=30)
    assert play(tokenizer, ["true", "done"], config=config)[0].stop is StopReason.DONE
    config = replace(config, context=before + 29)
    assert play(tokenizer, ["true", "done"], config=config)[0].stop is StopReason.CONTEXT_FULL


def test_a_prompt_with_just_room_for_a_reply(tokenizer):
    prompt = len(Seat(Episode(TASK, 0), tokenizer, CONFIG)._extend(harness.prompt(TASK)))
    config = replace(CONFIG, context=prompt + 30, max_action_tokens=30)
    assert play(tokenizer, ["done"], config=config)[0].stop is StopReason.DONE
    long = replace(TASK, instruction="x " * 100)  # of which nothing is read if it does not fit
    for context, task in ((prompt + 29, TASK), (prompt - 1, TASK), (100, long)):
        with pytest.raises(ValueError, match="do not hold the prompt"):
            play(tokenizer, ["done"], config=replace(config, context=context), task=task)


@pytest.mark.parametrize("marker, warning", [(None, harness.CUT), ("<|im_start|>", harness.FORGED)])
def test_a_reply_that_does_not_end_well_runs_nothing(tokenizer, marker, warning):
    seat = Seat(Episode(TASK, 0), tokenizer, CONFIG)
    seat.open()
    ids = encode(tokenizer, Role.ACTION, TASK.solution)
    ids += [tokenizer.convert_tokens_to_ids(marker)] if marker else []
    answer = seat.answer((ids, [-1.0] * len(ids)))
    seat.episode.stop = StopReason.DONE
    seat.leave()
    e = seat.episode
    assert e.commands == [] and e.reward == 0.0 and e.turns == 1
    assert text(tokenizer, e, Role.WARNING) == f"WARNINGS:\n- {warning}\n\n"
    assert tokenizer.decode(answer).startswith("<|im_end|>\n<|im_start|>tool\n")  # the turn is closed for it
    assert e.transcript.logprobs.count(-1.0) == len(ids) and e.transcript.ids[-len(answer) :] == answer


def test_only_some_members_are_played_with_the_noise_that_is_theirs(model, tokenizer):
    tasks, config = load_world("tool", 1).train[:3], replace(CONFIG, max_action_tokens=12, max_turns=1)

    def sample(key, *rest):
        return [(e.task.name, e.group, e.transcript.ids)
                for e in sample_episodes(model, tokenizer, tasks, 2, config, key, *rest)]  # fmt: skip

    whole = sample((Noise.SCORING, 5))
    named = [(task.name, group) for group, task in enumerate(tasks) for _ in range(2)]
    assert [(name, group) for name, group, _ in whole] == named
    assert sample((Noise.SCORING, 5), [(2, 1), (0, 0)]) == [whole[5], whole[0]]
    tasks[1:] = [tasks[0]] * 2  # one task in three groups: six rollouts, each with noise of its own
    whole = sample((Noise.SCORING, 5))
    assert len({tuple(ids) for _, _, ids in whole}) == 6
    greedy = sample(None)
    assert greedy[0] == greedy[1] and greedy[2] == greedy[3]  # no noise
    assert greedy == sample(None) and greedy != whole
