"""What an experiment asks a policy beside train.py's own evaluations: `watched` goes where a control goes.

The small evaluation, at every full one and where an experiment asks for more: a sampled rollout of a few
held-out tasks. With the full ones also, on the expert's episodes, the cross-entropy of what the terminal
printed by kind of token, and by how much the true output is likelier after the true command than after
another episode's; the cross-entropy of warnings, its own and those that fixed replies call for; in world gnu
what may stand at the word's place. A line holds `probe`, with the number of steps that the policy had made;
run folders are not kept, these lines are.
"""

import random
import re
from dataclasses import replace
from statistics import fmean

import gnu_words
import torch

from echo_min import harness
from echo_min.config import Config
from echo_min.evaluate import expert_transcripts, observation_logprobs
from echo_min.masking import Role, Segment, Transcript, encode
from echo_min.rollout import Episode, Noise, StopReason, sample_episodes
from echo_min.tasks import World

FEW = 50  # held-out tasks
KINDS = "echoed", "telling", "template"


def watched(control, world: World, config: Config, every: int = 0):
    """control(batch, context) or None -> one that also puts the numbers in the step's line, those of a small
    evaluation every so many steps; 0: with the full ones only."""
    expert = None

    def watching(batch, context):
        nonlocal expert
        if config.tasks.startswith("world:gnu"):
            found = gnu_words.shares(context.episodes)
            context.metrics |= {name: value for name, value in found.items() if value == value}
        if context.step % (every or config.eval_every) == 0:
            expert = expert or expert_transcripts(context.tokenizer, world, config)
            numbers = probe(context.model, context.tokenizer, world, expert, context.step, config)
            context.metrics["probe"] = {"step": context.step} | numbers
        return control(batch, context) if control else batch

    return watching


def probe(model, tokenizer, world: World, expert: list[Transcript], step: int, config: Config) -> dict:
    """-> numbers of the policy after `step` steps; those that this world does not have are left out."""
    key = Noise.SHOWING, config.seed, step
    few = world.held_out[: min(FEW, config.eval_tasks)]
    episodes = sample_episodes(model, tokenizer, few, 1, config, key)
    graded = [episode for episode in episodes if episode.stop is not StopReason.INFRA_ERROR]
    found = {"pass_rate_few": fmean(episode.reward >= 1 for episode in graded)}
    found["turns"] = fmean(episode.turns for episode in graded)
    found["action_tokens"] = fmean(episode.transcript.count(Role.ACTION) for episode in graded)
    found["well_begun"] = well_begun(graded, world)
    found["cut_off"] = fmean(cut_off(tokenizer, episode.transcript) for episode in graded)
    wrong = sum(len(wrong_calls(episode)) for episode in graded)
    found |= {"hung": found["cut_off"] * len(graded) / wrong} if wrong else {}
    found["timeouts"] = fmean(episode.stop is StopReason.AGENT_TIMEOUT for episode in graded)
    if step % config.eval_every == 0:
        found |= ce_by_kind(model, tokenizer, expert, world.telling, config)
        found |= log_ratios(model, tokenizer, expert, world.telling, config)
        warned = [only_warnings(episode.transcript) for episode in graded]
        nats = [-p for one in observation_logprobs(model, warned, config) for p in one.values()]
        found |= {"ce_warnings": fmean(nats)} if nats else {}
        told = [only_warnings(one) for one in warned_of(tokenizer, few, config)]
        nats = [-p for one in observation_logprobs(model, told, config) for p in one.values()]
        found["ce_warned"] = fmean(nats)
        if config.tasks.startswith("world:gnu"):
            found |= word_slots(model, tokenizer, world, config)
    return {name: round(float(value), 5) for name, value in found.items()}


def cut_off(tokenizer, transcript: Transcript) -> int:
    """How many commands ran into their time limit, as the harness notes after their output."""
    notes = (transcript.ids[slice(*span)] for span in runs_of(transcript, Role.SCAFFOLD))
    return sum("(timed out)" in tokenizer.decode(ids) for ids in notes)


def wrong_calls(episode: Episode) -> list[str]:
    right = episode.task.solution.split()
    return [command for command in episode.commands if command.split() != right]


def well_begun(episodes: list[Episode], world: World) -> float:
    """Share of episodes whose first command calls a program that the expert calls: what is left of form."""
    scripts = [world.expert(task, random.Random(0)) for task in world.held_out[:FEW]]
    programs = {command.split()[0] for script in scripts for command in script if command != harness.DONE}
    return fmean(bool(programs & set(" ".join(e.commands[:1]).split()[:1])) for e in episodes)


def runs_of(transcript: Transcript, role: Role) -> list[tuple[int, int]]:
    """(first, end) of each stretch of tokens with this role."""
    marks = "".join("x" if r == role else "." for r in transcript.roles)
    return [match.span() for match in re.finditer("x+", marks)]


def kinds(tokenizer, transcript: Transcript, telling: tuple[str, ...]) -> dict[int, str]:
    """position of an observation token -> echoed (of a word of the command before it), telling (of a word
    that tells what to do), template (all else)."""
    tells, found = {word.strip("'\"") for word in telling}, {}
    actions = runs_of(transcript, Role.ACTION)
    for first, end in runs_of(transcript, Role.OBSERVATION):
        begin, close = max(span for span in actions if span[1] <= first)
        command = tokenizer.decode(transcript.ids[begin : close - 1])
        echoes = {word.strip("'\"") for word in re.split(r"[\s=]", command)}
        text, spans = "", []
        for i in transcript.ids[first:end]:
            start, text = len(text), text + tokenizer.decode([i])
            spans.append(range(start, len(text)))
        kind_at: dict[int, str] = {}
        for match in re.finditer(r"[^\s'\":,]+", text):
            kind = "echoed" if match[0] in echoes else "telling" if match[0] in tells else "template"
            kind_at |= dict.fromkeys(range(*match.span()), kind)
        for position, span in enumerate(spans, first):
            found[position] = next((kind_at[c] for c in span if c in kind_at), "template")
    return found


def ce_by_kind(model, tokenizer, expert, telling, config: Config) -> dict[str, float]:
    """Nats a token of each of KINDS, over the expert's observations."""
    nats: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for transcript, logprobs in zip(expert, observation_logprobs(model, expert, config), strict=True):
        of = kinds(tokenizer, transcript, telling)
        for position, logprob in logprobs.items():
            nats[of[position]].append(-logprob)
    return {f"ce_{kind}": fmean(values) for kind, values in nats.items() if values}


def log_ratios(model, tokenizer, expert, telling, config: Config) -> dict[str, float]:
    """log p(output | its command) - log p(output | another episode's command), nats a token: of the first
    output of an episode, whole and telling words alone. The prompt stays the episode's own."""
    true, swapped, marks = [], [], []
    firsts = [(t, runs_of(t, Role.ACTION)[0], runs_of(t, Role.OBSERVATION)[:1]) for t in expert]
    firsts = [(t, action, seen[0]) for t, action, seen in firsts if seen]
    for n, (t, (a, b), (_, end)) in enumerate(firsts):
        others = (o.ids[c:d] for o, (c, d), _ in firsts[n + 1 :] + firsts[:n])
        other = next((ids for ids in others if ids != t.ids[a:b]), None)
        if other is None:
            continue
        short = Transcript(t.ids[:end], t.roles[:end], t.logprobs[:end])
        true.append(short)
        roles = t.roles[:a] + [int(Role.ACTION)] * len(other) + t.roles[b:end]
        ids = t.ids[:a] + other + t.ids[b:end]
        swapped.append(Transcript(ids, roles, [0.0] * len(ids)))
        of = kinds(tokenizer, short, telling)
        marks += [of[position] == "telling" for position in sorted(of)]
    pair = [observation_logprobs(model, transcripts, config) for transcripts in (true, swapped)]
    flat = [[one[position] for one in found for position in sorted(one)] for found in pair]
    ratios = [after - other for after, other in zip(*flat, strict=True)]
    found = {"log_ratio": ratios, "log_ratio_telling": [r for r, m in zip(ratios, marks, strict=True) if m]}
    return {name: fmean(values) for name, values in found.items() if values}


def only_warnings(transcript: Transcript) -> Transcript:
    """Its warnings as if they were what the terminal printed."""
    to = {int(Role.WARNING): int(Role.OBSERVATION), int(Role.OBSERVATION): int(Role.SCAFFOLD)}
    return replace(transcript, roles=[to.get(role, role) for role in transcript.roles])


def warned_of(tokenizer, tasks, config: Config) -> list[Transcript]:
    """Each task's prompt, a reply that its harness complains of, the complaint: the same for every policy.
    The replies take turns: empty, cut at the limit."""
    end = tokenizer.convert_tokens_to_ids(harness.END)
    found = []
    for n, task in enumerate(tasks):
        ids = [end] if n % 2 else encode(tokenizer, Role.ACTION, task.solution)
        warning, ended_by = (harness.EMPTY, harness.END) if n % 2 else (harness.CUT, None)
        transcript = Transcript()
        for role, text in harness.prompt(task, config.harness):
            transcript.append(role, encode(tokenizer, role, text))
        transcript.append(Role.ACTION, ids, [0.0] * len(ids))
        for role, text in harness.observation(None, warning, ended_by, config.harness):
            transcript.append(role, encode(tokenizer, role, text))
        found.append(transcript)
    return found


def word_slots(model, tokenizer, world: World, config: Config) -> dict[str, float]:
    """World gnu: exact probabilities of what follows a right call up to its word, means over the verbs.
    Of the list's first word, its other words, the refused words, the goal. And the pass rate of who knows the
    lists alone."""
    tasks = {task.instruction.split()[2]: task for task in world.held_out}
    rows: list[tuple[str, Transcript]] = []
    names = "slot_first", "slot_others", "slot_refused", "slot_goal"
    for task in tasks.values():
        call, first, others, refused, goal = gnu_words.slots(task)
        for name, words in zip(names, ([first], others, refused, [goal]), strict=True):
            for word in words:
                transcript = Transcript()
                segments: list[Segment] = harness.prompt(task, config.harness)
                for role, text in [*segments, (Role.SCAFFOLD, call)]:
                    transcript.append(role, encode(tokenizer, role, text))
                transcript.append(Role.OBSERVATION, encode(tokenizer, Role.ACTION, word))
                rows.append((name, transcript))
    logprobs = observation_logprobs(model, [transcript for _, transcript in rows], config)
    total = dict.fromkeys(names, 0.0)
    for (name, _), one in zip(rows, logprobs, strict=True):
        total[name] += torch.tensor(list(one.values())).sum().exp().item() / len(tasks)
    return total | {"ceiling": gnu_words.ceiling(world.held_out)}
