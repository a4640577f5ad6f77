"""Settings: what is refused, what may be 0, and what a file keeps."""

import json
from dataclasses import asdict, fields
from math import inf, nan

import pytest

from echo_min.config import ARMS, CHOICES, Config
from echo_min.presets import PRESETS

ZERO = """seed threads base_steps base_observation_weight env_weight policy_weight warmup_steps
    weight_decay beta1 beta2 clip_low clip_high steps""".split()
NUMBERS = [f for f in fields(Config) if f.type in (int, float)]


@pytest.mark.parametrize("name", [f.name for f in NUMBERS])
def test_numbers_are_above_zero_or_zero_where_that_means_something(name):
    kind = next(f.type for f in NUMBERS if f.name == name)
    if name in ZERO:
        assert getattr(Config(**{name: kind(0)}), name) == 0
    else:
        with pytest.raises(ValueError, match=f"{name}: 0.* is too small"):
            Config(**{name: kind(0)})
    for wrong in (kind(-1), *((inf, nan) if kind is float else ())):
        with pytest.raises(ValueError, match=f"^{name}: .* is too small or not a finite number"):
            Config(**{name: wrong})


@pytest.mark.parametrize("f", fields(Config), ids=lambda f: f.name)
def test_a_value_of_another_type_is_refused(f):
    wrong = {str: 3, int: 1.5, float: "1", bool: 1}[f.type]
    with pytest.raises(ValueError, match=f"{f.name}: expected {f.type.__name__}, got {wrong!r}"):
        Config(**{f.name: wrong})
    assert f.metadata["help"] and f.default == getattr(Config(), f.name)


def test_a_whole_number_will_do_for_a_float_and_true_for_no_number():
    value = Config(learning_rate=1).learning_rate
    assert value == 1.0 and type(value) is float
    for name in ("steps", "learning_rate"):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            Config(**{name: True})


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name):
    for value in CHOICES[name]:
        assert getattr(Config(**{name: value}), name) == value
    with pytest.raises(ValueError, match=f"{name}: 'odd' is not one of {CHOICES[name][0]}, "):
        Config(**{name: "odd"})


def test_arms():
    assert ARMS == ("grpo", "echo")
    for arms in ("grpo", "echo", "echo,grpo", "grpo,echo"):
        assert Config(arms=arms).arms == arms
    for arms in ("", "grpo,", "echo,ppo"):
        with pytest.raises(ValueError, match=r"arms: .*is not one of grpo, echo"):
            Config(arms=arms)


@pytest.mark.parametrize("name", ["beta1", "beta2", "clip_low"])
def test_shares_are_below_one(name):
    assert getattr(Config(**{name: 0.999}), name) == 0.999
    with pytest.raises(ValueError, match=f"{name}.* must be below 1"):
        Config(**{name: 1.0})


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/", "../x"])
def test_a_run_has_a_plain_name(name):
    with pytest.raises(ValueError, match="is not a plain folder name"):
        Config(name=name)


def test_who_makes_a_base():
    assert Config().makes_base and Config(model="x", format_stage=True).makes_base
    assert not Config(model="x").makes_base


def test_a_file_keeps_every_setting(tmp_path):
    path, config = tmp_path / "config.json", Config(seed=9, learning_rate=3e-5, arms="echo", parsed_only=True)
    config.save(path)
    assert Config.load(path) == config and [p.name for p in tmp_path.iterdir()] == ["config.json"]
    saved = json.loads(path.read_text())
    assert saved == asdict(config)
    del saved["seed"]  # as an older version would have written it
    path.write_text(json.dumps(saved))
    assert Config.load(path).seed == Config().seed


@pytest.mark.parametrize("content", ['{"odd": 1}', "[]", "3", "null", "{", '{"steps": "x"}', '{"steps": -1}'])
def test_a_file_that_holds_no_settings_is_named(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: not the settings of a run"):
        Config.load(path)


def test_presets_are_settings():
    for name, preset in PRESETS.items():
        assert Config(**preset).name == name
    paper = Config(**PRESETS["qwen3_8b"])
    assert (paper.env_weight, paper.temperature, paper.clip_low, paper.clip_high) == (0.05, 0.8, 0.2, 0.28)
    assert (paper.learning_rate, paper.beta1, paper.beta2, paper.grad_clip) == (1e-6, 0.9, 0.95, 0.2)
    assert (paper.steps, paper.tasks_per_step, paper.group_size, paper.context) == (500, 16, 16, 16_384)
    assert (paper.observation_norm, paper.policy_norm) == ("observation", "sequence")


def test_lambda_is_the_papers_unless_a_preset_says_otherwise():
    assert Config().env_weight == 0.05
    assert {name for name, preset in PRESETS.items() if preset["env_weight"] != 0.05} == {"tiny"}
