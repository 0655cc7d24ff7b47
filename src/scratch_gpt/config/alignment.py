"""Settings of the alignment recipes: SFT, reward model, DPO, KTO, GRPO, RLOO and PPO."""

from dataclasses import dataclass, field
from typing import Literal

from scratch_gpt.config.fields import setting


@dataclass
class RecipeSettings:
    """What the stages of alignment have in common."""

    model: str = "runs/sft/final"
    """Folder of the model to begin with (or a name on the Hub)."""
    data: str = "bundled"
    """.jsonl, .json or .parquet, a folder that `datasets` saved, or a dataset of the Hub: see the README for its columns;
    bundled: made from the bundled corpus, to try things out."""
    validation_data: str | None = None
    """Likewise, held out; left out: taken from data, see validation_fraction."""
    validation_fraction: float = setting(0.05, more_than=0, below=1)
    """Share of the rows of data that is held out."""
    split: str = "train"
    """Of a dataset."""
    plain_text: Literal["chat", "continue"] = "chat"
    """Prompts and answers that are plain texts: what a user and the assistant say (chat), or texts that go on (continue)."""
    run_dir: str = setting("runs/stage", may_change=True)
    """Folder for everything the run writes."""
    max_steps: int = setting(300, more_than=0, may_change=True)
    """Optimizer steps of the whole run."""
    seed: int = setting(1337, at_least=0)
    """Decides the order of the data and all that is drawn."""
    fresh: bool = setting(False, may_change=True)
    """Delete what an earlier run left in run_dir and start over."""
    max_hours: float | None = setting(None, more_than=0, may_change=True)
    """Save and stop after this time (exit code 75); the same command goes on."""
    lora_rank: int | None = setting(None, more_than=0)
    """Train LoRA adapters of this rank on all linear layers instead of all weights."""
    load_in_4bit: bool = False
    """With lora_rank: hold the frozen matrices in 4 bits (QLoRA; needs `pip install 'scratch-gpt[qlora]'`)."""
    merge_adapters: bool = True
    """Write them into the weights of final/, which is then a model like any other; adapters/ has them apart."""
    trackers: list[str] = setting(default_factory=list, may_change=True)
    """Dashboards that get the metrics, of trackio, tensorboard and wandb."""


@dataclass
class RecipeTrainingSettings:
    """How a stage learns."""

    batch_size: int = setting(16, more_than=0)
    """Rows of one optimizer step, over all processes."""
    device_batch_size: int | None = setting(None, more_than=0)
    """Rows that one process learns from at a time; left out: its whole part of the batch."""
    learning_rate: float = setting(2e-4, more_than=0)
    """At its peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How it falls after the warm-up: to 0, or not at all."""
    warmup_steps: int = setting(10, at_least=0)
    """Optimizer steps in which it rises from 0."""
    weight_decay: float = setting(0.0, at_least=0)
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: float = setting(1.0, more_than=0)
    """Gradients are scaled down to this norm."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the matrix products; weights are fp32 in both."""
    activation_checkpointing: bool = False
    """Less memory, about a fifth slower."""
    max_length: int | None = setting(None, more_than=0)
    """Longer rows are left out, and counted; left out: the model's context."""
    log_every: int = setting(1, more_than=0, may_change=True)
    """Steps between two lines in metrics.jsonl."""
    eval_every: int = setting(100, more_than=0, may_change=True)
    """Steps between two validations."""
    save_every: int = setting(100, more_than=0, may_change=True)
    """Steps between two checkpoints."""
    keep_last: int = setting(2, more_than=0, may_change=True)
    """How many checkpoints to keep."""


@dataclass
class SFTTrainingSettings(RecipeTrainingSettings):
    """How supervised fine-tuning learns."""

    packing: bool = False
    """Put several rows into one of max_length, which do not see each other: faster where lengths differ."""


@dataclass
class SFTSettings(RecipeSettings):
    """Supervised fine-tuning: teach a base model to answer, by the loss of the assistant's tokens alone."""

    model: str = "runs/quickstart/final"
    """Folder of the model to begin with (or a name on the Hub)."""
    run_dir: str = setting("runs/sft", may_change=True)
    """Folder for everything the run writes."""
    sft: SFTTrainingSettings = field(default_factory=SFTTrainingSettings)


@dataclass
class RewardTrainingSettings(RecipeTrainingSettings):
    """How the reward model learns."""

    learning_rate: float = setting(1e-4, more_than=0)
    """At its peak."""
    center_rewards_coefficient: float | None = None
    """Keep the scores of a pair around 0 by this weight on the square of their sum."""


@dataclass
class RewardSettings(RecipeSettings):
    """Reward model: learn from pairs which answer is the better one; gives one score for a conversation."""

    run_dir: str = setting("runs/reward", may_change=True)
    """Folder for everything the run writes."""
    reward: RewardTrainingSettings = field(default_factory=RewardTrainingSettings)


@dataclass
class DPOTrainingSettings(RecipeTrainingSettings):
    """How direct preference optimisation learns."""

    learning_rate: float = setting(2e-5, more_than=0)
    """At its peak."""
    beta: float = setting(0.1, at_least=0)
    """How dear it is to leave the model that it begins with."""
    loss_type: str = "sigmoid"
    """sigmoid (DPO itself), ipo, hinge, robust, ...: those of TRL's DPOConfig."""
    label_smoothing: float = 0.0
    """Share of the pairs that are taken to be the wrong way round."""


@dataclass
class DPOSettings(RecipeSettings):
    """Direct preference optimisation: learn from pairs what to answer, without a reward model."""

    run_dir: str = setting("runs/dpo", may_change=True)
    """Folder for everything the run writes."""
    dpo: DPOTrainingSettings = field(default_factory=DPOTrainingSettings)


@dataclass
class KTOTrainingSettings(RecipeTrainingSettings):
    """How Kahneman-Tversky optimisation learns."""

    learning_rate: float = setting(2e-5, more_than=0)
    """At its peak."""
    beta: float = setting(0.1, at_least=0)
    """How dear it is to leave the model that it begins with."""
    desirable_weight: float = 1.0
    """Weight of the good answers."""
    undesirable_weight: float = 1.0
    """Weight of the bad ones."""


@dataclass
class KTOSettings(RecipeSettings):
    """Kahneman-Tversky optimisation: learn from single answers, each good or bad."""

    run_dir: str = setting("runs/kto", may_change=True)
    """Folder for everything the run writes."""
    kto: KTOTrainingSettings = field(default_factory=KTOTrainingSettings)


@dataclass
class GroupTrainingSettings(RecipeTrainingSettings):
    """How a policy learns from groups of completions of one prompt."""

    batch_size: int = setting(32, more_than=0)
    """Completions of one optimizer step, over all processes: a multiple of num_generations."""
    learning_rate: float = setting(1e-5, more_than=0)
    """At its peak."""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """How it falls after the warm-up: to 0, or not at all."""
    num_generations: int = setting(8, at_least=2)
    """Completions of each prompt, which are compared with one another."""
    num_iterations: int = setting(1, more_than=0)
    """Optimizer steps on the same completions."""
    max_completion_length: int = setting(64, more_than=0)
    """Tokens after which a completion is cut off."""
    temperature: float = setting(1.0, at_least=0)
    """Of sampling, and of every probability that is compared."""
    beta: float = setting(0.05, at_least=0)
    """Coefficient of the KL penalty to the model that it begins with."""
    epsilon: float = 0.2
    """How far the probability ratio may leave 1 with profit."""
    mask_truncated_completions: bool = False
    """Learn nothing from completions that were cut off."""


@dataclass
class GRPOTrainingSettings(GroupTrainingSettings):
    """How group relative policy optimisation learns."""

    loss_type: str = "dapo"
    """grpo, dapo, dr_grpo, bnpo, ...: those of TRL's GRPOConfig."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide a completion's advantage by the deviation of its group's scores, of all scores, or not."""


@dataclass
class OnlineSettings(RecipeSettings):
    """What the stages that draw completions have in common."""

    reward_model: str | None = None
    """Folder of a sequence classifier with one score (its tokenizer may be another)."""
    reward: str | None = None
    """A Python function instead, as module:function: f(prompts, completions, completion_ids, **columns) -> scores;
    left out for the bundled data: 1 for one whole sentence."""


@dataclass
class GRPOSettings(OnlineSettings):
    """Group relative policy optimisation: reinforcement learning without a value function."""

    run_dir: str = setting("runs/grpo", may_change=True)
    """Folder for everything the run writes."""
    grpo: GRPOTrainingSettings = field(default_factory=GRPOTrainingSettings)


@dataclass
class RLOOSettings(OnlineSettings):
    """REINFORCE with a leave-one-out baseline: reinforcement learning, at its simplest."""

    run_dir: str = setting("runs/rloo", may_change=True)
    """Folder for everything the run writes."""
    rloo: GroupTrainingSettings = field(default_factory=GroupTrainingSettings)


@dataclass
class PPOTrainingSettings:
    """How PPO learns; a rollout is `num_mini_batches` times `mini_batch_size` completions."""

    mini_batch_size: int = setting(32, more_than=0)
    """Completions of one optimizer step, over all processes."""
    device_batch_size: int | None = setting(None, more_than=0)
    """Completions that one process learns from at a time; left out: its whole part of a mini-batch."""
    num_mini_batches: int = setting(2, more_than=0)
    """Optimizer steps per pass over a rollout."""
    num_ppo_epochs: int = setting(4, more_than=0)
    """How often each rollout is learnt from."""
    learning_rate: float = setting(1e-5, more_than=0)
    """At its peak; it falls to 0 along a straight line."""
    value_learning_rate: float | None = setting(None, more_than=0)
    """Of the value model; left out: the same. A small or new one has to learn faster than the policy may move."""
    warmup_steps: int = setting(0, at_least=0)
    """Optimizer steps in which the learning rate rises from 0."""
    max_grad_norm: float = setting(1.0, more_than=0)
    """Gradients are scaled down to this norm."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the matrix products; weights are fp32 in both."""
    activation_checkpointing: bool = False
    """Less memory, about a fifth slower."""
    max_prompt_length: int | None = None
    """Longer prompts are left out, and counted; left out: what the model's context leaves."""
    max_completion_length: int = setting(64, more_than=0)
    """Tokens after which a completion is cut off."""
    temperature: float = setting(1.0, at_least=0)
    """Of sampling, and of every probability that is compared."""
    stop_tokens: list[str] | None = None
    """Tokens that end a completion; left out: the end of sequence and the chat template's end of turn."""
    kl_coef: float = 0.05
    """Coefficient of the KL penalty per token."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """Of the KL penalty: k1, unbiased, or k3, which varies less but has another optimum."""
    adaptive_kl_target: float | None = None
    """Steer the coefficient towards this KL divergence (nats per completion); left out: it is fixed."""
    adaptive_kl_horizon: int = 10_000
    """Completions in which the coefficient may adapt."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """Lambda of generalised advantage estimation."""
    cliprange: float = 0.2
    """How far the probability ratio may leave 1 with profit."""
    cliprange_value: float = 0.2
    """How far a value may leave its old self with profit."""
    vf_coef: float = 0.1
    """Coefficient of the value loss."""
    whiten_rewards: bool = False
    """Scale a rollout's rewards per token to variance 1."""
    score_normalization: Literal["none", "initial", "running"] = "none"
    """By mean and deviation of the first rollout's scores, or of all; the latter changes the objective as it goes."""
    score_clip: float | None = None
    """Scores are kept within plus and minus this."""
    missing_eos_penalty: float | None = None
    """Subtracted from the score of a completion that was cut off."""
    target_kl: float | None = None
    """Leave a rollout once the policy is this far (nats per token) from the one that drew it."""
    eval_every: int = setting(200, more_than=0, may_change=True)
    """Optimizer steps between two evaluations on the validation prompts."""
    save_every: int = setting(200, more_than=0, may_change=True)
    """Optimizer steps between two checkpoints; put off to the end of a rollout."""
    keep_last: int = setting(2, more_than=0, may_change=True)
    """How many checkpoints to keep."""


@dataclass
class PPOSettings(OnlineSettings):
    """Reinforcement learning with PPO from a reward model or function. The same command goes on after an interruption."""

    run_dir: str = setting("runs/ppo", may_change=True)
    """Folder for everything the run writes."""
    max_steps: int = setting(800, more_than=0, may_change=True)
    """Optimizer steps of the whole run; a rollout takes num_mini_batches x num_ppo_epochs of them."""
    ppo: PPOTrainingSettings = field(default_factory=PPOTrainingSettings)
