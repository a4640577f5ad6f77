"""The page of a run and of an evaluation, as a real browser shows it."""

import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib.image
import pytest

import eval
import train
from echo_min import page, report
from echo_min.checkpoint import load_policy
from echo_min.config import Config
from echo_min.evaluate import expert_transcripts, observation_logprobs
from echo_min.masking import Role, Transcript, encode
from echo_min.rollout import Episode, StopReason, sample_episodes
from echo_min.tasks import Task
from echo_min.worlds.registry import load_tasks

PROMPT, ACTION, OBSERVATION, WARNING, SCAFFOLD = Role
OPTIONS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
    --disable-background-networking --disable-component-update
    --disable-sync --hide-scrollbars --window-size=1200,1000""".split()
HOSTILE = [
    "</script><script>document.title='pwned'</script>",
    "<img src=x onerror=\"document.title='pwned'\">",
    "<!--<script>",
    "]]>&lt;b&gt;&quot;'`${title}\\u003c",
    "\u2028\u2029",
]


def chromium(*what):
    """-> what it prints. Without it: a failure in CI, else a skip."""
    program = shutil.which("chromium")
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("no chromium: apt-get install chromium")
        pytest.skip("no chromium")
    with tempfile.TemporaryDirectory() as empty:
        command = [program, *OPTIONS, f"--user-data-dir={empty}", *map(str, what)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


class Shown(HTMLParser):
    """A page as the browser has built it. columns: heading, facts, tokens [text, role, title, style]."""

    def __init__(self, path, at=""):
        super().__init__()
        self.tags, self.columns, self.path, self.texts, self.pens = [], [], [], {}, []
        self.feed(chromium("--dump-dom", path.as_uri() + at))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.path.append(tag)
        if tag == "article":
            self.columns.append({"h3": "", "small": "", "tokens": []})
        if tag == "span" and self.columns:
            style = attributes.get("style") or ""
            self.columns[-1]["tokens"].append(["", attributes["class"], attributes["title"], style])
        if tag == "polyline":
            self.pens.append((attributes["stroke"], bool(attributes["stroke-dasharray"])))

    def handle_endtag(self, tag):
        while self.path and self.path.pop() != tag:
            pass  # elements without an end, as meta

    def handle_data(self, data):
        tag = self.path[-1] if self.path else ""
        if tag == "span" and self.columns:
            self.columns[-1]["tokens"][-1][0] += data
        elif tag in ("h3", "small"):
            self.columns[-1][tag] += data
        else:
            self.texts.setdefault(tag, []).append(data)


def points(surprises=(4.0, 0.5), text="usage\n"):
    """Two arms, three evaluations: grpo stays surprised, echo's surprise falls."""
    for arm in ("grpo", "echo"):
        for step in (0, 10, 20):
            nats = surprises[1] if (arm, step) == ("echo", 20) else surprises[0]
            expert = [
                ["ask", PROMPT, 0.0],
                ["tk", ACTION, 0.0],
                [text, OBSERVATION, nats],
                ["end", SCAFFOLD, 0.0],
            ]
            own = [[f"{arm}{step}", ACTION, 0.0], ["bad reply", WARNING, 0.0]]
            rest = {"reward": step / 20, "stop": "done"}
            yield {"arm": arm, "step": step, "task": "t", "expert": expert, "own": own, **rest}


def records(ce=1.5):
    rates = {"pass_rate": 0.5, "pass_rate_greedy": 0.25, "expert_ce": ce}
    return [{"arm": arm, "step": step, **rates} for arm in ("grpo", "echo") for step in (0, 10, 20)]


@pytest.fixture
def drawn(tmp_path):
    page.write(tmp_path / "index.html", "a run", list(points()), records())
    return tmp_path / "index.html"


def test_every_arm_is_drawn_at_its_last_step(drawn):
    shown = Shown(drawn)
    heads = ["base", "grpo, step 20", "echo, step 20"]
    assert [column["h3"] for column in shown.columns] == heads * 2
    grpo, echo = report.COLOURS["grpo"], report.COLOURS["echo"]
    assert shown.pens == [
        (grpo, False),
        (grpo, True),
        (echo, False),
        (echo, True),
        (grpo, False),
        (echo, False),
    ]
    assert shown.tags.count("circle") == 6 * 3
    assert {"grpo, sampled", "echo, greedy", "step", "0.75"} <= set(shown.texts["text"])
    assert shown.columns[2]["tokens"] == [
        ["ask", "prompt", "prompt", ""],
        ["tk", "action", "action", ""],
        ["usage⏎\n", "observation", "0.50 nats", "background-color: rgba(200, 30, 45, 0.14);"],
        ["end", "scaffold", "scaffold", ""],
    ]
    assert shown.columns[5]["small"] == "reward 1, done, surprise 0.00 nats a token"
    assert [token[:2] for token in shown.columns[5]["tokens"]] == [
        ["echo20", "action"],
        ["bad reply", "warning"],
    ]


def test_the_step_in_the_address_is_shown(drawn):
    shown = Shown(drawn, "#step=0")
    before = [
        "usage⏎\n",
        "observation",
        "4.00 nats",
        "background-color: rgba(200, 30, 45, 0.7); color: white;",
    ]
    assert shown.columns[2]["tokens"][2] == before
    assert shown.columns[5]["tokens"][0][0] == "echo0"
    assert shown.texts["output"] == ["step 0 of 20"]
    assert Shown(drawn, "#step=7").texts["output"] == ["step 20 of 20"]  # there is none


def test_the_slider_changes_the_shades(drawn):
    free = drawn.read_text().replace("Content-Security-Policy", "off")  # it would forbid the test's script
    slider = "document.querySelector('input')"
    script = f"<script>{slider}.value = 0; {slider}.dispatchEvent(new Event('input'))</script>"
    drawn.write_text(free + script)
    shown = Shown(drawn)
    assert shown.texts["output"] == ["step 0 of 20"]
    assert [column["tokens"][2][2] for column in shown.columns[:3]] == ["4.00 nats"] * 3


def test_the_fading_is_seen(drawn, tmp_path):
    def red(at):
        chromium(f"--screenshot={tmp_path / 'shot.png'}", drawn.as_uri() + at)
        rgb = matplotlib.image.imread(tmp_path / "shot.png")[600:, 800:, :3]  # of the last column, echo
        return ((rgb[..., 0] > 0.7) & (rgb[..., 1] < 0.5) & (rgb[..., 2] < 0.5)).sum()

    assert red("#step=0") > red("#step=20") + 300


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(tmp_path, text):
    path = tmp_path / "index.html"
    evil = [
        p | {"task": text, "own": [[text, role, 1.0] for role in Role], "stop": text}
        for p in points(text=text)
    ]
    page.write(path, text, evil, records())
    assert path.read_text().count("<script") == 2 and "<img" not in path.read_text()
    shown = Shown(path)
    assert shown.tags.count("script") == 2 and "img" not in shown.tags
    assert shown.texts["h1"] == [report.printable(text)]
    assert "".join(shown.texts["title"]).strip() == report.printable(text).strip()
    assert [token[0] for token in shown.columns[4]["tokens"]] == [text] * len(Role)
    assert shown.columns[2]["tokens"][2][0] == text
    trials = [{k: v for k, v in p.items() if k != "expert"} | {"arm": text, "member": text} for p in evil[:3]]
    page.write(path, text, trials)
    shown = Shown(path)
    assert shown.tags.count("script") == 2 and "img" not in shown.tags
    assert shown.texts["option"] == [f"{text}, trial {text}"] * 3
    assert shown.columns[0]["h3"] == text and text in shown.columns[0]["small"]


def test_a_script_that_got_in_all_the_same_does_not_run(drawn):
    inserted = "<script>document.title = 'pwned'</script><img src=x onerror=\"document.title = 'pwned'\">"
    whole = drawn.read_text()
    drawn.write_text(whole + inserted)
    assert Shown(drawn).texts["title"] == ["a run"]
    drawn.write_text(whole.replace("Content-Security-Policy", "off") + inserted)
    assert Shown(drawn).texts["title"] == ["pwned"]  # so it is the policy that stopped it


def test_control_characters_are_dots(tokenizer):
    transcript = Transcript()
    transcript.append(OBSERVATION, encode(tokenizer, OBSERVATION, "a\x1b]0;x\x07\u202eb\n"))
    episode = Episode(Task("\x1b[31mt", "", "", ""), 0, transcript, stop=StopReason.INFRA_ERROR)
    tokens = report.tokens_with_surprise(tokenizer, transcript, {0: -1.23456})
    shown = page.point(episode, tokens, arm="echo")
    assert shown["own"][0] == ("a", OBSERVATION, 1.235) and shown["task"] == "·[31mt"
    assert not [text for text, *_ in shown["own"] if not text.replace("\n", "").isprintable()]
    assert (shown["reward"], shown["stop"], shown["arm"]) == (None, "infra_error", "echo")


def test_what_is_not_a_number_is_not_drawn(tmp_path):
    missing = [p | {"reward": None} for p in points()]
    page.write(tmp_path / "index.html", "x", missing, records(ce=float("nan")))
    shown = Shown(tmp_path / "index.html")
    assert shown.tags.count("circle") == 4 * 3
    assert shown.columns[5]["small"].startswith("reward none, done")


def test_a_page_is_written_whole_or_not_at_all(drawn):
    before = drawn.read_text()
    with pytest.raises(ValueError, match="JSON"):
        page.write(drawn, "x", list(points(surprises=(float("inf"), 0.0))))
    assert drawn.read_text() == before


SMALL = Config(
    name="small", tasks="world:tool", max_turns=3, device="cpu", threads=1, base_demonstrations=64,
    base_steps=40, base_batch=16, steps=2, tasks_per_step=2, group_size=2, eval_every=1, save_every=1,
    eval_tasks=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    train.main(SMALL, folder)
    return folder


def saved(folder):
    return [json.loads(line) for line in (folder / "page.jsonl").read_text().splitlines()]


def test_a_run_saves_what_its_policies_read_and_did(run):
    lines = saved(run)
    assert [(p["arm"], p["step"]) for p in lines] == [(arm, i) for arm in ("grpo", "echo") for i in range(3)]
    model, tokenizer = load_policy(run / "base")
    world = load_tasks(SMALL.tasks, False, SMALL.seed)
    transcripts = expert_transcripts(tokenizer, world, SMALL)
    longest = max(transcripts, key=len)
    assert len(longest) > min(map(len, transcripts))  # one of its calls fails
    i, tasks, base = transcripts.index(longest), world.held_out[: SMALL.eval_tasks], lines[0]
    greedy = sample_episodes(model, tokenizer, tasks, 1, SMALL, None)[i]
    assert (base["task"], base["reward"], base["stop"]) == (tasks[i].name, greedy.reward, greedy.stop)
    for kind, transcript in (("expert", longest), ("own", greedy.transcript)):
        (logprobs,) = observation_logprobs(model, [transcript], SMALL)
        expected = report.tokens_with_surprise(tokenizer, transcript, logprobs)
        assert [(text, role) for text, role, _ in base[kind]] == [token[:2] for token in expected]
        assert [nats for *_, nats in base[kind]] == pytest.approx([nats for *_, nats in expected], abs=2e-3)
        assert sum(nats for *_, nats in base[kind]) > 0
    assert base["expert"] != lines[-1]["expert"]
    shown = Shown(run / "index.html", "#step=1")
    assert [column["h3"] for column in shown.columns] == ["base", "grpo, step 1", "echo, step 1"] * 2


def test_resume_drops_the_points_after_the_checkpoint(run, tmp_path):
    folder = tmp_path / "small"
    shutil.copytree(run, folder)
    with open(folder / "page.jsonl", "a") as file:
        file.write(json.dumps(saved(run)[-1] | {"step": 3}) + '\n{"arm": "ec')
    train.main(replace(SMALL, steps=3), folder)
    steps = [(p["arm"], p["step"]) for p in saved(folder)]
    assert sorted(steps) == sorted((arm, i) for arm in ("grpo", "echo") for i in range(4))
    assert "grpo, step 3" in [column["h3"] for column in Shown(folder / "index.html").columns]


def test_an_evaluation_has_a_page_of_its_trials(run, tmp_path, capsys):
    path, flags = tmp_path / "new" / "page.html", ["--tasks", "world:tool", "--limit", "12"]
    eval.cli([str(run / "echo"), *flags, "--html", str(path)])
    first, other = Shown(path), Shown(path, "#step=14")
    assert len(first.texts["option"]) == 20 and first.pens == []
    assert "greedy" in first.texts["option"][14] and first.texts["option"][0].endswith("trial 0")
    assert len(first.columns) == 1 and "nats a token" in first.columns[0]["small"]
    assert first.columns[0]["tokens"] != other.columns[0]["tokens"]
    with pytest.raises(SystemExit, match=r"--html .*: name a checkpoint"):
        eval.cli(["--agent", "oracle", *flags, "--html", str(path)])
