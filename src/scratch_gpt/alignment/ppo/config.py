"""The settings of :class:`~scratch_gpt.alignment.ppo.trainer.PPOTrainer`."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments


@dataclass
class PPOConfig(TrainingArguments):
    """The settings of `transformers.TrainingArguments`, and those of PPO.

    An optimizer step takes a mini-batch of `per_device_train_batch_size` x `gradient_accumulation_steps` completions per rank.
    A rollout has `num_mini_batches` of them and is used for `num_ppo_epochs` epochs, so it lasts `num_ppo_epochs` x
    `num_mini_batches` optimizer steps. Checkpoints wait for its end, from where resume is exact.

    Raises:
        ValueError: values out of range, or settings that contradict each other; the message names all of them.
    """

    # TrainingArguments has other defaults than the published implementations of PPO.
    learning_rate: float = field(default=3e-6, metadata={"help": "Initial learning rate of AdamW."})
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "Initial learning rate of the value model. Default: learning_rate."}
    )
    adam_epsilon: float = field(default=1e-5, metadata={"help": "Epsilon of AdamW, as in OpenAI's implementation."})
    logging_steps: float | None = field(
        default=None, metadata={"help": "Optimizer steps between two log entries. Default: those of one rollout."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Default: false, since a loss that is not finite is an error."}
    )

    # Rollout
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Skip longer prompts. Default: the model's context less max_completion_length."},
    )
    max_completion_length: int = field(
        default=64, metadata={"help": "Longest completion, in tokens; longer ones are cut off."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of sampling and of all log-probabilities."})
    stop_tokens: list[str] | None = field(
        default=None,
        metadata={
            "help": "Tokens that end a completion. Default: the tokenizer's and the model's end of sequence and, for "
            "conversations, the chat template's end of turn."
        },
    )
    rollout_batch_size: int = field(
        default=64,
        metadata={"help": "Completions generated and scored at a time, per rank; affects memory only."},
    )

    # Reward
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward. Default: 1 each."}
    )
    score_normalization: str = field(
        default="none",
        metadata={
            "help": "Normalize scores by mean and standard deviation: 'none'; 'initial', those of the first rollout; or "
            "'running', those of all rollouts so far, which changes the objective during training."
        },
    )
    score_clip: float | None = field(
        default=None, metadata={"help": "Clip scores to plus and minus this. Default: no clipping."}
    )
    missing_eos_penalty: float | None = field(
        default=None,
        metadata={"help": "Subtract this from the score of a completion without a stop token. Default: nothing."},
    )
    kl_coef: float = field(
        default=0.05, metadata={"help": "Coefficient of the KL penalty towards the reference model."}
    )
    kl_estimator: str = field(
        default="k1",
        metadata={"help": "Estimator of the KL penalty: 'k1', or 'k3', which has less variance but another optimum."},
    )
    adaptive_kl_target: float | None = field(
        default=None,
        metadata={
            "help": "Adapt kl_coef to reach this KL divergence (nats per completion). Default: kl_coef is constant."
        },
    )
    adaptive_kl_horizon: int = field(
        default=10_000, metadata={"help": "Completions over which kl_coef can change by a fifth."}
    )

    # Optimization
    num_ppo_epochs: int = field(default=4, metadata={"help": "Epochs over each rollout."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps per PPO epoch."})
    gamma: float = field(default=1.0, metadata={"help": "Discount factor per token."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalized advantage estimation."})
    cliprange: float = field(default=0.2, metadata={"help": "Clip range of the probability ratio."})
    cliprange_value: float = field(
        default=0.2, metadata={"help": "Clip range of the value, around its value at the rollout."}
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Coefficient of the value loss."})
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Normalize a rollout's advantages to mean 0, variance 1."}
    )
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale a rollout's per-token rewards to variance 1."})
    target_kl: float | None = field(
        default=None,
        metadata={
            "help": "Stop training on a rollout once the KL divergence from the policy that generated it exceeds this (nats "
            "per token): its remaining steps change nothing. Default: no early stop."
        },
    )

    def __post_init__(self) -> None:
        problems = self._problems()
        if problems:
            raise ValueError("PPOConfig: " + "; ".join(problems))
        if self.logging_steps is None:
            self.logging_steps = self.steps_per_rollout
        super().__post_init__()

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps on one rollout."""
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def mini_batch_size(self) -> int:
        """Completions in an optimizer step, per rank."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def rollout_size(self) -> int:
        """Completions in a rollout, per rank."""
        return self.mini_batch_size * self.num_mini_batches

    def _problems(self) -> list[str]:
        at_least_one = ["max_completion_length", "rollout_batch_size", "adaptive_kl_horizon", "num_ppo_epochs"]
        at_least_one += ["num_mini_batches"]
        more_than_zero = [
            "temperature",
            "cliprange",
            "cliprange_value",
            "score_clip",
            "target_kl",
            "adaptive_kl_target",
            "value_learning_rate",
        ]
        fractions = ["gamma", "lam"]
        choices = {"kl_estimator": ("k1", "k3"), "score_normalization": ("none", "initial", "running")}

        def values(names: list[str]) -> list[tuple[str, Any]]:
            return [(name, getattr(self, name)) for name in names if getattr(self, name) is not None]

        problems = [f"{name} is {v}; it must be at least 1" for name, v in values(at_least_one) if v < 1]
        problems += [f"{name} is {v}; it must be more than 0" for name, v in values(more_than_zero) if not v > 0]
        problems += [f"{name} is {v}; it must be within 0 and 1" for name, v in values(fractions) if not 0 <= v <= 1]
        problems += [f"{name} is {v}; it must not be negative" for name, v in values(["kl_coef", "vf_coef"]) if v < 0]
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                problems.append(f"{name} is {getattr(self, name)!r}; the choices are {', '.join(valid)}")
        if self.adaptive_kl_target is not None and self.kl_coef == 0:
            problems.append("adaptive_kl_target scales kl_coef, which is 0: set kl_coef to its initial value")
        if self.target_kl is not None and self.fp16:
            problems.append("target_kl skips steps, which fp16 loss scaling does not support: use bf16")
        return problems
