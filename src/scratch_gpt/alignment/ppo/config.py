"""The settings of :class:`~scratch_gpt.alignment.ppo.trainer.PPOTrainer`."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments


@dataclass
class PPOConfig(TrainingArguments):
    """Everything of `transformers.TrainingArguments`, and what PPO adds.

    One optimizer step takes `per_device_train_batch_size` x `gradient_accumulation_steps` completions per process. A
    rollout is `num_mini_batches` times as many, each learnt from `num_ppo_epochs` times: it lasts `num_ppo_epochs` x
    `num_mini_batches` optimizer steps, and checkpoints are put off to its end, from where a resumed run is exact.

    Raises:
        ValueError: numbers out of range, or settings that contradict each other; the message names all of them.
    """

    # Defaults of TrainingArguments that the published implementations of PPO do otherwise.
    learning_rate: float = field(default=3e-6, metadata={"help": "Initial learning rate of AdamW."})
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "Initial learning rate of the value model. Default: that of the policy."}
    )
    adam_epsilon: float = field(default=1e-5, metadata={"help": "Epsilon of AdamW; that of OpenAI's implementation."})
    logging_steps: float | None = field(
        default=None, metadata={"help": "Optimizer steps between two log entries. Default: once per rollout."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "A loss that is not finite is an error."})

    # Rollout
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Longer prompts are left out, and counted. Default: what the model's context leaves."},
    )
    max_completion_length: int = field(default=64, metadata={"help": "Tokens after which a completion is cut off."})
    temperature: float = field(
        default=1.0, metadata={"help": "Of sampling, and of every probability that is compared."}
    )
    stop_tokens: list[str] | None = field(
        default=None,
        metadata={
            "help": "Tokens that end a completion. Default: the tokenizer's and the model's end of sequence and, for "
            "conversations, the chat template's end of turn."
        },
    )
    rollout_batch_size: int = field(
        default=64,
        metadata={"help": "Completions generated and scored at a time, per process; matters for memory only."},
    )

    # Reward
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward where there are several. Default: 1 each."}
    )
    score_normalization: str = field(
        default="none",
        metadata={
            "help": "Subtract the mean score and divide by the standard deviation: 'none'; 'initial', of the first "
            "rollout; or 'running', of all rollouts, which changes the objective as it goes."
        },
    )
    score_clip: float | None = field(default=None, metadata={"help": "Scores are kept within plus and minus this."})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the score of a completion that was cut off."}
    )
    kl_coef: float = field(default=0.05, metadata={"help": "Coefficient of the KL penalty per token."})
    kl_estimator: str = field(
        default="k1",
        metadata={"help": "Of the KL penalty: 'k1', unbiased, or 'k3', which varies less but has another optimum."},
    )
    adaptive_kl_target: float | None = field(
        default=None,
        metadata={
            "help": "Steer the coefficient towards this KL divergence (nats per completion). Default: it is fixed."
        },
    )
    adaptive_kl_horizon: int = field(
        default=10_000, metadata={"help": "Completions in which the coefficient may adapt."}
    )

    # Optimization
    num_ppo_epochs: int = field(default=4, metadata={"help": "How often each rollout is learnt from."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps per pass over a rollout."})
    gamma: float = field(default=1.0, metadata={"help": "Discount per token."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalised advantage estimation."})
    cliprange: float = field(default=0.2, metadata={"help": "How far the probability ratio may leave 1 with profit."})
    cliprange_value: float = field(
        default=0.2, metadata={"help": "How far a value may leave its old self with profit."}
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Coefficient of the value loss."})
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Scale a rollout's advantages to mean 0, variance 1."}
    )
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale a rollout's rewards per token to variance 1."})
    target_kl: float | None = field(
        default=None,
        metadata={
            "help": "Leave a rollout as soon as the policy is this far (nats per token) from the one that drew it. Its "
            "remaining steps pass without an update."
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
        """Optimizer steps."""
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def rows_per_mini_batch(self) -> int:
        """Completions in an optimizer step of one process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def rows_per_rollout(self) -> int:
        """Completions of one process."""
        return self.rows_per_mini_batch * self.num_mini_batches

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
            problems.append("adaptive_kl_target multiplies kl_coef, which is 0: give the coefficient to begin with")
        if self.target_kl is not None and self.fp16:
            problems.append("target_kl leaves steps out, which loss scaling cannot: take bf16 instead of fp16")
        return problems
