"""ECHO in TRL: GRPOTrainer with the observation loss added by a subclass, and rollouts in a terminal.

A rollout_func gets prompts and returns token ids, with a mask of what the policy wrote. The loop of turns,
the roles and the terminals are this library's; TRL samples, scores and updates. vLLM, its fast sampler, needs
a GPU: here it samples with transformers' generate, either as TRL's own tool loop does (Generate) or, better
than that, with a key-value cache kept from turn to turn (GenerateOn). trl_speed.py times it.
"""

import os

import common  # noqa: F401, finds echo_min
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from echo_min.checkpoint import load_policy
from echo_min.config import Config
from echo_min.echo import observation_mask, observation_weights
from echo_min.masking import Role
from echo_min.policy import marker_ids
from echo_min.rollout import Episode, rollout
from echo_min.sampler import Reply
from echo_min.tasks import Task

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
from trl import GRPOConfig, GRPOTrainer


class EchoTrainer(GRPOTrainer):
    """GRPOTrainer, and CE on the terminal's tokens from the policy loss's own forward pass."""

    env_weight = 0.05

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)  # puts rollout_func's own fields into inputs
        roles = [torch.tensor(one["roles"]) for one in inputs]
        padded = pad_sequence(roles, batch_first=True, padding_value=int(Role.SCAFFOLD))
        return batch | {
            "env_weights": observation_weights(padded, observation_mask(padded))
        }  # [B, T of the completions]

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.logprobs = result[0]  # of every token of the completions, [B, T]
        return result

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        return loss - self.env_weight * (inputs["env_weights"] * self.logprobs).sum()

    def _clip_grad_norm(self, model):
        self.grad_norm = super()._clip_grad_norm(model)
        return self.grad_norm


class Generate:
    """Our Sampler's interface; each turn is TRL's own, which reads the dialogue from its start."""

    def __init__(self, trainer: GRPOTrainer):
        self.trainer, self.ids = trainer, {}

    def reply(self, rows: list[int], new_ids: list[list[int]], max_new: int) -> list[Reply]:
        for row, new in zip(rows, new_ids, strict=True):
            self.ids[row] = self.ids.get(row, []) + new
        replies, _ = self.trainer._generate_single_turn([self.ids[row] for row in rows], None, {}, 1)
        for row, ids in zip(rows, replies, strict=True):
            self.ids[row] = self.ids[row] + ids
        return [(ids, [0.0] * len(ids)) for ids in replies]  # TRL takes the update's for them


class GenerateOn:
    """The same with one cache for all turns: a turn's new tokens are padded on the left, gaps are masked."""

    def __init__(self, trainer: GRPOTrainer):
        self.trainer, self.cache, self.rows = trainer, DynamicCache(), None

    @torch.no_grad()
    def reply(self, rows: list[int], new_ids: list[list[int]], max_new: int) -> list[Reply]:
        if self.rows is None:
            self.ids = self.mask = torch.zeros(len(rows), 0, dtype=torch.int64)
        elif rows != self.rows:
            kept = torch.tensor([self.rows.index(row) for row in rows])
            self.cache.batch_select_indices(kept)
            self.ids, self.mask = self.ids[kept], self.mask[kept]
        self.rows, model, config = rows, self.trainer.model, self.trainer.generation_config
        new = [torch.tensor(ids) for ids in new_ids]
        mask = [torch.ones_like(ids) for ids in new]
        new, mask = (pad_sequence(x, batch_first=True, padding_side="left") for x in (new, mask))
        ids, mask = torch.cat([self.ids, new], 1), torch.cat([self.mask, mask], 1)
        where = {"attention_mask": mask, "past_key_values": self.cache}
        self.ids = model.generate(input_ids=ids, generation_config=config, **where)
        new = self.ids[:, ids.shape[1] :]
        ended = torch.isin(new, torch.tensor(self.trainer.eos_token_ids)).long()
        alive = ended.cumsum(1) - ended == 0  # up to the first end and with it
        self.mask = torch.cat([mask, alive.long()], 1)
        replies = [row[live].tolist() for row, live in zip(new, alive, strict=True)]
        return [(ids, [0.0] * len(ids)) for ids in replies]


class Rollouts:
    """TRL's rollout_func. `agent` makes the sampler of a batch."""

    def __init__(self, tasks: list[Task], config: Config):
        self.tasks, self.config, self.agent = {task.instruction: task for task in tasks}, config, Generate

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict:
        self.episodes = [Episode(self.tasks[p], i // self.config.group_size) for i, p in enumerate(prompts)]
        rollout(self.agent(trainer), trainer.processing_class, self.episodes, self.config)
        transcripts = [e.transcript for e in self.episodes]
        starts = [t.roles.index(Role.ACTION) for t in transcripts]  # the prompt's end
        roles = [t.roles[n:] for t, n in zip(transcripts, starts, strict=True)]
        return {
            "prompt_ids": [t.ids[:n] for t, n in zip(transcripts, starts, strict=True)],
            "completion_ids": [t.ids[n:] for t, n in zip(transcripts, starts, strict=True)],
            "logprobs": None,
            "env_mask": [[int(role == Role.ACTION) for role in row] for row in roles],
            # what TRL does not know goes to the reward function and, by way of its inputs, to EchoTrainer
            "roles": roles,
            "reward": [e.reward if e.valid else None for e in self.episodes],
        }


def reward(reward: list[float | None], **_) -> list[float | None]:
    return reward


def trl_trainer(base: str, prompts: list[str], tasks: list[Task], config: Config, folder: str):
    """A trainer from `base` with our Config's objective; it goes through the prompts once, in their order."""
    model, tokenizer = load_policy(base)
    tokenizer.padding_side = "left"
    model.generation_config.eos_token_id = list(marker_ids(tokenizer))
    arguments = GRPOConfig(
        output_dir=folder,
        # the batch, and the objective of our Config
        per_device_train_batch_size=config.tasks_per_step * config.group_size,
        num_generations=config.group_size,
        shuffle_dataset=False,
        max_completion_length=config.context,
        generation_kwargs={"max_new_tokens": config.max_action_tokens},
        temperature=config.temperature,
        loss_type="grpo",  # the mean over sequences of each one's token mean
        beta=0.0,
        epsilon=config.clip_low,
        epsilon_high=config.clip_high,
        # the optimizer
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        weight_decay=config.weight_decay,
        max_grad_norm=config.grad_clip,
        num_train_epochs=1,
        # the fastest that TRL does here
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows, rollouts = Dataset.from_dict({"prompt": prompts}), Rollouts(tasks, config)
    trainer = EchoTrainer(model, reward, arguments, rows, processing_class=tokenizer, rollout_func=rollouts)
    trainer.env_weight = config.env_weight
    return trainer
