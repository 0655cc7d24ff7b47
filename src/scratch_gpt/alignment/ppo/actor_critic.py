"""The policy and the value model that PPO trains: how they are built from other models, and how they compute together."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from scratch_gpt.alignment.models import unwrap_peft
from scratch_gpt.alignment.ppo.rollout import (
    RolloutBatch,
    completion_logits,
    entropy,
    generate,
    position_arguments,
    token_logprobs,
)
from scratch_gpt.alignment.rewards import FunctionReward, RewardModel


class ActorCritic(nn.Module):
    """The policy and its value model as one module, which is what the optimizer and DistributedDataParallel see."""

    def __init__(self, policy: Any, value_model: Any, temperature: float):
        super().__init__()
        self.policy, self.value_model, self.temperature = policy, value_model, temperature

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return each completion token's log-probability, and the entropy and the value of the state before it.

        Each is (sequences, completion_length).
        """
        logits = completion_logits(self.policy, input_ids, attention_mask, completion_length, self.temperature)
        logprobs = token_logprobs(logits, input_ids[:, -completion_length:])
        return logprobs, entropy(logits), self.values(input_ids, attention_mask, completion_length)

    def generate(self, prompt_ids: list[list[int]], **options: Any) -> RolloutBatch:
        """Generate a completion for each prompt; see :func:`~scratch_gpt.alignment.ppo.rollout.generate`."""
        # Trainer lets a sharded module have a method `generate` that gathers weights as `forward` does.
        return generate(self.policy, prompt_ids, temperature=self.temperature, **options)

    def values(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int) -> torch.Tensor:
        """Return the value of the state before each completion token, (sequences, completion_length)."""
        base = unwrap_peft(self.value_model)
        hidden_states = base.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=False,
            **position_arguments(base, attention_mask),
        ).last_hidden_state
        values = base.score(hidden_states[:, -completion_length - 1 : -1])
        return values.squeeze(-1).float().clone()  # FSDP2 warns of views that leave a module

    def activation_checkpointing_enable(self, **options: Any) -> None:
        for model in (self.policy, self.value_model):
            model.activation_checkpointing_enable(**options)


def build_value_model(policy: PreTrainedModel, rewards: Iterable[RewardModel | FunctionReward]) -> PreTrainedModel:
    """Copy the first reward model that has the policy's tokenizer; else the policy's body, with a head of zeros."""
    for reward in rewards:
        if isinstance(reward, RewardModel) and reward.tokenizer is None and hasattr(reward.model, "score"):
            restore_forward(reward.model)
            return copy.deepcopy(reward.model).requires_grad_(True)
    base = unwrap_peft(policy)
    config = copy.deepcopy(base.config)
    config.num_labels = 1
    # The policy's remote code, if any, has been loaded already, so the user trusts it.
    trusted = type(base).__module__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")
    value_model = AutoModelForSequenceClassification.from_config(config, dtype=base.dtype, trust_remote_code=trusted)
    body = {name.replace(".base_layer.", "."): tensor for name, tensor in base.base_model.state_dict().items()}
    value_model.base_model.load_state_dict({name: body[name] for name in value_model.base_model.state_dict()})
    nn.init.zeros_(value_model.score.weight)
    return value_model


def check_value_model(value_model: Any, policy: Any) -> None:
    """Raise a ValueError if ``value_model`` cannot give values for the policy's tokens."""
    base, name = unwrap_peft(value_model), type(unwrap_peft(value_model)).__name__
    if base.config.num_labels != 1 or not hasattr(base, "score"):
        raise ValueError(
            f"{name} cannot be the value model: it must be a decoder with num_labels=1 and a head named score"
        )
    if base.config.vocab_size < unwrap_peft(policy).config.vocab_size:
        raise ValueError(f"the value model knows {base.config.vocab_size} tokens, fewer than the policy")


def add_adapters(policy: PreTrainedModel, value_model: PreTrainedModel, peft_config: Any) -> tuple[Any, Any]:
    """Wrap both models in PEFT adapters of the same kind; the value model's head stays trained in full.

    Raises:
        ValueError: the adapters change the model's inputs.
    """
    from peft import TaskType, get_peft_model

    if peft_config.is_prompt_learning:
        raise ValueError("PPOTrainer does not support prompt learning, which changes the inputs: use LoRA")
    value_config = copy.deepcopy(peft_config)
    value_config.task_type, value_config.modules_to_save = TaskType.SEQ_CLS, ["score"]
    return get_peft_model(policy, peft_config), get_peft_model(value_model, value_config)


def restore_forward(model: Any) -> None:
    """Remove the `forward` that TRL's trainers set on a model: a deep copy of it would still run the original's weights."""
    base = unwrap_peft(model)
    if not hasattr(base, "_hf_hook"):  # then the `forward` is Accelerate's, for a model on several devices
        base.__dict__.pop("forward", None)


def disable_dropout(model: Any) -> None:
    """Switch dropout off: the log-probabilities that PPO compares must not differ by chance."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)
