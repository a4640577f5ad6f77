"""Every setting in one place. Each field is a flag of train.py: `--field value`."""

import json
from dataclasses import asdict, dataclass, field, fields
from math import inf
from pathlib import Path

CHOICES = {
    "backend": ["sandbox", "docker"], "harness": ["plain", "qwen"], "dtype": ["float32", "bfloat16"],
    "sampler": ["ours", "vllm"], "policy_norm": ["sequence", "token"], "optimizer": ["adamw", "adamw8bit"],
    "observation_norm": ["observation", "selected", "global"], "tracker": ["none", "trackio", "wandb"],
}  # fmt: skip
ARMS = "grpo", "echo"  # rewards only; rewards, and CE on what the terminal wrote
MAY_BE_ZERO = """seed threads base_steps base_observation_weight env_weight policy_weight warmup_steps
    weight_decay beta1 beta2 clip_low clip_high steps""".split()


class RunEnded(RuntimeError):
    """Going on makes no sense; the message says why and what to do."""


def _f(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    # run
    name: str = _f("tiny", "run folder under runs/")
    seed: int = _f(1, "seed of the base, the task order and every rollout")
    arms: str = _f("grpo,echo", "runs from one base, tasks and seeds: grpo, echo, or both")
    control: str = _f("", "set by figures/controls.py: the change that it makes to every batch")
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
    sampler: str = _f("ours", "ours, or vllm: an engine that is faster on a GPU (pip install '.[vllm]')")
    temperature: float = _f(1.0, "sampling temperature; the policy loss scores at the same one")
    prefill_tokens: int = _f(16384, "padded tokens per forward pass outside the update")

    # objective
    policy_weight: float = _f(1.0, "weight of the policy loss; 0: no verifier, observations alone")
    env_weight: float = _f(0.05, "lambda: weight of the observation CE in the arm echo")
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
    shard: bool = _f(False, "each of torchrun's processes holds a piece of the model: shard.py")
    logit_mb: int = _f(3072, "MiB of logits that the loss head may hold; beyond it they are recomputed")

    # evaluation
    eval_every: int = _f(25, "steps between evaluations on held-out tasks")
    eval_tasks: int = _f(100, "held-out tasks per evaluation, one sampled and one greedy rollout each")
    save_every: int = _f(1, "steps between checkpoints")
    tracker: str = _f("none", "none, or where metrics go beside metrics.jsonl: trackio, wandb")

    def __post_init__(self):
        """Raises ValueError naming the field."""
        for f in fields(self):
            value = getattr(self, f.name)
            if type(value) is int and f.type is float:
                setattr(self, f.name, value := float(value))
            if type(value) is not f.type:
                raise ValueError(f"{f.name}: expected {f.type.__name__}, got {value!r}")
            if f.type in (int, float) and not (0 < value < inf or (value == 0 and f.name in MAY_BE_ZERO)):
                raise ValueError(f"{f.name}: {value} is too small or not a finite number")
            if value not in (choices := CHOICES.get(f.name, [value])):
                raise ValueError(f"{f.name}: {value!r} is not one of {', '.join(choices)}")
        if unknown := set(self.arms.split(",")) - set(ARMS):
            raise ValueError(f"arms: {', '.join(sorted(unknown))} is not one of {', '.join(ARMS)}")
        if max(self.beta1, self.beta2, self.clip_low) >= 1:
            raise ValueError("beta1, beta2 and clip_low must be below 1")
        if "/" in self.name or self.name in ("", ".", ".."):
            raise ValueError(f"name: {self.name!r} is not a plain folder name")

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
        """What an older version did not know yet has its default, under which a run is as it was then. Raises
        ValueError if the file holds no Config, or a setting that is unknown here."""
        try:
            return cls(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: not the settings of a run ({error})") from None
