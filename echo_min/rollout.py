"""Rollouts: policy and terminal take turns until an episode stops; then the task's verifier rewards it."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

import numpy as np

from echo_min import harness, ranks
from echo_min.config import Config, RunEnded
from echo_min.masking import Role, Segment, Transcript, encode
from echo_min.policy import marker_ids
from echo_min.sampler import Reply, Sampler
from echo_min.tasks import Task
from echo_min.terminal import BrokenByAgent, TerminalDied, open_terminal


class Noise(IntEnum):
    """What a rollout is for. The noise of its sampling is keyed by (Noise, seed, ..., group, member)."""

    TRAINING = 1  # ..., step
    EVALUATION = 2  # ..., step: train.py's
    SCORING = 3  # eval.py's
    PASS_AT_K = 4  # the experiments', after the last step
    SHOWING = 5  # the experiments', of one episode to look at


class StopReason(StrEnum):
    DONE = "done"  # the policy said so
    MAX_TURNS = "max_turns"  # graded and trained
    CONTEXT_FULL = "context_full"  # the next message or reply would not fit; graded and trained
    BROKE_TERMINAL = "broke_terminal"  # the policy did; graded 0 and trained
    AGENT_TIMEOUT = "agent_timeout"  # graded, in no loss
    INFRA_ERROR = "infra_error"  # the environment failed, not the policy: no reward, in no loss


@dataclass
class Episode:
    """All that passes from rollout to update."""

    task: Task
    group: int
    transcript: Transcript = field(default_factory=Transcript)
    commands: list[str] = field(default_factory=list)
    reward: float = float("nan")  # nan until graded
    stop: StopReason | None = None
    error: str = ""  # what failed, when stop is infra_error or broke_terminal
    verifier_output: str = ""  # of a task's container
    turns: int = 0
    seconds: float = 0.0  # at work in the terminal

    @property
    def valid(self) -> bool:
        """Whether the episode enters the losses and its group's statistics."""
        return self.stop not in (None, StopReason.AGENT_TIMEOUT, StopReason.INFRA_ERROR)


class Seat:
    """One episode at its terminal. When the terminal fails, this episode ends, no other: as broke_terminal if
    its commands broke what is inside, else (engine, host, or no command was run) as infra_error."""

    def __init__(self, episode: Episode, tokenizer, config: Config):
        self.episode, self.tokenizer, self.config = episode, tokenizer, config
        self.markers, self.terminal = marker_ids(tokenizer), None

    def open(self) -> list[int]:
        """-> the prompt's ids. Raises ValueError if the context has no room for a reply."""
        task, config = self.episode.task, self.config
        ids = self._extend(harness.prompt(task, config.harness))
        if not ids or self._is_full():
            raise ValueError(f"context: {config.context} tokens do not hold the prompt of task {task.name} "
                             f"and a reply of {config.max_action_tokens}; raise it")  # fmt: skip
        with self._guard():
            self.terminal = open_terminal(task, config.backend, config.output_chars, config.terminals)
        return ids

    def answer(self, reply: Reply) -> list[int]:
        """Record a reply, do what it asks. -> ids of the answer; the episode may have stopped."""
        episode, config, (ids, logprobs) = self.episode, self.config, reply
        episode.transcript.append(Role.ACTION, ids, logprobs)
        episode.turns += 1
        ended_by = self.markers.get(ids[-1])
        action, output = harness.parse(self.tokenizer.decode(ids[:-1]), ended_by, config.harness), None
        if action.done:
            episode.stop = StopReason.DONE
        elif action.command:
            episode.commands.append(action.command)
            limit, started = episode.task.limits.command_seconds, time.monotonic()
            with self._guard():
                output = self.terminal.run(action.command, min(action.timeout or limit, limit))
            episode.seconds += time.monotonic() - started
        if episode.stop:
            return []
        new = self._extend(harness.observation(output, action.warning, ended_by, config.harness))
        if episode.seconds > episode.task.limits.agent_seconds:
            episode.stop = StopReason.AGENT_TIMEOUT
        elif new and episode.turns == config.max_turns:
            episode.stop = StopReason.MAX_TURNS
        elif not new or self._is_full():
            episode.stop = StopReason.CONTEXT_FULL
        return new

    def leave(self) -> None:
        """Grade the episode, then close its terminal."""
        if not self.episode.error:
            with self._guard():
                self.episode.reward = self.terminal.verify()
            self.episode.verifier_output = self.terminal.verifier_output
        self.close()

    def close(self) -> None:
        if self.terminal is not None:
            self.terminal.close()

    def _is_full(self) -> bool:  # no room for another reply
        return len(self.episode.transcript) + self.config.max_action_tokens > self.config.context

    def _extend(self, segments: list[Segment]) -> list[int]:
        """Append a message to the transcript, or nothing if it does not fit the context. -> its ids"""
        encoded = [(role, encode(self.tokenizer, role, text)) for role, text in segments]
        if len(self.episode.transcript) + sum(len(ids) for _, ids in encoded) > self.config.context:
            return []
        for role, ids in encoded:
            self.episode.transcript.append(role, ids)
        return [i for _, ids in encoded for i in ids]

    @contextmanager
    def _guard(self):
        try:
            yield
        except (TerminalDied, RunEnded) as error:  # it failed, or could not be had
            self.episode.stop, self.episode.error = StopReason.INFRA_ERROR, str(error)
            if isinstance(error, BrokenByAgent) and self.episode.commands:
                self.episode.stop, self.episode.reward = StopReason.BROKE_TERMINAL, 0.0


def rollout(agent, tokenizer, episodes: list[Episode], config: Config, ended=None) -> list[Episode]:
    """Play new episodes turn by turn, `terminals` of them side by side, and grade them. -> the same episodes,
    filled in. agent: a Sampler, or what has its `reply`. An episode that has stopped is graded while others
    take their next turn, then its seat is free: so who plays together never depends on the clock, and a run
    can be repeated bit for bit."""
    seats = [Seat(episode, tokenizer, config) for episode in episodes]
    waiting = list(range(len(seats)))
    unread: dict[int, list[int]] = {}  # episode at play -> ids that the agent has not read yet
    grading = []
    with ExitStack() as at_the_end, ThreadPoolExecutor(config.terminals) as pool:  # waits for what still runs
        for seat in seats:
            at_the_end.callback(seat.close)
        while waiting or unread or grading:
            free = config.terminals - len(unread) - len(grading)
            entering, waiting = waiting[:free], waiting[free:]
            unread.update(zip(entering, pool.map(Seat.open, [seats[i] for i in entering]), strict=True))

            playing = [i for i in unread if episodes[i].stop is None]
            new_ids = [unread[i] for i in playing]
            replies = agent.reply(playing, new_ids, config.max_action_tokens) if playing else []
            answers = list(pool.map(Seat.answer, [seats[i] for i in playing], replies))

            for i, graded in grading:
                graded.result()
                if ended:
                    ended(i, episodes[i])
            grading = [(i, pool.submit(seats[i].leave)) for i in unread if episodes[i].stop]
            unread = {i: ids for i, ids in zip(playing, answers, strict=True) if episodes[i].stop is None}
    return episodes


def sample_episodes(
    model, tokenizer, tasks: list[Task], group_size: int, config: Config, key, members=None, ended=None
) -> list[Episode]:
    """group_size rollouts of each task. key: integers, the first one of Noise; (*key, group, member) seeds a
    rollout's noise. None: greedy. members: the (group, member) to play, if not all. ended: as in rollout."""
    every = [(group, member) for group in range(len(tasks)) for member in range(group_size)]
    members = ranks.mine(every if members is None else members)
    noise = None if key is None else [np.random.default_rng((*key, *member)) for member in members]
    episodes = [Episode(tasks[group], group) for group, _ in members]
    if config.sampler == "vllm":
        from echo_min.sampler_vllm import play  # a loop of its own, in which no episode waits for another
        return ranks.gather(play(model, tokenizer, episodes, config, noise, ended))
    sampler = Sampler(model, set(marker_ids(tokenizer)), config, noise)
    return ranks.gather(rollout(sampler, tokenizer, episodes, config, ended))


def batch_metrics(episodes: list[Episode]) -> dict:
    """Means over a batch's valid episodes. Raises RunEnded if the environment failed for most of them."""
    failed = [e for e in episodes if e.stop is StopReason.INFRA_ERROR]
    why = next((e.error for e in [*failed, *episodes] if e.error), "")
    if 2 * len(failed) > len(episodes):
        raise RunEnded(f"{len(failed)} of {len(episodes)} episodes failed: {why}")
    if not (valid := [e for e in episodes if e.valid]):
        raise RunEnded("no episode of the batch can be trained on: all failed or ran out of agent time")
    sums = {"reward": sum(e.reward for e in valid), "turns": sum(e.turns for e in valid)}
    for role in (Role.ACTION, Role.OBSERVATION, Role.WARNING):
        sums[f"{role.name.lower()}_tokens"] = sum(e.transcript.count(role) for e in valid)
    metrics = {name: value / len(valid) for name, value in sums.items()}
    commands = [command for e in valid for command in e.commands]
    metrics["command_diversity"] = len(set(commands)) / max(len(commands), 1)
    stops = {str(reason): sum(e.stop is reason for e in episodes) for reason in StopReason}
    return metrics | {"error": why, "stop": stops}
