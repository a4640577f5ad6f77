"""What experiments ask a policy: each number against one that is computed another way."""

import math
import sys
from pathlib import Path

import pytest
import torch

from echo_min import harness
from echo_min.config import Config
from echo_min.evaluate import expert_transcripts
from echo_min.masking import Role, Transcript, encode
from echo_min.rollout import Episode
from echo_min.tasks import Task
from echo_min.tiny import tiny_model, tiny_tokenizer
from echo_min.worlds.registry import load_tasks

sys.path.insert(0, str(Path(__file__).parent.parent / "figures"))

import gnu_words
import probes

WORDS = ["tk carve -q bold acorn", "usage: tk carve -q bold FILE", "load: 12ab", "ok acorn"] * 20


def transcript(tokenizer, *segments):
    made = Transcript()
    for role, text in segments:
        ids = encode(tokenizer, role, text)
        if role is Role.ACTION:
            ids.append(tokenizer.convert_tokens_to_ids(harness.END))
            made.append(role, ids, [0.0] * len(ids))
        else:
            made.append(role, ids)
    return made


def policy(texts):
    tokenizer = tiny_tokenizer(texts)
    return tiny_model(tokenizer, 1), tokenizer


def one_hot_logprob(model, ids, position):
    logits = model(torch.tensor([ids])).logits[0, position - 1].float()
    return logits.log_softmax(-1)[ids[position]].item()


def test_a_token_is_of_the_word_it_is_part_of():
    _, tokenizer = policy(WORDS)
    telling = "-q", "bold", "-x", "'size'"
    call, usage = "tk carve -x cold acorn", "usage: tk carve -q bold FILE\n  - 'size'"
    first = (Role.PROMPT, "carve acorn"), (Role.ACTION, call), (Role.OBSERVATION, usage)
    second = (Role.ACTION, "tk carve --sort=-q bold"), (Role.OBSERVATION, "-q bold carve")
    made = transcript(tokenizer, *first, (Role.SCAFFOLD, "exit 2"), *second)
    by_kind = {kind: "" for kind in probes.KINDS}
    found = probes.kinds(tokenizer, made, telling)
    assert sorted(found) == [t for t, role in enumerate(made.roles) if role == Role.OBSERVATION]
    for position in sorted(found):
        by_kind[found[position]] += tokenizer.decode([made.ids[position]])
    words = {kind: text.split() for kind, text in by_kind.items()}
    assert words["echoed"] == ["tk", "carve-q", "bold", "carve"]  # both outputs, one after the other
    assert words["telling"] == ["-q", "boldsize"]
    assert "usage:" in words["template"][0] and "FILE" in by_kind["template"]


def test_ce_by_kind_adds_up_and_ratio_is_the_difference_of_two_passes():
    model, tokenizer = policy(WORDS)
    config, telling = Config(), ("-q", "bold")
    made = [
        transcript(tokenizer, (Role.PROMPT, "carve acorn"), (Role.ACTION, call), (Role.OBSERVATION, says))
        for call, says in [("tk carve -x bold acorn", "usage: tk carve -q bold FILE"), ("done", "ok acorn")]
    ]
    made.append(transcript(tokenizer, (Role.PROMPT, "carve acorn"), (Role.ACTION, "done")))  # prints nothing
    ces, nats = probes.ce_by_kind(model, tokenizer, made, telling, config), {}
    pairs, told = [], []
    for n, t in enumerate(made[:2]):
        of = probes.kinds(tokenizer, t, telling)
        end = t.roles.index(Role.OBSERVATION)
        begin = t.roles.index(Role.ACTION)
        other = made[1 - n]
        command = [i for i, role in zip(other.ids, other.roles, strict=True) if role == Role.ACTION]
        ids = t.ids[:begin] + command + t.ids[end:]
        for position, kind in of.items():
            true = one_hot_logprob(model, t.ids, position)
            nats.setdefault(kind, []).append(-true)
            pairs.append(true - one_hot_logprob(model, ids, position + len(ids) - len(t.ids)))
            told.append(kind == "telling")
    for kind, values in nats.items():
        assert ces[f"ce_{kind}"] == pytest.approx(sum(values) / len(values), abs=1e-5)
    found = probes.log_ratios(model, tokenizer, made, telling, config)
    assert found["log_ratio"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)
    of_words = [pair for pair, tells in zip(pairs, told, strict=True) if tells]
    assert found["log_ratio_telling"] == pytest.approx(sum(of_words) / len(of_words), abs=1e-5)
    assert abs(found["log_ratio"]) > 1e-4


def test_warnings_are_scored_alone():
    _, tokenizer = policy(WORDS)
    made = transcript(tokenizer, (Role.OBSERVATION, "ok"), (Role.WARNING, "cut"), (Role.SCAFFOLD, "x"))
    roles = probes.only_warnings(made).roles
    assert [r == Role.OBSERVATION for r in roles] == [r == Role.WARNING for r in made.roles]
    assert any(r == Role.OBSERVATION for r in roles)


def test_fixed_replies_are_warned_of_as_a_rollout_would(gnu):
    _, tokenizer, world, config = gnu
    for task, made in zip(
        world.held_out, probes.warned_of(tokenizer, world.held_out[:4], config), strict=False
    ):
        text = tokenizer.decode(made.ids)
        action = [i for i, role in zip(made.ids, made.roles, strict=True) if role == Role.ACTION]
        told = [i for i, role in zip(made.ids, made.roles, strict=True) if role == Role.WARNING]
        ended = harness.END if action[-1] == tokenizer.convert_tokens_to_ids(harness.END) else None
        reply = tokenizer.decode(action).removesuffix(harness.END)
        assert harness.warning_block(harness.parse(reply, ended).warning) == tokenizer.decode(told)
        assert text.startswith(f"<|im_start|>user\n{task.instruction}<|im_end|>\n<|im_start|>assistant\n")
        assert text.endswith(harness.ASSISTANT) and text.count("<|im_end|>") == 3
    endings = [
        bool(made.count(Role.ACTION) > 1) for made in probes.warned_of(tokenizer, world.held_out[:4], config)
    ]
    assert endings == [True, False, True, False]


def test_only_wrong_calls_can_have_hung():
    task = Task("t", "zip acorn", "", "tk zip -d acorn")
    episode = Episode(task, 0, commands=["tk zip -q acorn", "tk zip  -d acorn", "ls"])
    assert probes.wrong_calls(episode) == ["tk zip -q acorn", "ls"]


@pytest.fixture(scope="module")
def gnu():
    settings = {"max_turns": 1, "max_action_tokens": 16, "output_chars": 320, "context": 160}
    config = Config(tasks="world:gnu", eval_tasks=60, eval_every=5, **settings)
    world = load_tasks(config.tasks, False, 1)
    texts = [text for task in world.train for text in (task.instruction, task.solution)]
    return *policy(texts), world, config


def test_word_slots_are_exact_probabilities(gnu):
    model, tokenizer, world, config = gnu
    found = probes.word_slots(model, tokenizer, world, config)
    goals = {}
    for task in world.held_out:  # of a verb its last task there
        goals[task.instruction.split()[2]] = task
    total = 0.0
    for task in goals.values():
        call, *_, goal = gnu_words.slots(task)
        ids = [i for role, text in harness.prompt(task) for i in encode(tokenizer, role, text)]
        ids += encode(tokenizer, Role.SCAFFOLD, call)
        word = encode(tokenizer, Role.ACTION, goal)
        total += math.exp(sum(one_hot_logprob(model, ids + word, len(ids) + n) for n in range(len(word))))
    assert found["slot_goal"] == pytest.approx(total / len(goals), rel=1e-4)
    assert 0 < found["slot_goal"] < found["slot_first"] + found["slot_others"] < 1


def test_well_begun_is_the_share_whose_first_command_calls_a_program_of_the_experts():
    world = load_tasks("world:file", False, 1)
    typed = ["grep -l navy *"], ["rm acorn", "what"], ["what", "rm acorn"], ["grepx"], [], [" cp a b"]
    episodes = [Episode(world.train[0], 0, commands=commands) for commands in typed]
    assert probes.well_begun(episodes, world) == pytest.approx(3 / 6)
    assert probes.well_begun([Episode(world.train[0], 0, commands=["done"])], world) == 0


def test_commands_that_were_cut_off_are_counted_and_output_that_says_so_is_not():
    tokenizer = tiny_tokenizer([])
    late = (Role.ACTION, "b"), (Role.OBSERVATION, "x"), (Role.SCAFFOLD, "(exit_code=124)(timed out)")
    segments = [(Role.ACTION, "a"), (Role.OBSERVATION, "(timed out)\n"), (Role.SCAFFOLD, "(exit_code=0)")]
    for times in range(3):
        played = transcript(tokenizer, *segments, *late * times)
        assert probes.cut_off(tokenizer, played) == times


def test_a_probe_of_a_real_policy_holds_every_number(gnu):
    model, tokenizer, world, config = gnu
    expert = expert_transcripts(tokenizer, world, config)
    full = probes.probe(model, tokenizer, world, expert, 5, config)
    small = probes.probe(model, tokenizer, world, expert, 4, config)
    few = {"pass_rate_few", "turns", "action_tokens", "well_begun", "timeouts", "cut_off"}
    assert set(small) - {"hung"} == few  # of no wrong call none hangs
    slots = {"slot_first", "slot_others", "slot_refused", "slot_goal", "ceiling"}
    assert full["ceiling"] == pytest.approx(gnu_words.ceiling(world.held_out), abs=1e-5)
    ces = {"ce_echoed", "ce_telling", "ce_template", "ce_warned"}
    assert set(full) - {"ce_warnings", "hung"} == few | slots | ces | {"log_ratio", "log_ratio_telling"}
