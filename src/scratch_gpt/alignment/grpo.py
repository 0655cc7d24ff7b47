"""Reinforcement learning from groups of completions: GRPO, and RLOO, its simplest relative.

    scratch-gpt grpo --model runs/sft/final --data prompts.jsonl --reward rewards:politeness --run-dir runs/grpo
    scratch-gpt rloo --model runs/sft/final --data prompts.jsonl --reward-model runs/reward/final --run-dir runs/rloo

The policy generates several completions of each prompt. Each becomes more likely if its score is above those of its group, and
less likely if below (Shao et al., 2024, arXiv:2402.03300; Ahmadian et al., 2024, arXiv:2402.14740), by TRL's trainers. In
contrast to PPO there is no value model.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from scratch_gpt.alignment.data.chat_template import encode_prompt, eos_token_ids
from scratch_gpt.alignment.data.dataset import prepare_dataset
from scratch_gpt.alignment.data.dataset_types import prompt_only
from scratch_gpt.alignment.models import context_length, load_for_training, shard
from scratch_gpt.alignment.recipe import Recipe, describe_model, peft_config, run_recipe, training_arguments
from scratch_gpt.alignment.rewards import (
    Completions,
    FunctionReward,
    RewardModel,
    import_reward_function,
    load_rewards,
    reward_name,
    reward_problems,
    score,
)
from scratch_gpt.alignment.sampler import RepeatingSampler
from scratch_gpt.alignment.trainer_checkpoints import ResumableTrainerMixin
from scratch_gpt.alignment.trainer_parallel import gather_full
from scratch_gpt.config import GroupTrainingSettings, GRPOSettings, OnlineSettings, RLOOSettings
from scratch_gpt.console import print0
from scratch_gpt.distributed.launch import data_parallel_size, requested_model_parallel_size
from scratch_gpt.errors import UserError


def grpo_command(settings: GRPOSettings) -> None:
    """`scratch-gpt grpo`."""
    run_recipe(settings, "grpo", build_grpo, lambda settings: check(settings, "grpo"))


def rloo_command(settings: RLOOSettings) -> None:
    """`scratch-gpt rloo`."""
    run_recipe(settings, "rloo", build_rloo, lambda settings: check(settings, "rloo"))


def check(settings: OnlineSettings, command: str) -> None:
    """Raise one UserError with all mistakes that can be found before models are loaded."""
    training: GroupTrainingSettings = getattr(settings, command)
    dp_size, model_parallel = data_parallel_size(), requested_model_parallel_size() > 1
    problems = reward_problems(settings)
    if training.batch_size % training.num_generations:
        problems.append(
            f"--{command}.batch_size is {training.batch_size} completions; it must be a multiple of "
            f"{training.num_generations} (num_generations)"
        )
    if model_parallel and training.batch_size % (training.num_generations * dp_size):
        problems.append(
            f"--{command}.batch_size is {training.batch_size} completions; with tensor or context parallelism it must be a "
            f"multiple of {training.num_generations} (num_generations) x {dp_size} (data-parallel ranks)"
        )
    if model_parallel and getattr(training, "scale_rewards", "") == "batch":
        problems.append(
            f"--{command}.scale_rewards batch: with tensor or context parallelism scores are scaled within a group: give "
            "group or none"
        )
    if settings.max_steps % training.num_iterations:
        problems.append(
            f"--max-steps is {settings.max_steps}; give a multiple of {training.num_iterations} (num_iterations)"
        )
    if problems:
        raise UserError("\n".join(problems))


def build_grpo(settings: GRPOSettings, run_dir: Path) -> Recipe:
    """Load the models and the data, and build the trainer of GRPO."""
    options = {"loss_type": settings.grpo.loss_type, "scale_rewards": settings.grpo.scale_rewards}
    return _build(settings, "grpo", run_dir, ResumableGRPOTrainer, GRPOConfig, options)


def build_rloo(settings: RLOOSettings, run_dir: Path) -> Recipe:
    """Load the models and the data, and build the trainer of RLOO."""
    return _build(settings, "rloo", run_dir, ResumableRLOOTrainer, RLOOConfig, {})


def _build(
    settings: OnlineSettings,
    command: str,
    run_dir: Path,
    trainer_class: Any,
    config_class: Any,
    algorithm_options: dict[str, Any],
) -> Recipe:
    training: GroupTrainingSettings = getattr(settings, command)
    model, tokenizer = load_for_training(settings)
    context = context_length(model)
    max_prompt_length = context - training.max_completion_length
    if max_prompt_length < 1:
        raise UserError(
            f"--{command}.max_completion_length is {training.max_completion_length}, which leaves no tokens for the prompt in "
            f"the model's context of {context}: lower it"
        )
    data = prepare_dataset(settings, prompt_only, lambda row: encode(tokenizer, row), max_prompt_length)
    data.facts["reward"] = f"`{reward_name(settings)}`"
    stop_ids = eos_token_ids(tokenizer, data.is_chat)
    model.generation_config.eos_token_id = stop_ids
    source = settings.reward_model or import_reward_function(reward_name(settings))
    (reward,) = load_rewards(source, None, tokenizer, stop_ids)
    trainer = trainer_class(
        model,
        trl_reward_function(reward, tokenizer, lambda compute: trainer.broadcast_from_first_rank(compute)),
        _arguments(settings, command, run_dir, config_class, algorithm_options),
        train_dataset=Dataset.from_list(data.train),
        eval_dataset=Dataset.from_list(data.validation),
        processing_class=tokenizer,
        peft_config=peft_config(settings, "CAUSAL_LM"),
    )
    _check_reference(trainer)
    if isinstance(reward, RewardModel):
        if trainer.is_fsdp_enabled:
            shard(trainer.accelerator, reward.model)
        else:
            reward.model.to(trainer.args.device)
            trainer.frozen_models = [reward.model]
    describe_model(settings, trainer.model)
    print0(f"reward     {reward_name(settings)}")
    return Recipe(trainer, describe, steps_per_rollout=training.num_iterations, facts=data.facts)


def _arguments(
    settings: OnlineSettings, command: str, run_dir: Path, config_class: Any, algorithm_options: dict[str, Any]
) -> Any:
    """Build GRPOConfig or RLOOConfig from the settings."""
    training: GroupTrainingSettings = getattr(settings, command)
    shared = training_arguments(settings, command, run_dir)
    # TRL needs full groups in an evaluation batch of all ranks; with model parallelism, also in the batch of each rank.
    eval_batch_size = shared["per_device_eval_batch_size"]
    ranks = data_parallel_size() if requested_model_parallel_size() == 1 else 1
    if eval_batch_size * ranks % training.num_generations:
        shared["per_device_eval_batch_size"] = math.lcm(eval_batch_size, training.num_generations)
    arguments = config_class(
        **shared,
        remove_unused_columns=False,
        num_generations=training.num_generations,
        num_iterations=training.num_iterations,
        max_completion_length=training.max_completion_length,
        temperature=training.temperature,
        top_p=1.0,  # the scored log-probabilities must be those that tokens are sampled from, so no truncated sampling
        top_k=0,
        beta=training.beta,
        epsilon=training.epsilon,
        mask_truncated_completions=training.mask_truncated_completions,
        disable_dropout=True,
        **algorithm_options,
    )
    # TRL multiplies by the world size, but ranks of a model-parallel group take the same sequences.
    arguments.generation_batch_size //= requested_model_parallel_size()
    return arguments


def encode(tokenizer: Any, row: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Return the row as it is, and the length of its prompt: the trainer encodes prompts when it generates."""
    return row, len(encode_prompt(tokenizer, row["prompt"]))


def describe(logs: dict[str, Any]) -> str:
    """Format the score with what it may have cost: KL divergence, length, and completions that do not end."""
    prefix = "eval_" if "eval_loss" in logs else ""
    if f"{prefix}reward" not in logs:  # TRL logs completions only in the step that generates them
        return f"loss {logs['loss']:.3f}, on completions of an earlier step"
    shown = [f"{'validation ' if prefix else ''}score {logs[f'{prefix}reward']:.3f}"]
    if f"{prefix}kl" in logs:
        shown.append(f"KL {logs[f'{prefix}kl']:.4f} nats per token")
    shown.append(f"length {logs[f'{prefix}completions/mean_length']:.1f}")
    shown.append(f"ended {1 - logs[f'{prefix}completions/clipped_ratio']:.0%}")
    return ", ".join(shown)


# ------------------------------------------------------------------------------------------------ trainers


class GroupTrainerMixin(ResumableTrainerMixin):
    """Exact resume, parallelism and prompts encoded by this package, for GRPOTrainer and RLOOTrainer.

    TRL has no public hooks for these; the overridden private methods are those of TRL 1.16.
    """

    args: Any
    generates = True
    num_generations: int
    num_iterations: int

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """Encode prompts so that special tokens that a user typed stay text."""
        return [encode_prompt(self.processing_class, prompt) for prompt in prompts], None, {}

    def _generate_single_turn(self, *arguments: Any) -> Any:
        """Generate with the model's weights gathered."""
        with self.generating():
            return super()._generate_single_turn(*arguments)

    def _generate(self, *arguments: Any) -> Any:
        """Generate, and count the tokens once per model-parallel group: TRL counts them once per rank."""
        tokens_before = self.state.num_input_tokens_seen
        generated = super()._generate(*arguments)
        new_tokens = self.state.num_input_tokens_seen - tokens_before
        self.state.num_input_tokens_seen = tokens_before + new_tokens // self.get_tp_size()
        return generated

    def _get_train_sampler(self, dataset: Any = None) -> Sampler[int]:
        """Repeat TRL's sampler of one epoch, in an order that a resumed run finds again."""
        num_samples = self.args.max_steps * self.args.gradient_accumulation_steps * self.args.generation_batch_size
        return RepeatingSampler(super()._get_train_sampler(dataset), num_samples, self.args.seed)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the number of epochs by the prompts read: Trainer takes the whole run for one epoch."""
        prompts_per_step = self.samples_per_step / self.num_generations / self.num_iterations
        self.state.epoch = self.state.global_step * prompts_per_step / len(self.train_dataset)
        super().log(logs, start_time)


class ResumableGRPOTrainer(GroupTrainerMixin, GRPOTrainer):
    """GRPOTrainer with :class:`GroupTrainerMixin`."""


class ResumableRLOOTrainer(GroupTrainerMixin, RLOOTrainer):
    """RLOOTrainer with :class:`GroupTrainerMixin`."""


def _check_reference(trainer: Any) -> None:
    """Assert that the reference model, which TRL loads from the policy's ``name_or_path``, equals the initial policy.

    Under FSDP2 the reference is sharded at this point, and the policy is not.
    """
    if trainer.ref_model is None:
        return
    policy, reference = (trainer.accelerator.unwrap_model(m) for m in (trainer.model, trainer.ref_model))
    reference_parameters = dict(reference.named_parameters())
    for name, parameter in policy.named_parameters():
        (full_parameter,) = gather_full({name: reference_parameters[name]}, True).values()
        assert torch.equal(parameter.cpu(), full_parameter), f"{name} differs between policy and reference"


def trl_reward_function(
    reward: RewardModel | FunctionReward,
    tokenizer: Any,
    broadcast_from_first_rank: Callable[[Callable[[], Any]], Any],
) -> Callable[..., list[float]]:
    """Return ``reward`` as a function that TRL calls; its scores are checked.

    Args:
        reward: A reward model or a function.
        tokenizer: The policy's.
        broadcast_from_first_rank: See :meth:`ParallelTrainerMixin.broadcast_from_first_rank`; used for functions.
    """

    def scores(
        prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **columns: Any
    ) -> list[float]:
        batch = Completions(
            prompts=prompts,
            completions=completions,
            completion_ids=completion_ids,
            sequences=[
                torch.tensor(encode_prompt(tokenizer, prompt) + list(ids))
                for prompt, ids in zip(prompts, completion_ids, strict=True)
            ],
            columns={name: value for name, value in columns.items() if isinstance(value, list)},
        )
        if isinstance(reward, FunctionReward):
            return broadcast_from_first_rank(lambda: score(reward, batch).tolist())
        return score(reward, batch).tolist()

    scores.__name__ = reward.name
    return scores
