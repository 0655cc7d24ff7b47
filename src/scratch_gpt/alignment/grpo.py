"""Reinforcement learning from groups of completions: GRPO, and RLOO, its simplest relative.

    scratch-gpt grpo --model runs/sft/final --data prompts.jsonl --reward rewards:politeness --run-dir runs/grpo
    scratch-gpt rloo --model runs/sft/final --data prompts.jsonl --reward-model runs/reward/final --run-dir runs/rloo

Several completions of the same prompt are drawn, scored, and each is made more or less likely by how much better than the
others it is (Shao et al., 2024, arXiv:2402.03300; Ahmadian et al., 2024, arXiv:2402.14740), by TRL's trainers. There is no
value function to learn, in contrast to PPO.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from scratch_gpt.alignment.data.chat_template import encode_prompt, stop_tokens
from scratch_gpt.alignment.data.dataset import prepare_dataset, prompt_only
from scratch_gpt.alignment.models import context_of, load_for_training, shard
from scratch_gpt.alignment.recipe import Recipe, describe_model, peft_config, run_recipe, training_arguments
from scratch_gpt.alignment.rewards import (
    Completions,
    FunctionReward,
    RewardModel,
    check_reward,
    load_rewards,
    reward_function,
    reward_of,
    score,
)
from scratch_gpt.alignment.sampler import RepeatingSampler
from scratch_gpt.alignment.trainer_checkpoints import ResumableTrainerMixin, gather_full
from scratch_gpt.config import GroupTrainingSettings, GRPOSettings, OnlineSettings, RLOOSettings
from scratch_gpt.console import print0
from scratch_gpt.distributed.launch import data_parallel_size, requested_model_parallel_size
from scratch_gpt.errors import UserError


class EncodedPrompts(ResumableTrainerMixin):
    """Of a trainer: prompts become tokens in our way, in which no text of a user becomes a special one, and follow each other
    in an order in which a resumed run finds its place."""

    args: Any
    generates = True
    num_generations: int
    num_iterations: int

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [encode_prompt(self.processing_class, prompt) for prompt in prompts], None, {}

    def _generate_single_turn(self, *arguments: Any) -> Any:
        with self.generating():
            return super()._generate_single_turn(*arguments)

    def _generate(self, *arguments: Any) -> Any:
        before = self.state.num_input_tokens_seen
        generated = super()._generate(*arguments)
        read = self.state.num_input_tokens_seen - before  # once for each process, TRL has it
        self.state.num_input_tokens_seen = before + read // self.get_tp_size()
        return generated

    def _get_train_sampler(self, dataset: Any = None) -> Sampler[int]:
        rows = self.args.max_steps * self.args.gradient_accumulation_steps * self.args.generation_batch_size
        return RepeatingSampler(super()._get_train_sampler(dataset), rows, self.args.seed)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # to Trainer the whole run is one pass
        prompts = self.rows_per_step / self.num_generations / self.num_iterations
        self.state.epoch = self.state.global_step * prompts / len(self.train_dataset)
        super().log(logs, start_time)


class ResumableGRPOTrainer(EncodedPrompts, GRPOTrainer):
    """GRPOTrainer with :class:`EncodedPrompts`."""


class ResumableRLOOTrainer(EncodedPrompts, RLOOTrainer):
    """RLOOTrainer with :class:`EncodedPrompts`."""


def grpo_command(settings: GRPOSettings) -> None:
    """`scratch-gpt grpo`."""
    run_recipe(settings, "grpo", build_grpo, lambda settings: check(settings, "grpo"))


def rloo_command(settings: RLOOSettings) -> None:
    """`scratch-gpt rloo`."""
    run_recipe(settings, "rloo", build_rloo, lambda settings: check(settings, "rloo"))


def check(settings: OnlineSettings, verb: str) -> None:
    group: GroupTrainingSettings = getattr(settings, verb)
    problems = check_reward(settings)
    if group.batch_size % group.num_generations:
        problems.append(
            f"--{verb}.batch_size is {group.batch_size} completions; it must be a multiple of {group.num_generations} "
            "(num_generations)"
        )
    reading = data_parallel_size()
    if requested_model_parallel_size() > 1 and group.batch_size % (group.num_generations * reading):
        problems.append(
            f"--{verb}.batch_size is {group.batch_size} completions; where processes share rows it must be a multiple of "
            f"{group.num_generations} (num_generations) x {reading} (processes that read rows of their own)"
        )
    if requested_model_parallel_size() > 1 and getattr(group, "scale_rewards", "") == "batch":
        problems.append(
            f"--{verb}.scale_rewards batch: where processes share rows the deviation is that of a group: give group or none"
        )
    if settings.max_steps % group.num_iterations:
        problems.append(
            f"--max-steps is {settings.max_steps}; give a multiple of {group.num_iterations} (num_iterations)"
        )
    if problems:
        raise UserError("\n".join(problems))


def build_grpo(settings: GRPOSettings, run_dir: Path) -> Recipe:
    """Models, data and trainer put together."""
    own = {"loss_type": settings.grpo.loss_type, "scale_rewards": settings.grpo.scale_rewards}
    return _build(settings, "grpo", run_dir, ResumableGRPOTrainer, GRPOConfig, own)


def build_rloo(settings: RLOOSettings, run_dir: Path) -> Recipe:
    """Models, data and trainer put together."""
    return _build(settings, "rloo", run_dir, ResumableRLOOTrainer, RLOOConfig, {})


def _build(
    settings: OnlineSettings, verb: str, run_dir: Path, trainer_class: Any, config_class: Any, own: dict[str, Any]
) -> Recipe:
    group: GroupTrainingSettings = getattr(settings, verb)
    model, tokenizer = load_for_training(settings)
    longest = context_of(model) - group.max_completion_length
    if longest < 1:
        raise UserError(
            f"--{verb}.max_completion_length is {group.max_completion_length}, the model's whole context "
            f"{context_of(model)} tokens"
        )
    data = prepare_dataset(
        settings, prompt_only, lambda row: (row, len(encode_prompt(tokenizer, row["prompt"]))), longest
    )
    data.facts["reward"] = f"`{reward_of(settings)}`"
    stop_ids = stop_tokens(tokenizer, data.chat)
    model.generation_config.eos_token_id = stop_ids
    chosen = settings.reward_model or reward_function(reward_of(settings))
    (reward,) = load_rewards(chosen, None, tokenizer, stop_ids)
    given = training_arguments(settings, verb, run_dir)
    # TRL wants whole groups in each batch of an evaluation, and we in each process where some share their rows.
    rows = given["per_device_eval_batch_size"]
    if rows * (data_parallel_size() if requested_model_parallel_size() == 1 else 1) % group.num_generations:
        given["per_device_eval_batch_size"] = math.lcm(rows, group.num_generations)
    arguments = config_class(
        **given,
        remove_unused_columns=False,
        num_generations=group.num_generations,
        num_iterations=group.num_iterations,
        max_completion_length=group.max_completion_length,
        temperature=group.temperature,
        top_p=1.0,  # nothing may stand between the probabilities that are drawn from and those that are compared
        top_k=0,
        beta=group.beta,
        epsilon=group.epsilon,
        mask_truncated_completions=group.mask_truncated_completions,
        disable_dropout=True,
        **own,
    )
    arguments.generation_batch_size //= (
        requested_model_parallel_size()
    )  # TRL counts processes, and some may share their rows
    trainer = trainer_class(
        model,
        scorer(reward, tokenizer, lambda compute: trainer.broadcast_from_first_rank(compute)),
        arguments,
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
            trainer.frozen = [reward.model]
    describe_model(settings, trainer.model)
    print0(f"reward     {reward_of(settings)}")
    return Recipe(trainer, describe, steps_per_rollout=group.num_iterations, facts=data.facts)


def _check_reference(trainer: Any) -> None:
    """TRL reads the reference from where the policy says that it came from: it must be what the policy begins as.

    Under FSDP2 the reference lies in parts then, the policy does not yet.
    """
    if trainer.ref_model is None:
        return
    policy, reference = (trainer.accelerator.unwrap_model(m) for m in (trainer.model, trainer.ref_model))
    theirs = dict(reference.named_parameters())
    for name, parameter in policy.named_parameters():
        (whole_one,) = gather_full({name: theirs[name]}, True).values()
        assert torch.equal(parameter.cpu(), whole_one), f"the reference has another {name}"


def scorer(
    reward: RewardModel | FunctionReward,
    tokenizer: Any,
    broadcast_from_first_rank: Callable[[Callable[[], Any]], Any],
) -> Callable[..., list[float]]:
    """The reward as TRL calls it: what it gives is checked, and what it raises is told. ``broadcast_from_first_rank``: see ResumableTrainerMixin."""

    def scores(
        prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **columns: Any
    ) -> list[float]:
        drawn = Completions(
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
            return broadcast_from_first_rank(lambda: score(reward, drawn).tolist())
        return score(reward, drawn).tolist()

    scores.__name__ = reward.name
    return scores


def describe(logs: dict[str, Any]) -> str:
    """Score beside what it may have cost: divergence, length, completions that do not end."""
    kind = "eval_" if "eval_loss" in logs else ""
    if (
        f"{kind}reward" not in logs
    ):  # TRL tells of completions in the step that draws them, not in those that use them again
        return f"loss {logs['loss']:.3f}, on completions of an earlier step"
    said = f"{'validation ' if kind else ''}score {logs[f'{kind}reward']:.3f}"
    if f"{kind}kl" in logs:
        said += f", KL {logs[f'{kind}kl']:.4f} nats per token"
    ended = 1 - logs[f"{kind}completions/clipped_ratio"]
    return f"{said}, length {logs[f'{kind}completions/mean_length']:.1f}, ended {ended:.0%}"
