"""Proximal policy optimization of a language model, on `transformers.Trainer`.

    trainer = PPOTrainer(model="runs/sft/final", reward_funcs="runs/reward/final", train_dataset=prompts,
                         args=PPOConfig(output_dir="runs/ppo", max_steps=1000, learning_rate=1e-5))
    trainer.train()

As in InstructGPT (Ouyang et al. 2022, arXiv:2203.02155): generate completions, score them, subtract a KL penalty per token,
estimate advantages with a learned value model, and take clipped steps on the same completions. Each batch of the data loader
holds the prompts of a whole rollout and is repeated for each of the rollout's micro-batches: the first generates the
completions, all of them train on a part. Everything else (schedule, clipping, precision, checkpoints, trackers) is Trainer's.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from scratch_gpt.alignment.models import shard, unwrap_peft
from scratch_gpt.alignment.ppo.actor_critic import (
    ActorCritic,
    add_adapters,
    build_value_model,
    check_value_model,
    disable_dropout,
    restore_forward,
)
from scratch_gpt.alignment.ppo.config import PPOConfig
from scratch_gpt.alignment.ppo.losses import (
    KLController,
    ScoreNormalizer,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    generalized_advantages,
    kl_estimate,
    masked_mean,
    whiten,
)
from scratch_gpt.alignment.ppo.prompts import as_dataset, encode_prompts, stop_token_ids
from scratch_gpt.alignment.ppo.rollout import (
    Rollout,
    RolloutBatch,
    ScoredBatch,
    completion_logits,
    concatenate,
    token_logprobs,
)
from scratch_gpt.alignment.rewards import Completions, FunctionReward, Reward, RewardModel, load_rewards, score
from scratch_gpt.alignment.sampler import RolloutSampler
from scratch_gpt.alignment.trainer_checkpoints import ResumableTrainerMixin, load_weights, write_model
from scratch_gpt.distributed.strategy import Strategy

PPO_STATE = "ppo_state.json"
VALUE_MODEL = "value_model"
STEP_STATISTICS = (
    "loss/policy",
    "loss/value",
    "policy/approx_kl",
    "policy/clip_fraction",
    "policy/entropy",
    "policy/ratio",
    "value/clip_fraction",
)


class PPOTrainer(ResumableTrainerMixin):
    """PPO with the interface of TRL's trainers.

    Args:
        model: The policy to train: a causal language model, or its path. Usually the result of supervised fine-tuning.
        reward_funcs: One reward or several, each a sequence classifier with one label, its path, or a function
            `f(prompts, completions, completion_ids, **columns) -> scores` as for TRL's GRPOTrainer.
        args: The settings.
        train_dataset: Its column `prompt` holds text or messages; its other columns are passed to the reward functions.
        eval_dataset: Likewise; `evaluate` generates completions for it and reports score, KL divergence and length.
        processing_class: The policy's tokenizer. Default: the one at the policy's path.
        reward_processing_classes: The tokenizers of the reward models. Default: those at their paths, else the policy's.
        ref_model: The reference of the KL penalty. Default: the initial policy (with adapters: the policy without them).
        value_model: A sequence classifier with one label. Default: a copy of the first reward model that has the
            policy's tokenizer and is a decoder with a `score` head, else the policy's body with a head of zeros.
        callbacks: As for Trainer.
        optimizers: As for Trainer.
        peft_config: Train adapters of this kind on the policy and on the value model. Default: train all weights.

    Raises:
        ValueError: data, models and settings do not fit together; the message says which, and how to fix it.
    """

    args: PPOConfig
    generates = True

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Reward | list[Reward],
        args: PPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        ref_model: PreTrainedModel | None = None,
        value_model: PreTrainedModel | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
    ):
        args = PPOConfig(output_dir="ppo") if args is None else args
        if isinstance(model, str):
            processing_class = processing_class or AutoTokenizer.from_pretrained(model)
            model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(model.config.name_or_path)
        if ref_model is model:
            raise ValueError("ref_model is the policy itself and would be trained with it: omit it, or pass a copy")
        restore_forward(model)
        self.tokenizer = processing_class
        datasets = [as_dataset(data) for data in (train_dataset, eval_dataset)]
        self.stop_ids = stop_token_ids(args, processing_class, model, datasets)
        pad_id = processing_class.pad_token_id
        self.pad_id: int = pad_id if pad_id is not None else (self.stop_ids[0] if self.stop_ids else 0)
        if args.missing_eos_penalty is not None and not self.stop_ids:
            raise ValueError("missing_eos_penalty: the tokenizer has no end of sequence; give stop_tokens")
        train_data, eval_data = (encode_prompts(data, args, processing_class, model) for data in datasets)

        self.rewards = load_rewards(reward_funcs, reward_processing_classes, processing_class, self.stop_ids)
        self.reward_weights = args.reward_weights or [1.0] * len(self.rewards)
        if len(self.reward_weights) != len(self.rewards):
            raise ValueError(f"there are {len(self.rewards)} rewards and {len(self.reward_weights)} reward_weights")
        if value_model is None:
            value_model = build_value_model(model, self.rewards)
        check_value_model(value_model, model)
        restore_forward(value_model)
        if peft_config is not None:
            model, value_model = add_adapters(model, value_model, peft_config)
        self.ref_model: PreTrainedModel | None = ref_model
        if ref_model is None and not hasattr(model, "disable_adapter"):
            self.ref_model = copy.deepcopy(model)
        for module in (model, value_model, self.ref_model):
            if module is not None:
                disable_dropout(module)

        super().__init__(
            model=ActorCritic(model, value_model, args.temperature),
            args=args,
            data_collator=list,
            train_dataset=train_data,
            eval_dataset=eval_data,
            processing_class=processing_class,
            callbacks=[*(callbacks or []), _SaveAfterRollout()],
            optimizers=optimizers,
        )
        if self.is_deepspeed_enabled:
            raise ValueError(
                "PPOTrainer runs on one process, data parallel or under FSDP2; for ZeRO use `scratch-gpt ppo`"
            )
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the full mini-batch
        self.frozen_models = [reward.model for reward in self.rewards if isinstance(reward, RewardModel)]
        if self.ref_model is not None:
            self.frozen_models.append(self.ref_model.eval().requires_grad_(False))
        for module in self.frozen_models:
            if self.is_fsdp_enabled:
                shard(self.accelerator, module)
            else:
                module.to(self.args.device)
        set_seed(args.seed, device_specific=True)  # each rank samples different completions

        self.kl_controller = KLController(args.kl_coef, args.adaptive_kl_target, args.adaptive_kl_horizon)
        self.normalizer = ScoreNormalizer(only_first=args.score_normalization == "initial")
        self.rollout: Rollout | None = None
        self._micro_batch = 0  # within the optimizer step
        self._skip_rest_of_rollout = False
        self._step_statistics = torch.zeros(len(STEP_STATISTICS), device=self.args.device)
        self._metrics: dict[str, list[float]] = defaultdict(list)  # since the last log entry

    # ------------------------------------------------------------------------------------------------ models

    @property
    def output_model(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model).policy

    @property
    def trained_models(self) -> list[Any]:
        return [self.model.policy, self.model.value_model]

    def apply_parallelism(self) -> None:
        if self.strategy is not None:
            super().apply_parallelism()
            return
        # Else Accelerate would broadcast the main process's weights again, as if they were not sharded.
        self.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
        # Two roots, since the policy generates and the value model evaluates without the other.
        policy, value_model = map(unwrap_peft, self.trained_models)
        shard(self.accelerator, policy)
        shard(self.accelerator, value_model, value_model.base_model, value_model.score)

    def parallelize_trained_models(self, strategy: Strategy, precision: str) -> None:
        policy, value_model = map(unwrap_peft, self.trained_models)
        strategy.parallelize(policy, precision)
        strategy.parallelize_roots(value_model, precision, (value_model.base_model, value_model.score))

    def create_optimizer(self, model: Any = None) -> Any:
        """Create Trainer's optimizer; with ``value_learning_rate``, the value model gets parameter groups of its own."""
        value_learning_rate = self.args.value_learning_rate
        if self.optimizer is not None or value_learning_rate is None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        value_parameters = {id(parameter) for parameter in self.model.value_model.parameters()}
        groups = optimizer.param_groups
        for group in list(groups):
            of_value_model = [parameter for parameter in group["params"] if id(parameter) in value_parameters]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in value_parameters]
            groups.append({**group, "params": of_value_model, "lr": value_learning_rate})
        groups[:] = [group for group in groups if group["params"]]
        return optimizer

    # ------------------------------------------------------------------------------------------------ data

    def get_train_dataloader(self) -> DataLoader:
        if self.train_dataset is None:
            raise ValueError("PPOTrainer: training requires a train_dataset")
        sampler = RolloutSampler(
            num_prompts=len(self.train_dataset),
            rollout_size=self.args.rollout_size,
            repeats=self.args.steps_per_rollout * self.args.gradient_accumulation_steps,
            dp_rank=self.dp_rank,
            dp_size=self.dp_size,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
        )
        return _RolloutDataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=list)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Select the next micro-batch of the rollout; at its first one, collect the rollout."""
        args = self.args
        step = self.state.global_step % args.steps_per_rollout
        if self.rollout is None or (step == 0 and self._micro_batch == 0):
            self.rollout = self.collect_rollout(inputs)
            self._skip_rest_of_rollout = False
        epoch, mini_batch = divmod(step, args.num_mini_batches)
        first = mini_batch * args.mini_batch_size + self._micro_batch * args.per_device_train_batch_size
        indices = self.rollout.order[epoch, first : first + args.per_device_train_batch_size]
        self._micro_batch += 1
        return {"indices": indices, "num_tokens": self.rollout.num_tokens[epoch, mini_batch]}

    # ------------------------------------------------------------------------------------------------ rollout

    def collect_rollout(self, examples: list[dict[str, Any]]) -> Rollout:
        """Generate and score completions, and compute advantages and returns; keep the metrics for the next log entry."""
        args = self.args
        self.model.eval()
        scored = self.generate_and_score(examples)
        self.model.train()
        batch, logprobs, values, mask = scored.batch, scored.logprobs, scored.values, scored.batch.completion_mask

        weighted_scores = scored.scores @ torch.tensor(self.reward_weights, device=scored.scores.device)
        final_rewards = self._normalize(weighted_scores)
        if args.score_clip is not None:
            final_rewards = final_rewards.clamp(-args.score_clip, args.score_clip)
        if args.missing_eos_penalty is not None:
            final_rewards = final_rewards - args.missing_eos_penalty * ~batch.ended

        kl = kl_estimate(logprobs, scored.ref_logprobs, args.kl_estimator) * mask  # type: ignore[arg-type]
        kl_coef = self.kl_controller.coefficient
        rewards = -kl_coef * kl
        last = mask.sum(1) - 1  # the stop token, if there is one
        rewards[torch.arange(len(last)), last] += final_rewards
        if args.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, all_sum=self._sum_over_ranks)
        advantages, returns = generalized_advantages(rewards, values, mask, args.gamma, args.lam)
        explained = explained_variance(values, returns, mask)
        if args.whiten_advantages:
            advantages = whiten(advantages, mask, all_sum=self._sum_over_ranks)

        metrics = self._completion_metrics(scored, weighted_scores)
        penalty = kl_coef * kl.sum(1).mean()
        metrics |= {"objective/kl_penalty": penalty, "objective/rlhf_reward": final_rewards.mean() - penalty}
        metrics |= {"value/mean": masked_mean(values, mask), "value/explained_variance": torch.tensor(explained)}
        means = self._mean_over_ranks(metrics)
        means["objective/kl_coef"] = kl_coef
        for name, value in means.items():
            self._metrics[name].append(value)
        self.kl_controller.update(means["objective/kl"], len(examples) * self.dp_size)

        order = torch.stack([torch.randperm(len(examples)) for _ in range(args.num_ppo_epochs)])
        lengths = mask.sum(1).cpu()
        num_tokens = lengths[order].view(args.num_ppo_epochs, args.num_mini_batches, -1).sum(2)
        num_tokens = self._sum_over_ranks(num_tokens.to(mask.device))
        self.state.num_input_tokens_seen += int(self._sum_over_ranks(batch.attention_mask.sum()).item())
        return Rollout(batch, logprobs, values, advantages, returns, order.to(mask.device), num_tokens)

    @torch.no_grad()
    def generate_and_score(self, examples: list[dict[str, Any]]) -> ScoredBatch:
        """Generate a completion for each example, and compute log-probabilities, entropies, values and scores."""
        args = self.args
        size = args.rollout_batch_size
        policy = self.model.policy
        with self.generating(), self.accelerator.autocast():
            batches = [
                self.model.generate(
                    [example["prompt_ids"] for example in examples[first : first + size]],
                    max_completion_length=args.max_completion_length,
                    stop_ids=self.stop_ids,
                    pad_id=self.pad_id,
                )
                for first in range(0, len(examples), size)
            ]
            batch = concatenate(batches, self.pad_id)
            length = batch.completion_mask.shape[1]
            chunks = []
            for input_ids, attention_mask in zip(
                batch.input_ids.split(size), batch.attention_mask.split(size), strict=True
            ):
                logprobs, entropies, values = self.model(input_ids, attention_mask, length)
                with policy.disable_adapter() if self.ref_model is None else contextlib.nullcontext():
                    reference = policy if self.ref_model is None else self.ref_model
                    logits = completion_logits(reference, input_ids, attention_mask, length, args.temperature)
                ref_logprobs = token_logprobs(logits, input_ids[:, -length:])
                chunks.append((logprobs, ref_logprobs, entropies, values))
            scores = self._score(batch, examples)
        logprobs, ref_logprobs, entropies, values = (torch.cat(tensors) for tensors in zip(*chunks, strict=True))
        return ScoredBatch(batch, logprobs, ref_logprobs, entropies, values, scores)

    def _score(self, batch: RolloutBatch, examples: list[dict[str, Any]]) -> torch.Tensor:
        """Return each reward's raw score of each completion, (sequences, rewards)."""
        sequences = batch.sequences()
        lengths = batch.completion_mask.sum(1).tolist()
        completion_ids = [ids[len(ids) - length :].tolist() for ids, length in zip(sequences, lengths, strict=True)]
        texts = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        prompts = [example["prompt"] for example in examples]
        completions = Completions(
            prompts=prompts,
            completions=[
                text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
                for prompt, text in zip(prompts, texts, strict=True)
            ],
            completion_ids=completion_ids,
            sequences=sequences,
            columns={
                name: [example[name] for example in examples]
                for name in examples[0]
                if name not in ("prompt", "prompt_ids", "completion", "completions", "completion_ids")
            },
        )
        scores = [
            self.broadcast_from_first_rank(functools.partial(score, reward, completions))
            if isinstance(reward, FunctionReward)
            else score(reward, completions)
            for reward in self.rewards
        ]
        return torch.stack(scores, 1).to(batch.input_ids.device)

    def _normalize(self, scores: torch.Tensor) -> torch.Tensor:
        if self.args.score_normalization == "none":
            return scores
        sums = torch.stack([torch.ones_like(scores), scores, scores.square()]).double().sum(1)
        count, total, total_of_squares = self._sum_over_ranks(sums).tolist()
        self.normalizer.update(round(count), total, total_of_squares)
        return self.normalizer.normalize(scores)

    def _completion_metrics(self, scored: ScoredBatch, weighted_scores: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return means over the completions of this rank."""
        mask = scored.batch.completion_mask
        kl = (scored.logprobs - scored.ref_logprobs) * mask
        metrics = {
            "objective/kl": kl.sum(1).mean(),  # nats per completion
            "objective/entropy": (scored.entropies * mask).sum(1).mean(),
            "objective/scores": weighted_scores.mean(),
            "objective/scores_std": weighted_scores.std(correction=0),
            "completions/mean_length": mask.sum(1).float().mean(),
            "completions/eos_share": scored.batch.ended.float().mean(),
        }
        if len(self.rewards) > 1:
            for column, reward in enumerate(self.rewards):
                metrics[f"rewards/{column}_{reward.name}"] = scored.scores[:, column].mean()
        return metrics

    def _sum_over_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        """All-reduce sums over sequences; those that several ranks of a model-parallel group read count once."""
        total = self.accelerator.reduce(sums, "sum")
        return torch.div(total, self.get_tp_size(), rounding_mode=None if total.is_floating_point() else "floor")

    def _mean_over_ranks(self, metrics: dict[str, torch.Tensor]) -> dict[str, float]:
        values = torch.stack([value.double().to(self.args.device) for value in metrics.values()])
        return dict(zip(metrics, self.accelerator.reduce(values, "mean").tolist(), strict=True))

    # ------------------------------------------------------------------------------------------------ steps

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        args = self.args
        if self._skip_rest_of_rollout and self.state.global_step % args.steps_per_rollout:
            return torch.zeros((), device=args.device)  # without gradients the optimizer changes no weight
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._micro_batch == args.gradient_accumulation_steps:
            self._micro_batch = 0
            self._finish_step()
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return what this micro-batch adds to the mean loss over all tokens of the mini-batch, on all ranks."""
        args, rollout = self.args, self.rollout
        assert rollout is not None
        indices, num_tokens = inputs["indices"], inputs["num_tokens"]
        batch, mask = rollout.batch, rollout.batch.completion_mask[indices]
        old_logprobs = rollout.logprobs[indices]
        with self.accelerator.autocast():  # a sharded model does not bring its own
            logprobs, entropies, values = model(batch.input_ids[indices], batch.attention_mask[indices], mask.shape[1])

        policy_losses, policy_clipped = clipped_policy_loss(
            logprobs, old_logprobs, rollout.advantages[indices], args.cliprange
        )
        value_losses, value_clipped = clipped_value_loss(
            values, rollout.values[indices], rollout.returns[indices], args.cliprange_value
        )

        def token_mean(per_token: torch.Tensor) -> torch.Tensor:
            return torch.where(mask.bool(), per_token, 0).sum() / num_tokens

        policy_loss, value_loss = token_mean(policy_losses), token_mean(value_losses)
        loss = policy_loss + args.vf_coef * value_loss
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1} (policy {policy_loss.item()}, value "
                f"{value_loss.item()}): lower learning_rate, or clip or normalize the scores"
            )
        with torch.no_grad():
            statistics = [policy_loss, value_loss, token_mean(kl_estimate(old_logprobs, logprobs, "k3"))]
            statistics += [token_mean(policy_clipped.float()), token_mean(entropies)]
            statistics += [token_mean((logprobs - old_logprobs).exp()), token_mean(value_clipped.float())]
            self._step_statistics += torch.stack(statistics)
        return loss * self.dp_size  # data parallelism averages gradients over ranks; this makes it their sum

    def _finish_step(self) -> None:
        args = self.args
        statistics = self._sum_over_ranks(self._step_statistics).tolist()
        self._step_statistics.zero_()
        for name, value in zip(STEP_STATISTICS, statistics, strict=True):
            self._metrics[name].append(value)
        approx_kl = statistics[STEP_STATISTICS.index("policy/approx_kl")]
        self._skip_rest_of_rollout = args.target_kl is not None and approx_kl > args.target_kl
        steps_taken = self.state.global_step % args.steps_per_rollout + 1
        if self._skip_rest_of_rollout or steps_taken == args.steps_per_rollout:
            self._metrics["policy/steps_per_rollout"].append(steps_taken)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add PPO's metrics, averaged since the last entry, to a training entry of Trainer's."""
        if "loss" in logs:
            logs = logs | {name: sum(values) / len(values) for name, values in self._metrics.items()}
            logs["rollout"] = self.state.global_step // self.args.steps_per_rollout
            self._metrics.clear()
        super().log(logs, start_time)

    # ------------------------------------------------------------------------------------------------ evaluation

    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return score, KL divergence, length and share of ended completions, from one completion per prompt.

        Each evaluation uses the same random numbers, and does not change those of training.
        """
        args = self.args
        data = self.eval_dataset
        if eval_dataset is not None:
            data = encode_prompts(as_dataset(eval_dataset), args, self.tokenizer, self.model.policy)
        if data is None:
            raise ValueError("evaluate: there is no eval_dataset")
        # All ranks of a sharded model must compute equally often: a rank with fewer prompts takes one that is not counted.
        indices = list(range(self.dp_rank, len(data), self.dp_size))
        count, largest_count = len(indices), math.ceil(len(data) / self.dp_size)
        examples = data.select(indices + [0] * (largest_count - count)).to_list()
        was_training = self.model.training
        self.model.eval()
        sums, names = torch.zeros(0), []
        devices = [args.device] if args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(args.seed + self.dp_rank)
            scored = self.generate_and_score(examples)
            if count:
                scored = scored.first(count)
                weighted_scores = scored.scores @ torch.tensor(self.reward_weights, device=scored.scores.device)
                means = self._completion_metrics(scored, weighted_scores)
                del means["objective/scores_std"]
                names, sums = list(means), torch.stack(list(means.values())).float().cpu() * count
        self.model.train(was_training)
        gathered = gather_object([(names, sums.tolist())])[:: self.get_tp_size()]
        names = gathered[0][0]
        totals = [sum(values[i] for _, values in gathered if values) for i in range(len(names))]
        metrics = {f"{metric_key_prefix}_{name}": total / len(data) for name, total in zip(names, totals, strict=True)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the policy and its tokenizer, as any causal language model; Trainer's `save_model` calls it."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.write_output_model(folder, state_dict)

    def write_output_model(self, folder: Path, weights: dict[str, torch.Tensor] | None) -> None:
        super().write_output_model(folder, _remove_prefix(weights, "policy."))

    def write_extra_state(self, folder: Path, weights: dict[str, torch.Tensor] | None) -> None:
        value_model = self.accelerator.unwrap_model(self.model).value_model
        write_model(value_model, folder / VALUE_MODEL, _remove_prefix(weights, "value_model."))
        state = {"kl_coef": self.kl_controller.coefficient, "normalizer": dataclasses.asdict(self.normalizer)}
        (folder / PPO_STATE).write_text(json.dumps(state))

    def load_model(self, folder: Path) -> None:
        """Load policy, value model, KL coefficient and score statistics of a checkpoint."""
        if not (folder / PPO_STATE).is_file():
            raise ValueError(f"{folder} is not a checkpoint of PPOTrainer: it has no {PPO_STATE}")
        load_weights(self.model.policy, folder)
        load_weights(self.model.value_model, folder / VALUE_MODEL)
        state = json.loads((folder / PPO_STATE).read_text())
        self.kl_controller.coefficient = state["kl_coef"]
        self.normalizer = ScoreNormalizer(**state["normalizer"])


class _RolloutDataLoader(DataLoader):
    """Pass Trainer's `set_epoch` on to the sampler."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


class _SaveAfterRollout(TrainerCallback):
    """Postpone a checkpoint that is due within a rollout to its end, since completions are not saved."""

    def __init__(self) -> None:
        self.save_pending = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.save_pending |= control.should_save
        at_rollout_end = state.global_step % args.steps_per_rollout == 0 or state.global_step >= state.max_steps
        control.should_save = self.save_pending and at_rollout_end
        self.save_pending &= not at_rollout_end
        return control


def _remove_prefix(weights: dict[str, torch.Tensor] | None, prefix: str) -> dict[str, torch.Tensor] | None:
    """Select the weights of one submodule, by their names in it."""
    if weights is None:
        return None
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
