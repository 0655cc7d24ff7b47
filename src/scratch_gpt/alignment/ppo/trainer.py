"""Proximal policy optimisation of a language model, on `transformers.Trainer`.

    trainer = PPOTrainer(model="runs/sft/final", reward_funcs="runs/reward/final", train_dataset=prompts,
                         args=PPOConfig(output_dir="runs/ppo", max_steps=1000, learning_rate=1e-5))
    trainer.train()

As in InstructGPT (Ouyang et al. 2022, arXiv:2203.02155): draw completions, score them, subtract a KL penalty per token,
estimate advantages with a learnt value function, and take clipped steps over the same completions. Each batch of the data
loader is the prompts of a whole rollout, given out as often as the rollout has micro-batches: the first draws the
completions, the others learn from them. Everything else (schedule, clipping, precision, checkpoints, trackers) is Trainer's.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

from scratch_gpt.alignment.data.chat_template import encode_prompt, end_of_turn
from scratch_gpt.alignment.models import shard
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
from scratch_gpt.alignment.ppo.rollout import (
    RolloutBatch,
    completion_logits,
    concatenate,
    entropy,
    generate,
    position_arguments,
    token_logprobs,
    unwrap_peft,
)
from scratch_gpt.alignment.rewards import Completions, FunctionReward, Reward, RewardModel, load_rewards, score
from scratch_gpt.alignment.trainer_checkpoints import ResumableTrainerMixin, fill, write_model
from scratch_gpt.distributed.strategy import Strategy

logger = logging.get_logger(__name__)

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


class ActorCritic(nn.Module):
    """The policy and its value function as the one module that the optimizer sees."""

    def __init__(self, policy: Any, value_model: Any, temperature: float):
        super().__init__()
        self.policy, self.value_model, self.temperature = policy, value_model, temperature

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probability of each completion token, entropy and value before it, each (rows, completion_length)."""
        logits = completion_logits(self.policy, input_ids, attention_mask, completion_length, self.temperature)
        logprobs = token_logprobs(logits, input_ids[:, -completion_length:])
        return logprobs, entropy(logits), self.values(input_ids, attention_mask, completion_length)

    def generate(self, prompt_ids: list[list[int]], **settings: Any) -> RolloutBatch:
        """Of the policy; Trainer lets a sharded module have a second method of this name that begins like `forward`."""
        return generate(self.policy, prompt_ids, temperature=self.temperature, **settings)

    def values(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int) -> torch.Tensor:
        base = unwrap_peft(self.value_model)
        hidden_states = base.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=False,
            **position_arguments(base, attention_mask),
        ).last_hidden_state
        values = base.score(hidden_states[:, -completion_length - 1 : -1])
        return values.squeeze(-1).float().clone()  # FSDP2 warns of views that leave a module

    def activation_checkpointing_enable(self, **settings: Any) -> None:
        for model in (self.policy, self.value_model):
            model.activation_checkpointing_enable(**settings)


@dataclasses.dataclass
class Rollout:
    """Completions of this process and what is learnt from them; each tensor but the batch's is (rows, completion)."""

    batch: RolloutBatch
    logprobs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    order: torch.Tensor
    """(epochs, rows): in which order each epoch takes the rows."""
    tokens: torch.Tensor
    """(epochs, mini-batches): completion tokens in each, over all processes."""


class PPOTrainer(ResumableTrainerMixin):
    """PPO with TRL's look and feel.

    Args:
        model: The policy to train: a causal language model, or its path. Usually the result of supervised fine-tuning.
        reward_funcs: What a completion is worth, one or several: a sequence classifier with one label, its path, or a
            function `f(prompts, completions, completion_ids, **columns) -> scores` as GRPOTrainer takes it.
        args: The settings.
        train_dataset: Its column `prompt` holds text or messages; the other columns go to the reward functions.
        eval_dataset: Likewise; `evaluate` draws completions for it and reports score, KL divergence and length.
        processing_class: The policy's tokenizer. Default: the one at the policy's path.
        reward_processing_classes: Tokenizers of the reward models, where they are not the policy's and not at their path.
        ref_model: What the KL penalty is measured against. Default: the policy as it is now (with adapters: without them).
        value_model: A sequence classifier with one label. Default: a copy of the first reward model that has the
            policy's tokenizer and is a decoder with a `score` head, else the policy's body with a head of zeros.
        peft_config: Train adapters of this kind on the policy and on the value model instead of all weights.

    Raises:
        ValueError: data, models and settings that do not fit; the message says which, and the mend.
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
            processing_class = AutoTokenizer.from_pretrained(model.config._name_or_path)
        if ref_model is model:
            raise ValueError("ref_model is the policy itself and would move with it: leave it out, or give a copy")
        _restore_forward(model)
        self.tokenizer = processing_class
        datasets = [_as_dataset(data) for data in (train_dataset, eval_dataset)]
        self.stop_ids = _stop_ids(args, processing_class, model, datasets)
        pad_id = processing_class.pad_token_id
        self.pad_id: int = pad_id if pad_id is not None else (self.stop_ids[0] if self.stop_ids else 0)
        if args.missing_eos_penalty is not None and not self.stop_ids:
            raise ValueError("missing_eos_penalty: the tokenizer has no end of sequence; give stop_tokens")
        train_data, eval_data = (self._encode(data, args, model) for data in datasets)

        self.rewards = load_rewards(reward_funcs, reward_processing_classes, processing_class, self.stop_ids)
        self.reward_weights = args.reward_weights or [1.0] * len(self.rewards)
        if len(self.reward_weights) != len(self.rewards):
            raise ValueError(f"there are {len(self.rewards)} rewards and {len(self.reward_weights)} reward_weights")
        if value_model is None:
            value_model = self._initial_value_model(model)
        _check_value_model(value_model, model)
        _restore_forward(value_model)
        if peft_config is not None:
            model, value_model = _add_adapters(model, value_model, peft_config)
        self.ref_model: PreTrainedModel | None = ref_model
        if ref_model is None and not hasattr(model, "disable_adapter"):
            self.ref_model = copy.deepcopy(model)
        for module in (model, value_model, self.ref_model):
            _disable_dropout(module)

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
        self.loss_is_scaled_for_ga = True  # each loss is divided by the tokens of its whole mini-batch
        self.frozen = [reward.model for reward in self.rewards if isinstance(reward, RewardModel)]
        if self.ref_model is not None:
            self.frozen.append(self.ref_model.eval().requires_grad_(False))
        for module in self.frozen:
            if self.is_fsdp_enabled:
                shard(self.accelerator, module)
            else:
                module.to(self.args.device)
        set_seed(args.seed, device_specific=True)  # each process draws its own completions

        self.kl_controller = KLController(args.kl_coef, args.adaptive_kl_target, args.adaptive_kl_horizon)
        self.normalizer = ScoreNormalizer(only_first=args.score_normalization == "initial")
        self.rollout: Rollout | None = None
        self._micro_batch = 0  # of the optimizer step
        self._leave_rollout = False
        self._step_statistics = torch.zeros(len(STEP_STATISTICS), device=self.args.device)
        self._averages: dict[str, list[float]] = defaultdict(list)

    # ------------------------------------------------------------------------------------------------ set-up

    def _encode(self, data: Dataset | None, args: PPOConfig, model: PreTrainedModel) -> Dataset | None:
        """The data with a column of prompt ids, without the prompts that are too long."""
        if data is None:
            return None
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        longest = args.max_prompt_length
        if context is not None:
            longest = min(longest or context, context - args.max_completion_length)
            if longest < 1:
                raise ValueError(
                    f"max_completion_length is {args.max_completion_length}, the model's whole context {context} tokens"
                )
        prompt_ids = [encode_prompt(self.tokenizer, prompt) for prompt in data["prompt"]]
        empty = [row for row, ids in enumerate(prompt_ids) if not ids]
        if empty:
            raise ValueError(f"the prompt of row {empty[0]} is empty ({len(empty)} of {len(data)} are)")
        fits = [row for row, ids in enumerate(prompt_ids) if longest is None or len(ids) <= longest]
        if not fits:
            raise ValueError(f"all {len(data)} prompts are longer than {longest} tokens: raise max_prompt_length")
        if len(fits) < len(data):
            logger.warning(f"{len(data) - len(fits)} of {len(data)} prompts are longer than {longest} tokens: left out")
        return data.select(fits).add_column("prompt_ids", [prompt_ids[row] for row in fits])

    def _initial_value_model(self, policy: PreTrainedModel) -> PreTrainedModel:
        """The reward model that reads the policy's tokens, else the policy's body with a head of zeros."""
        for reward in self.rewards:
            if isinstance(reward, RewardModel) and reward.tokenizer is None and hasattr(reward.model, "score"):
                _restore_forward(reward.model)
                return copy.deepcopy(reward.model).requires_grad_(True)
        base = unwrap_peft(policy)
        config = copy.deepcopy(base.config)
        config.num_labels = 1
        trusted = type(base).__module__.startswith("transformers_modules.")  # its owner has loaded this code already
        value_model = AutoModelForSequenceClassification.from_config(
            config, dtype=base.dtype, trust_remote_code=trusted
        )
        body = {name.replace(".base_layer.", "."): tensor for name, tensor in base.base_model.state_dict().items()}
        value_model.base_model.load_state_dict({name: body[name] for name in value_model.base_model.state_dict()})
        nn.init.zeros_(value_model.score.weight)
        return value_model

    def shard(self) -> None:
        """Policy and value model, so that each computes by itself, too."""
        if self.strategy is not None:
            super().shard()
            return
        # Or Accelerate would give out the weights of the main process once more, as if they were whole.
        self.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
        policy, value_model = unwrap_peft(self.model.policy), unwrap_peft(self.model.value_model)
        shard(self.accelerator, policy)
        shard(self.accelerator, value_model, value_model.base_model, value_model.score)

    @property
    def trained(self) -> list[Any]:
        return [self.model.policy, self.model.value_model]

    def parallelize_trained(self, strategy: Strategy, precision: str) -> None:
        policy, value_model = map(unwrap_peft, self.trained)
        strategy.parallelize(policy, precision)
        strategy.parallelize(value_model, precision, (value_model.base_model, value_model.score))

    def create_optimizer(self, model: Any = None) -> Any:
        """Trainer's, with a learning rate of its own for the value model where that is asked for."""
        rate = self.args.value_learning_rate
        if self.optimizer is not None or rate is None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        of_value = {id(parameter) for parameter in self.model.value_model.parameters()}
        groups = optimizer.param_groups
        for group in list(groups):
            own = [parameter for parameter in group["params"] if id(parameter) in of_value]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in of_value]
            groups.append({**group, "params": own, "lr": rate})
        groups[:] = [group for group in groups if group["params"]]
        return optimizer

    # ------------------------------------------------------------------------------------------------ data

    def get_train_dataloader(self) -> DataLoader:
        if self.train_dataset is None:
            raise ValueError("PPOTrainer: training requires a train_dataset")
        sampler = RolloutSampler(
            num_prompts=len(self.train_dataset),
            rows=self.args.rows_per_rollout,
            repeats=self.args.steps_per_rollout * self.args.gradient_accumulation_steps,
            process=self.dp_rank,
            processes=self.dp_size,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
        )
        return _RolloutLoader(self.train_dataset, batch_sampler=sampler, collate_fn=list)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """The next micro-batch of the rollout, drawn first if this is its first."""
        args = self.args
        step = self.state.global_step % args.steps_per_rollout
        if self.rollout is None or (step == 0 and self._micro_batch == 0):
            self.rollout = self._draw_rollout(inputs)
            self._leave_rollout = False
        epoch, mini_batch = divmod(step, args.num_mini_batches)
        first = mini_batch * args.rows_per_mini_batch + self._micro_batch * args.per_device_train_batch_size
        rows = self.rollout.order[epoch, first : first + args.per_device_train_batch_size]
        self._micro_batch += 1
        return {"rows": rows, "tokens": self.rollout.tokens[epoch, mini_batch]}

    # ------------------------------------------------------------------------------------------------ rollout

    def _draw_rollout(self, examples: list[dict[str, Any]]) -> Rollout:
        """Completions for the prompts, their scores, rewards, advantages and returns, and the metrics of all that."""
        args = self.args
        self.model.eval()
        batch, logprobs, ref_logprobs, entropies, values, scores = self._draw(examples)
        self.model.train()
        mask = batch.completion_mask

        weighted = scores @ torch.tensor(self.reward_weights, device=scores.device)
        final = self._normalize(weighted)
        if args.score_clip is not None:
            final = final.clamp(-args.score_clip, args.score_clip)
        if args.missing_eos_penalty is not None:
            final = final - args.missing_eos_penalty * ~batch.ended

        kl = kl_estimate(logprobs, ref_logprobs, args.kl_estimator) * mask  # type: ignore[arg-type]
        coefficient = self.kl_controller.coefficient
        rewards = -coefficient * kl
        last = mask.sum(1) - 1  # the stop token where there is one
        rewards[torch.arange(len(last)), last] += final
        if args.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, all_sum=self._all_sum)
        advantages, returns = generalized_advantages(rewards, values, mask, args.gamma, args.lam)
        explained = explained_variance(values, returns, mask)
        if args.whiten_advantages:
            advantages = whiten(advantages, mask, all_sum=self._all_sum)

        metrics = self._describe(batch, scores, weighted, logprobs, ref_logprobs, entropies)
        penalty = coefficient * kl.sum(1).mean()
        metrics |= {"objective/kl_penalty": penalty, "objective/rlhf_reward": final.mean() - penalty}
        metrics |= {"value/mean": masked_mean(values, mask), "value/explained_variance": torch.tensor(explained)}
        averages = self._all_mean(metrics)
        averages["objective/kl_coef"] = coefficient
        for name, value in averages.items():
            self._averages[name].append(value)
        self.kl_controller.update(averages["objective/kl"], len(examples) * self.dp_size)

        order = torch.stack([torch.randperm(len(examples)) for _ in range(args.num_ppo_epochs)])
        tokens = mask.sum(1).cpu()[order].view(args.num_ppo_epochs, args.num_mini_batches, -1).sum(2)
        tokens = self._all_sum(tokens.to(mask.device))
        self.state.num_input_tokens_seen += int(self._all_sum(batch.attention_mask.sum()).item())
        return Rollout(batch, logprobs, values, advantages, returns, order.to(mask.device), tokens)

    @torch.no_grad()
    def _draw(self, examples: list[dict[str, Any]]) -> tuple[RolloutBatch, *tuple[torch.Tensor, ...]]:
        """Completions and, of each token, log-probability, that of the reference, entropy and value; then scores
        (rows, rewards)."""
        args = self.args
        pieces = [
            examples[first : first + args.rollout_batch_size]
            for first in range(0, len(examples), args.rollout_batch_size)
        ]
        policy = self.model.policy
        with self.generating(), self.accelerator.autocast():
            batches = [
                self.model.generate(
                    [example["prompt_ids"] for example in piece],
                    max_completion_length=args.max_completion_length,
                    stop_ids=self.stop_ids,
                    pad_id=self.pad_id,
                )
                for piece in pieces
            ]
            batch = concatenate(batches, self.pad_id)
            length = batch.completion_mask.shape[1]
            scored = []
            for input_ids, attention_mask in zip(
                batch.input_ids.split(args.rollout_batch_size),
                batch.attention_mask.split(args.rollout_batch_size),
                strict=True,
            ):
                logprobs, entropies, values = self.model(input_ids, attention_mask, length)
                with policy.disable_adapter() if self.ref_model is None else contextlib.nullcontext():
                    reference = policy if self.ref_model is None else self.ref_model
                    logits = completion_logits(reference, input_ids, attention_mask, length, args.temperature)
                scored.append((logprobs, token_logprobs(logits, input_ids[:, -length:]), entropies, values))
            scores = self._score(batch, examples)
        return batch, *(torch.cat(parts) for parts in zip(*scored, strict=True)), scores

    def _score(self, batch: RolloutBatch, examples: list[dict[str, Any]]) -> torch.Tensor:
        """(rows, rewards), before any normalisation."""
        sequences = batch.sequences()
        lengths = batch.completion_mask.sum(1).tolist()
        completion_ids = [ids[len(ids) - length :].tolist() for ids, length in zip(sequences, lengths, strict=True)]
        texts = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        prompts = [example["prompt"] for example in examples]
        rollout = Completions(
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
            self.broadcast_from_first_rank(functools.partial(score, reward, rollout))
            if isinstance(reward, FunctionReward)
            else score(reward, rollout)
            for reward in self.rewards
        ]
        return torch.stack(scores, 1).to(batch.input_ids.device)

    def _normalize(self, scores: torch.Tensor) -> torch.Tensor:
        if self.args.score_normalization == "none":
            return scores
        sums = torch.stack([torch.ones_like(scores), scores, scores.square()]).double().sum(1)
        count, total, total_of_squares = self._all_sum(sums).tolist()
        self.normalizer.update(round(count), total, total_of_squares)
        return self.normalizer.normalize(scores)

    def _describe(
        self,
        batch: RolloutBatch,
        scores: torch.Tensor,
        weighted: torch.Tensor,
        logprobs: torch.Tensor,
        ref_logprobs: torch.Tensor,
        entropies: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Means over the completions of this process."""
        mask = batch.completion_mask
        metrics = {
            "objective/kl": ((logprobs - ref_logprobs) * mask).sum(1).mean(),  # nats per completion
            "objective/entropy": (entropies * mask).sum(1).mean(),
            "objective/scores": weighted.mean(),
            "objective/scores_std": weighted.std(correction=0),
            "completions/mean_length": mask.sum(1).float().mean(),
            "completions/eos_share": batch.ended.float().mean(),
        }
        if len(self.rewards) > 1:
            for column, reward in enumerate(self.rewards):
                metrics[f"rewards/{column}_{reward.name}"] = scores[:, column].mean()
        return metrics

    def _all_sum(self, sums: torch.Tensor) -> torch.Tensor:
        """Over all rows; those that several processes read count once."""
        total = self.accelerator.reduce(sums, "sum")
        return torch.div(total, self.get_tp_size(), rounding_mode=None if total.is_floating_point() else "floor")

    def _all_mean(self, metrics: dict[str, torch.Tensor]) -> dict[str, float]:
        values = torch.stack([value.double().to(self.args.device) for value in metrics.values()])
        return dict(zip(metrics, self.accelerator.reduce(values, "mean").tolist(), strict=True))

    # ------------------------------------------------------------------------------------------------ learning

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        args = self.args
        if self._leave_rollout and self.state.global_step % args.steps_per_rollout:
            return torch.zeros((), device=args.device)  # without gradients the optimizer leaves every weight as it is
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._micro_batch == args.gradient_accumulation_steps:
            self._micro_batch = 0
            self._finish_step()
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """This micro-batch's share of the mean over the tokens of the whole mini-batch, on all processes."""
        args, rollout = self.args, self.rollout
        assert rollout is not None
        rows, tokens = inputs["rows"], inputs["tokens"]
        batch, mask = rollout.batch, rollout.batch.completion_mask[rows]
        old_logprobs = rollout.logprobs[rows]
        with self.accelerator.autocast():  # which a sharded model does not bring along
            logprobs, entropies, values = model(batch.input_ids[rows], batch.attention_mask[rows], mask.shape[1])

        policy_losses, policy_clipped = clipped_policy_loss(
            logprobs, old_logprobs, rollout.advantages[rows], args.cliprange
        )
        value_losses, value_clipped = clipped_value_loss(
            values, rollout.values[rows], rollout.returns[rows], args.cliprange_value
        )

        def share(per_token: torch.Tensor) -> torch.Tensor:
            return torch.where(mask.bool(), per_token, 0).sum() / tokens

        policy_loss, value_loss = share(policy_losses), share(value_losses)
        loss = policy_loss + args.vf_coef * value_loss
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1} (policy {policy_loss.item()}, value "
                f"{value_loss.item()}): lower learning_rate, or clip or normalise the scores"
            )
        with torch.no_grad():
            statistics = [policy_loss, value_loss, share(kl_estimate(old_logprobs, logprobs, "k3"))]
            statistics += [share(policy_clipped.float()), share(entropies), share((logprobs - old_logprobs).exp())]
            statistics += [share(value_clipped.float())]
            self._step_statistics += torch.stack(statistics)
        return loss * self.dp_size  # data parallelism averages the gradients of processes; this sums them

    def _finish_step(self) -> None:
        args = self.args
        statistics = self._all_sum(self._step_statistics).tolist()
        self._step_statistics.zero_()
        for name, value in zip(STEP_STATISTICS, statistics, strict=True):
            self._averages[name].append(value)
        approx_kl = statistics[STEP_STATISTICS.index("policy/approx_kl")]
        self._leave_rollout = args.target_kl is not None and approx_kl > args.target_kl
        left = self.state.global_step % args.steps_per_rollout + 1
        if self._leave_rollout or left == args.steps_per_rollout:
            self._averages["policy/steps_per_rollout"].append(left)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last entry to what Trainer logs of training."""
        if "loss" in logs:
            logs = logs | {name: sum(values) / len(values) for name, values in self._averages.items()}
            logs["rollout"] = self.state.global_step // self.args.steps_per_rollout
            self._averages.clear()
        super().log(logs, start_time)

    # ------------------------------------------------------------------------------------------------ evaluation

    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Score, KL divergence, length and share of ended completions, of one completion per prompt.

        The same random numbers are drawn each time, and those of training are left as they are.
        """
        args = self.args
        data = (
            self.eval_dataset
            if eval_dataset is None
            else self._encode(_as_dataset(eval_dataset), args, self.model.policy)
        )
        if data is None:
            raise ValueError("evaluate: there is no eval_dataset")
        # Of sharded models all processes compute as often: who has a row less takes one that does not count.
        rows = list(range(self.dp_rank, len(data), self.dp_size))
        count, most = len(rows), math.ceil(len(data) / self.dp_size)
        mine = data.select(rows + [0] * (most - count)).to_list()
        was_training = self.model.training
        self.model.eval()
        sums, names = torch.zeros(0), []
        devices = [args.device] if args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(args.seed + self.dp_rank)
            batch, *parts = self._draw(mine)
            logprobs, ref_logprobs, entropies, _, scores = (part[:count] for part in parts)
            if count:
                batch = batch.first(count)
                weighted = scores @ torch.tensor(self.reward_weights, device=scores.device)
                described = self._describe(batch, scores, weighted, logprobs, ref_logprobs, entropies)
                del described["objective/scores_std"]
                names, sums = list(described), torch.stack(list(described.values())).float().cpu() * count
        self.model.train(was_training)
        gathered = gather_object([(names, sums.tolist())])[:: self.get_tp_size()]
        names = gathered[0][0]
        totals = [sum(values[i] for _, values in gathered if values) for i in range(len(names))]
        metrics = {f"{metric_key_prefix}_{name}": total / len(data) for name, total in zip(names, totals, strict=True)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics

    # ------------------------------------------------------------------------------------------------ saving

    @property
    def result(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model).policy

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The policy and its tokenizer, as any causal language model is saved."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.write_result(folder, state_dict)

    def write_result(self, folder: Path, weights: dict[str, torch.Tensor] | None) -> None:
        super().write_result(folder, _within(weights, "policy."))

    def write_more(self, folder: Path, weights: dict[str, torch.Tensor] | None) -> None:
        write_model(
            self.accelerator.unwrap_model(self.model).value_model,
            folder / VALUE_MODEL,
            _within(weights, "value_model."),
        )
        state = {"kl_coef": self.kl_controller.coefficient, "normalizer": dataclasses.asdict(self.normalizer)}
        (folder / PPO_STATE).write_text(json.dumps(state))

    def read_model(self, folder: Path) -> None:
        if not (folder / PPO_STATE).is_file():
            raise ValueError(f"{folder} is not a checkpoint of PPOTrainer: it has no {PPO_STATE}")
        fill(self.model.policy, folder)
        fill(self.model.value_model, folder / VALUE_MODEL)
        state = json.loads((folder / PPO_STATE).read_text())
        self.kl_controller.coefficient = state["kl_coef"]
        self.normalizer = ScoreNormalizer(**state["normalizer"])


class RolloutSampler(Sampler[list[int]]):
    """The rows of each rollout that this process draws, given out ``repeats`` times in a row.

    An epoch takes the prompts in a random order, which its number and the seed decide, in whole rollouts: what is left
    over waits for another epoch. Fewer prompts than a rollout has rows are asked more than once.
    """

    def __init__(self, num_prompts: int, rows: int, repeats: int, process: int, processes: int, seed: int):
        self.num_prompts, self.rows, self.repeats = num_prompts, rows, repeats
        self.process, self.processes, self.seed = process, processes, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def num_rollouts(self) -> int:
        return max(1, self.num_prompts // (self.rows * self.processes))

    def __len__(self) -> int:
        return self.num_rollouts * self.repeats

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        together = self.rows * self.processes
        order: list[int] = []
        while len(order) < together:
            order += torch.randperm(self.num_prompts, generator=generator).tolist()
        for rollout in range(self.num_rollouts):
            first = rollout * together + self.process * self.rows
            for _ in range(self.repeats):
                yield order[first : first + self.rows]


class _RolloutLoader(DataLoader):
    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


class _SaveAfterRollout(TrainerCallback):
    """Puts a checkpoint that falls within a rollout off to its end: the completions are not saved."""

    def __init__(self) -> None:
        self.pending = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.pending |= control.should_save
        at_end = state.global_step % args.steps_per_rollout == 0 or state.global_step >= state.max_steps
        control.should_save = self.pending and at_end
        self.pending &= not at_end
        return control


def _within(weights: dict[str, torch.Tensor] | None, prefix: str) -> dict[str, torch.Tensor] | None:
    """Those of one part of a module, by the names that they have in it."""
    if weights is None:
        return None
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _as_dataset(data: Any) -> Dataset | None:
    if data is None or isinstance(data, Dataset):
        checked = data
    elif isinstance(data, Sequence):
        checked = Dataset.from_list(list(data))
    else:
        raise ValueError(f"PPOTrainer takes a datasets.Dataset or a list of dictionaries, not a {type(data).__name__}")
    if checked is not None and "prompt" not in checked.column_names:
        raise ValueError(f"the data has no column prompt, but {', '.join(checked.column_names) or 'none at all'}")
    return checked


def _stop_ids(
    args: PPOConfig, tokenizer: PreTrainedTokenizerBase, policy: PreTrainedModel, datasets: list[Dataset | None]
) -> list[int]:
    if args.stop_tokens is not None:
        known = tokenizer.get_vocab()
        unknown = [token for token in args.stop_tokens if token not in known]
        if unknown:
            raise ValueError(f"stop_tokens: the tokenizer has no token {', '.join(map(repr, unknown))}")
        return [known[token] for token in args.stop_tokens]
    of_model = getattr(policy.generation_config, "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])]
    if any(data is not None and len(data) and not isinstance(data[0]["prompt"], str) for data in datasets):
        if tokenizer.chat_template is None:
            raise ValueError("the prompts are conversations, but the tokenizer has no chat template")
        ids.append(end_of_turn(tokenizer))
    return sorted({int(token_id) for token_id in ids if token_id is not None})


def _check_value_model(value_model: Any, policy: Any) -> None:
    base, name = unwrap_peft(value_model), type(unwrap_peft(value_model)).__name__
    if base.config.num_labels != 1 or not hasattr(base, "score"):
        raise ValueError(
            f"{name} cannot be the value model: that is a decoder with num_labels=1 and a head named score"
        )
    if base.config.vocab_size < unwrap_peft(policy).config.vocab_size:
        raise ValueError(f"the value model knows {base.config.vocab_size} tokens, fewer than the policy")


def _add_adapters(policy: PreTrainedModel, value_model: PreTrainedModel, peft_config: Any) -> tuple[Any, Any]:
    from peft import TaskType, get_peft_model

    if peft_config.is_prompt_learning:
        raise ValueError("prompt learning changes the inputs, which PPOTrainer does not follow: take LoRA")
    of_value_model = copy.deepcopy(peft_config)
    of_value_model.task_type, of_value_model.modules_to_save = TaskType.SEQ_CLS, ["score"]
    return get_peft_model(policy, peft_config), get_peft_model(value_model, of_value_model)


def _restore_forward(model: Any) -> None:
    """Undo what TRL's trainers leave on a model: a `forward` that, copied with it, would still run the original."""
    base = unwrap_peft(model)
    if not hasattr(base, "_hf_hook"):  # Accelerate's, of a model spread over devices
        base.__dict__.pop("forward", None)


def _disable_dropout(model: Any) -> None:
    """The probabilities that a step compares must not differ by chance."""
    for module in model.modules() if model is not None else ():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)
