"""Settings of the alignment recipes: SFT, reward model, DPO, KTO, GRPO, RLOO and PPO."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from scratch_gpt.config.fields import setting


@dataclass
class RecipeSettings:
    """Settings that all alignment recipes share."""

    model: str = setting("runs/sft/final", common=True)
    """Initial model: a folder, or a name on the Hub."""
    data: str = setting("bundled", common=True)
    """File (.jsonl, .json, .parquet), folder saved by `datasets`, or dataset on the Hub; docs/alignment.md lists its columns.
    bundled: examples made from the bundled corpus, to try things out."""
    validation_data: str | None = None
    """Held-out data, in the same formats. Default: held out of data, see validation_fraction."""
    validation_fraction: float = setting(0.05, more_than=0, below=1)
    """Fraction of the rows of data to hold out."""
    split: str = "train"
    """Split of the dataset."""
    plain_text: Literal["chat", "continue"] = "chat"
    """Reading of prompts and completions that are plain text: as user and assistant messages (chat), or as a text and its
    continuation (continue)."""
    run_dir: str = setting("runs/stage", may_change=True, common=True)
    """Folder for everything the run writes."""
    max_steps: int = setting(300, more_than=0, may_change=True, common=True)
    """Optimizer steps of the run."""
    seed: int = setting(1337, at_least=0, common=True)
    """Seed of the data order and of sampling."""
    fresh: bool = setting(False, may_change=True, common=True)
    """Delete the earlier run in run_dir and start over."""
    max_hours: float | None = setting(None, more_than=0, may_change=True)
    """Save and stop after this many hours (exit code 75); the same command resumes. Default: no limit."""
    lora_rank: int | None = setting(None, more_than=0)
    """Train LoRA adapters of this rank on all linear layers. Default: train all weights."""
    load_in_4bit: bool = False
    """With lora_rank: keep the frozen matrices in 4 bits (QLoRA; needs `pip install 'scratch-gpt[qlora]'`)."""
    merge_adapters: bool = True
    """With lora_rank: merge the adapters into the model in final/; adapters/ keeps them separately."""
    trackers: list[str] = setting(default_factory=list, may_change=True)
    """Dashboards that get the metrics, such as [trackio, tensorboard, wandb]. Default: none."""


@dataclass
class RecipeTrainingSettings:
    """Settings of the optimization that the recipes share."""

    batch_size: int = setting(16, more_than=0)
    """Examples per optimizer step, over all processes."""
    device_batch_size: int | None = setting(None, more_than=0)
    """Examples per forward pass of one process. Default: no gradient accumulation."""
    learning_rate: float = setting(2e-4, more_than=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay of the learning rate to 0 after the warm-up, or none (constant)."""
    warmup_steps: int = setting(10, at_least=0)
    """Steps of linear learning-rate warm-up."""
    weight_decay: float = setting(0.0, at_least=0)
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: float = setting(1.0, more_than=0)
    """Clip the gradient norm to this value."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the matrix products; weights are always kept in fp32."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about 20% slower."""
    max_length: int | None = setting(None, more_than=0)
    """Longer examples, in tokens, are skipped and counted. Default: the model's context length."""
    log_every: int = setting(1, more_than=0, may_change=True)
    """Steps between lines in metrics.jsonl."""
    eval_every: int = setting(100, more_than=0, may_change=True)
    """Steps between validations."""
    save_every: int = setting(100, more_than=0, may_change=True)
    """Steps between checkpoints."""
    keep_last: int = setting(2, more_than=0, may_change=True)
    """Number of latest checkpoints to keep."""


@dataclass
class SFTTrainingSettings(RecipeTrainingSettings):
    """Supervised fine-tuning."""

    packing: bool = False
    """Pack several examples into one sequence of max_length, without attention between them; faster if lengths differ."""


@dataclass
class SFTSettings(RecipeSettings):
    """Supervised fine-tuning (SFT) of a base model on conversations; only assistant tokens count in the loss."""

    model: str = setting("runs/quickstart/final", common=True)
    """Initial model: a folder, or a name on the Hub."""
    run_dir: str = setting("runs/sft", may_change=True, common=True)
    """Folder for everything the run writes."""
    sft: SFTTrainingSettings = field(default_factory=SFTTrainingSettings)


@dataclass
class RewardTrainingSettings(RecipeTrainingSettings):
    """Training of the reward model."""

    learning_rate: float = setting(1e-4, more_than=0)
    """Peak learning rate."""
    center_rewards_coefficient: float | None = None
    """Weight of a loss term that centers scores at 0: the squared sum of a pair's scores. Default: no such term."""


@dataclass
class RewardSettings(RecipeSettings):
    """Train a reward model on preference pairs: one score per conversation."""

    run_dir: str = setting("runs/reward", may_change=True, common=True)
    """Folder for everything the run writes."""
    reward: RewardTrainingSettings = field(default_factory=RewardTrainingSettings)


@dataclass
class DPOTrainingSettings(RecipeTrainingSettings):
    """Direct preference optimization."""

    learning_rate: float = setting(2e-5, more_than=0)
    """Peak learning rate."""
    beta: float = setting(0.1, at_least=0)
    """Strength of the KL penalty towards the reference model."""
    loss_type: str = "sigmoid"
    """sigmoid (DPO itself), ipo, hinge, robust, ...: any loss_type of TRL's DPOConfig."""
    label_smoothing: float = 0.0
    """Assumed fraction of pairs with the wrong label."""


@dataclass
class DPOSettings(RecipeSettings):
    """Direct preference optimization (DPO): learn from preference pairs, without a reward model."""

    run_dir: str = setting("runs/dpo", may_change=True, common=True)
    """Folder for everything the run writes."""
    dpo: DPOTrainingSettings = field(default_factory=DPOTrainingSettings)


@dataclass
class KTOTrainingSettings(RecipeTrainingSettings):
    """Kahneman-Tversky optimization."""

    learning_rate: float = setting(2e-5, more_than=0)
    """Peak learning rate."""
    beta: float = setting(0.1, at_least=0)
    """Strength of the KL penalty towards the reference model."""
    desirable_weight: float = 1.0
    """Weight of desirable completions in the loss."""
    undesirable_weight: float = 1.0
    """Weight of undesirable completions in the loss."""


@dataclass
class KTOSettings(RecipeSettings):
    """Kahneman-Tversky optimization (KTO): learn from single completions labeled good or bad."""

    run_dir: str = setting("runs/kto", may_change=True, common=True)
    """Folder for everything the run writes."""
    kto: KTOTrainingSettings = field(default_factory=KTOTrainingSettings)


@dataclass
class GroupTrainingSettings(RecipeTrainingSettings):
    """Policy optimization on groups of completions of one prompt."""

    batch_size: int = setting(32, more_than=0)
    """Completions per optimizer step, over all processes; a multiple of num_generations."""
    learning_rate: float = setting(1e-5, more_than=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """Decay of the learning rate to 0 after the warm-up, or none (constant)."""
    num_generations: int = setting(8, at_least=2)
    """Completions per prompt, compared with one another."""
    num_iterations: int = setting(1, more_than=0)
    """Optimizer steps on the same completions."""
    max_completion_length: int = setting(64, more_than=0)
    """Longest completion, in tokens; longer ones are truncated."""
    temperature: float = setting(1.0, at_least=0)
    """Temperature of sampling, and of all log-probabilities in the loss."""
    beta: float = setting(0.05, at_least=0)
    """Coefficient of the KL penalty towards the reference model."""
    epsilon: float = 0.2
    """Clip range of the probability ratio."""
    mask_truncated_completions: bool = False
    """Exclude truncated completions from the loss."""


@dataclass
class GRPOTrainingSettings(GroupTrainingSettings):
    """Group relative policy optimization."""

    loss_type: str = "dapo"
    """grpo, dapo, dr_grpo, bnpo, ...: any loss_type of TRL's GRPOConfig."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the group's rewards, of the batch's rewards, or by nothing."""


@dataclass
class OnlineSettings(RecipeSettings):
    """Settings of the recipes that generate completions during training."""

    HELP_TITLE: ClassVar[str] = "Rewards"

    reward_model: str | None = setting(None, common=True)
    """Folder of a reward model: a sequence classifier with one score; its tokenizer may differ from the policy's."""
    reward: str | None = setting(None, common=True)
    """A Python function instead, as module:function: f(prompts, completions, completion_ids, **columns) -> scores. Default
    with the bundled data: score 1 for exactly one complete sentence."""


@dataclass
class GRPOSettings(OnlineSettings):
    """Group relative policy optimization (GRPO): reinforcement learning without a value function."""

    run_dir: str = setting("runs/grpo", may_change=True, common=True)
    """Folder for everything the run writes."""
    grpo: GRPOTrainingSettings = field(default_factory=GRPOTrainingSettings)


@dataclass
class RLOOSettings(OnlineSettings):
    """REINFORCE leave-one-out (RLOO): the simplest reinforcement learning, with a leave-one-out baseline."""

    run_dir: str = setting("runs/rloo", may_change=True, common=True)
    """Folder for everything the run writes."""
    rloo: GroupTrainingSettings = field(default_factory=GroupTrainingSettings)


@dataclass
class PPOTrainingSettings:
    """Proximal policy optimization; a rollout is num_mini_batches times mini_batch_size completions."""

    mini_batch_size: int = setting(32, more_than=0)
    """Completions per optimizer step, over all processes."""
    device_batch_size: int | None = setting(None, more_than=0)
    """Completions per forward pass of one process. Default: no gradient accumulation."""
    num_mini_batches: int = setting(2, more_than=0)
    """Optimizer steps per pass over a rollout."""
    num_ppo_epochs: int = setting(4, more_than=0)
    """Passes over each rollout."""
    learning_rate: float = setting(1e-5, more_than=0)
    """Peak learning rate; it decays linearly to 0."""
    value_learning_rate: float | None = setting(None, more_than=0)
    """Peak learning rate of the value model; a small or new one needs more than the policy. Default: learning_rate."""
    warmup_steps: int = setting(0, at_least=0)
    """Steps of linear learning-rate warm-up."""
    max_grad_norm: float = setting(1.0, more_than=0)
    """Clip the gradient norm to this value."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the matrix products; weights are always kept in fp32."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about 20% slower."""
    max_prompt_length: int | None = None
    """Longer prompts, in tokens, are skipped and counted. Default: the model's context minus max_completion_length."""
    max_completion_length: int = setting(64, more_than=0)
    """Longest completion, in tokens; longer ones are truncated."""
    temperature: float = setting(1.0, at_least=0)
    """Temperature of sampling, and of all log-probabilities in the loss."""
    stop_tokens: list[str] | None = None
    """Tokens that end a completion. Default: end of sequence and the chat template's end of turn."""
    kl_coef: float = 0.05
    """Coefficient of the per-token KL penalty towards the reference model."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """Estimator of the KL penalty: k1 (unbiased), or k3 (less variance, but another optimum)."""
    adaptive_kl_target: float | None = None
    """Adapt kl_coef to reach this KL divergence, in nats per completion. Default: kl_coef is fixed."""
    adaptive_kl_horizon: int = 10_000
    """Number of completions over which kl_coef adapts."""
    gamma: float = 1.0
    """Discount factor per token."""
    lam: float = 0.95
    """Lambda of generalized advantage estimation (GAE)."""
    cliprange: float = 0.2
    """PPO clip range of the probability ratio."""
    cliprange_value: float = 0.2
    """Clip range of the value function."""
    vf_coef: float = 0.1
    """Coefficient of the value loss."""
    whiten_rewards: bool = False
    """Scale the per-token rewards of a rollout to variance 1."""
    score_normalization: Literal["none", "initial", "running"] = "none"
    """Normalize scores by mean and deviation of the first rollout (initial) or of all so far (running, which changes the
    objective during training)."""
    score_clip: float | None = None
    """Clip scores to plus and minus this value. Default: no clipping."""
    missing_eos_penalty: float | None = None
    """Subtract this from the score of a truncated completion. Default: no penalty."""
    target_kl: float | None = None
    """Stop optimizing on a rollout when the KL divergence from the policy that generated it exceeds this, in nats per
    token. Default: never."""
    eval_every: int = setting(200, more_than=0, may_change=True)
    """Optimizer steps between evaluations on the validation prompts."""
    save_every: int = setting(200, more_than=0, may_change=True)
    """Optimizer steps between checkpoints, which are saved at the end of a rollout."""
    keep_last: int = setting(2, more_than=0, may_change=True)
    """Number of latest checkpoints to keep."""


@dataclass
class PPOSettings(OnlineSettings):
    """Proximal policy optimization (PPO): reinforcement learning with a value model, from a reward model or function."""

    run_dir: str = setting("runs/ppo", may_change=True, common=True)
    """Folder for everything the run writes."""
    max_steps: int = setting(800, more_than=0, may_change=True, common=True)
    """Optimizer steps of the run; a rollout takes num_mini_batches x num_ppo_epochs of them."""
    ppo: PPOTrainingSettings = field(default_factory=PPOTrainingSettings)
