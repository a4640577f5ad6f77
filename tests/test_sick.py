"""A sick environment under a training run: what fails is counted and in no loss; when most of it fails the
run stops with the reason, and what is saved goes on as if nothing had been. Nothing hangs."""

import os
import signal
import time
from dataclasses import replace

import pytest
import torch

import train
from echo_min import checkpoint, evaluate
from echo_min.config import RunEnded
from echo_min.masking import Role, Transcript
from echo_min.terminals import bubblewrap
from echo_min.terminals.sandbox import Sandbox
from tests.test_sandbox import fresh_lookup, refuse_namespaces  # noqa: F401
from tests.test_train import SMALL, TASK, finished, metrics, run, weights  # noqa: F401

ONE = replace(SMALL, steps=1, eval_every=1, eval_tasks=2)
VERIFIERS = "sleep 60", "kill -9 $$", "exit 3", "kill -STOP $$", "while :; do :; done", "exec nothing"


@pytest.mark.parametrize("verify", VERIFIERS)
def test_a_verifier_that_gives_no_verdict(run, monkeypatch, verify):  # noqa: F811
    world = train.load_tasks(ONE.tasks, False, ONE.seed)
    sick = train.pick_tasks(world.train, 0, ONE)[0].name
    limits = replace(world.train[0].limits, verifier_seconds=0.5)
    tasks = [replace(t, verify=verify, limits=limits) if t.name == sick else t for t in world.train]
    monkeypatch.setattr(train, "load_tasks", lambda *_: replace(world, train=tasks))
    train.main(ONE, run)
    (line,) = [line for line in metrics(run) if "reward" in line]
    broken = line["stop"]["infra_error"] + line["stop"]["broke_terminal"]  # after a command
    assert broken == ONE.group_size == sum(line["stop"].values()) / 2
    assert sick in line["error"] and 0 <= line["reward"] <= 1


def test_sandboxes_that_are_killed(run, monkeypatch):  # noqa: F811
    calls, real = [], Sandbox.verify

    def killed(self):
        calls.append(time.monotonic())
        if len(calls) % 5 == 0:
            os.killpg(self._box.process.pid, signal.SIGKILL)
        return real(self)

    monkeypatch.setattr(Sandbox, "verify", killed)
    expert = Transcript([5, 6], [Role.PROMPT, Role.OBSERVATION], [0.0, 0.0])
    monkeypatch.setattr(evaluate, "expert_transcripts", lambda *_: [expert])
    train.main(replace(SMALL, eval_every=9), run)
    trained = [line for line in metrics(run) if "reward" in line]
    assert len(trained) == SMALL.steps and all(line["stop"]["infra_error"] in (1, 2) for line in trained)
    assert all("did not answer" in line["error"] or "not listen" in line["error"] for line in trained)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives its rights up")
def test_a_missing_program_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(bubblewrap, "_kept", [])
    bubblewrap._bwrap()  # which a look at PATH finds
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunEnded, match="'setpriv'; install setpriv") as refusal:
        Sandbox(TASK, 9)
    assert "user namespaces" not in str(refusal.value)


def test_bwrap_refused_in_mid_run(finished, run, monkeypatch, tmp_path, fresh_lookup):  # noqa: F811
    real = train.update

    def update(*args):
        if args[4] == 1:  # from the third step on
            while bubblewrap._kept:
                bubblewrap._kept.pop().close()
            bubblewrap._bwrap.cache_clear()
            refuse_namespaces(sick, tmp_path / "bin")
        return real(*args)

    with monkeypatch.context() as sick:
        sick.setattr(train, "update", update)
        with pytest.raises(RunEnded, match=r"6 of 6 episodes failed: cannot start a sandbox.* uid map"):
            train.main(replace(SMALL, eval_every=4), run)
    bubblewrap._bwrap.cache_clear()
    assert checkpoint.latest(run / "echo")[0] == 2
    train.main(replace(SMALL, eval_every=4), run)
    for name, tensor in weights(finished).items():
        assert torch.equal(tensor, weights(run)[name]), name
