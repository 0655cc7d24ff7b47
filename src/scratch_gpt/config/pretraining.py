"""Settings of `pretrain` and `quickstart`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from scratch_gpt.config.data import TextSettings, TokenizerSettings
from scratch_gpt.config.fields import setting


@dataclass
class ModelSettings:
    """The architecture. Default of each field: the preset's."""

    preset: str = "modern-2m"
    """Named architecture: modern-2m, gpt2, gpt2-medium, modern-30m, ... (scratch_gpt.model.presets lists them)."""
    hidden_size: int | None = setting(None, more_than=0)
    """Width of the residual stream."""
    num_hidden_layers: int | None = setting(None, more_than=0)
    """Number of transformer blocks."""
    num_attention_heads: int | None = setting(None, more_than=0)
    """Number of query heads."""
    num_key_value_heads: int | None = setting(None, more_than=0)
    """Number of key/value heads; fewer than query heads means grouped-query attention."""
    intermediate_size: int | None = setting(None, more_than=0)
    """Width of the MLP."""
    max_position_embeddings: int | None = setting(None, more_than=0)
    """Longest sequence the model accepts, in tokens."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Any other field of ScratchGPTConfig, for example --model.overrides.norm_type layernorm."""


@dataclass
class PhaseSettings:
    """One phase of training, with its own mixture of sources."""

    name: str
    """Name of the phase, such as pretrain or mid-training."""
    share: float = 1.0
    """Fraction of the optimizer steps; the fractions of all phases add up to 1."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Weights of the sources, as in training.mixture."""


@dataclass
class TrainingSettings:
    """The pretraining loop."""

    context_length: int | None = setting(None, more_than=0)
    """Tokens per training sequence. Default: the model's max_position_embeddings."""
    total_batch_size: int = setting(1024, more_than=0, may_change=True)
    """Tokens per optimizer step, over all processes and micro-batches."""
    device_batch_size: int | None = setting(None, more_than=0, may_change=True)
    """Sequences per forward pass of one process. Default: no gradient accumulation."""
    packing: Literal["concat", "best_fit"] = "concat"
    """concat: cut the concatenated documents into sequences, without padding; best_fit: keep a document in one sequence if
    it fits."""
    document_mask: bool = False
    """Mask attention between the documents of a sequence, and restart positions at each document."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Fraction of the tokens from each source, such as {"stories": 0.7, "tales": 0.3}. Default: by size."""
    phases: list[PhaseSettings] = field(default_factory=list)
    """Consecutive phases, each with its own mixture, instead of one mixture for the run."""
    learning_rate: float = setting(3e-3, more_than=0)
    """Peak learning rate."""
    schedule: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    """Learning rate after the warm-up: constant then linear decay (wsd), half a cosine, linear decay, or constant."""
    min_lr_ratio: float | None = setting(None, at_least=0)
    """Learning rate at the end of the schedule, as a fraction of the peak. Default: 0.1 for cosine, else 0."""
    warmup_steps: int = setting(20, at_least=0)
    """Steps of linear learning-rate warm-up."""
    decay_fraction: float = setting(0.4, at_least=0)
    """Fraction of the steps over which the wsd schedule decays."""
    batch_warmup_steps: int = setting(0, at_least=0)
    """Steps over which the batch size grows to total_batch_size."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: Muon for the matrices of the blocks and AdamW for the rest."""
    muon_momentum: float = setting(0.95, at_least=0, below=1)
    """Muon: decay rate of the momentum."""
    weight_decay: float = setting(0.1, at_least=0)
    """Decoupled weight decay, on the matrices of the blocks only."""
    beta1: float = setting(0.9, at_least=0, below=1)
    """AdamW: decay rate of the first moment."""
    beta2: float = setting(0.95, at_least=0, below=1)
    """AdamW: decay rate of the second moment."""
    max_grad_norm: float = setting(1.0, more_than=0)
    """Clip the global gradient norm to this value."""
    precision: Literal["auto", "bf16", "fp32", "fp16", "fp8"] = "auto"
    """auto: bf16 or fp32, whichever is faster in a measurement at the start; fp16: CUDA only, with dynamic loss scaling;
    fp8: CUDA with compute capability 8.9 or higher, blocks in float8 and the rest in bf16; needs
    `pip install scratch-gpt[fp8]`."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile each block with torch.compile; auto: only if a measurement shows that it saves time within the run. Not used
    with tensor parallelism."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """Recompute activations in the backward pass, for less memory and more time: full: entire blocks; selective: all but
    matrix products and attention."""
    activation_checkpointing_every: int = setting(1, more_than=0)
    """Apply activation checkpointing to every n-th block only."""
    log_every: int = setting(1, more_than=0, may_change=True)
    """Steps between lines in metrics.jsonl."""
    eval_every: int = setting(200, more_than=0, may_change=True)
    """Steps between validations."""
    save_every: int = setting(200, more_than=0, may_change=True)
    """Steps between checkpoints."""
    keep_last: int = setting(2, more_than=0, may_change=True)
    """Number of latest checkpoints to keep, in addition to the one with the best validation loss."""
    keep_every: int | None = setting(None, more_than=0, may_change=True)
    """Also keep the checkpoints of every n-th step. Default: none."""
    async_save: Literal["auto", "on", "off"] = setting("auto", may_change=True)
    """Write checkpoints in the background, from a copy in memory; auto: on GPUs only."""
    trackers: list[str] | str = setting("auto", may_change=True)
    """Dashboards that get the metrics, such as [tensorboard, wandb]; [] for none; auto: trackio (local, no account) if it
    is installed. Each is an extra: `pip install scratch-gpt[tensorboard]`."""
    sample_every: int | None = setting(None, more_than=0, may_change=True)
    """Steps between text samples, written to samples.jsonl; each saves a checkpoint first. Default: no samples."""
    sample_prompts: list[str] = setting(default_factory=list, may_change=True)
    """Prompts to continue in samples. Default: the beginning of a document."""
    benchmark_every: int | None = setting(None, more_than=0, may_change=True)
    """Steps between lm-eval benchmarks, written to metrics.jsonl; each saves a checkpoint first. Default: no benchmarks."""
    benchmark_tasks: list[str] = setting(default_factory=list, may_change=True)
    """lm-eval tasks. Default: next_sentence and word_order, made from the held-out text."""
    benchmark_path: str | None = setting(None, may_change=True, tracked=False)
    """Folder with more lm-eval task files."""
    benchmark_limit: int = setting(100, more_than=0, may_change=True)
    """Number of questions per task."""
    profile_steps: list[int] = setting(default_factory=list, may_change=True)
    """First and last step to profile with torch's profiler, such as [10, 13]; prints a table and writes a trace to profile/."""
    memory_snapshot_step: int | None = setting(None, more_than=0, may_change=True)
    """CUDA: step whose memory allocations are written to profile/, for https://pytorch.org/memory_viz."""


@dataclass
class GuardSettings:
    """The loss-spike guard: skips bad steps and rolls back."""

    sigmas: float = setting(6.0, at_least=0)
    """Skip a step whose loss or gradient norm is more than this many standard deviations above the recent mean; 0: skip only
    steps that are not finite."""
    window: int = setting(128, more_than=0)
    """Number of recent good steps from which the mean and the deviation are computed."""
    max_skips: int = setting(5, more_than=0)
    """Roll back to the newest checkpoint, and skip the data since then, after this many bad steps in a row."""
    max_rollbacks: int = setting(3, more_than=0)
    """Stop with an error after this many rollbacks in a row."""
    rollback_lr_factor: float = setting(1.0, more_than=0)
    """Multiply the learning rate by this at each rollback."""


@dataclass
class ParallelSettings:
    """Pipeline parallelism, and the timeout of a launch. Other sharding: `accelerate launch --config_file`."""

    pipeline: int = setting(1, more_than=0, may_change=True)
    """Number of pipeline stages; the remaining ranks are data-parallel replicas."""
    pipeline_schedule: Literal["1f1b", "interleaved1f1b"] = setting("1f1b", may_change=True)
    """1f1b: one stage per rank; interleaved1f1b: two stages per rank, for a smaller bubble and more communication."""
    pipeline_microbatches: int | None = setting(None, more_than=0, may_change=True)
    """Micro-batches per step. Default: from training.device_batch_size, or 4 per pipeline rank."""
    timeout: float = setting(1800.0, may_change=True)
    """Abort, naming the rank, after this many seconds without progress. Must be longer than saving, samples and benchmarks
    take between two steps."""


@dataclass
class PretrainSettings(TextSettings):
    """Pretrain a model: text to tokenizer to shards to checkpoints. Run the same command again to resume."""

    run_dir: str = setting("runs/pretrain", may_change=True, common=True)
    """Folder for everything the run writes."""
    max_steps: int = setting(600, more_than=0, may_change=True, tracked=True, common=True)
    """Optimizer steps of the run."""
    seed: int = setting(1337, at_least=0, tracked=True, common=True)
    """Seed of the initialization, the data order and sampling."""
    fresh: bool = setting(False, may_change=True, common=True)
    """Delete the earlier run in run_dir and start over."""
    dry_run: bool = setting(False, may_change=True)
    """Prepare everything, print what would be trained and how, and stop before the first step."""
    max_hours: float | None = setting(None, more_than=0, may_change=True)
    """Save and stop after this many hours (exit code 75); the same command resumes. Default: no limit."""
    init_from: str | None = None
    """Start a new run from the weights of this saved model, checkpoint or run directory (continued pretraining). Default:
    random initialization."""
    init_optimizer: bool = False
    """Also load the optimizer state from the checkpoint of init_from."""
    tokenizer_path: str | None = None
    """Use this tokenizer instead of training one."""
    data_path: str | None = None
    """Use these shards (from `data prepare`, with the same tokenizer_path) instead of tokenizing the corpus."""
    tokenizer: TokenizerSettings = setting(default_factory=TokenizerSettings, tracked=True)
    model: ModelSettings = setting(default_factory=ModelSettings, tracked=True)
    training: TrainingSettings = setting(default_factory=TrainingSettings, tracked=True)
    guard: GuardSettings = setting(default_factory=GuardSettings, tracked=True)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)


@dataclass
class QuickstartSettings(PretrainSettings):
    """Everything in a few minutes: tokenizer, shards, pretraining, samples, reload, benchmark, model card."""

    run_dir: str = setting("runs/quickstart", may_change=True, common=True)
    """Folder for everything the run writes."""
    max_steps: int | None = setting(None, more_than=0, may_change=True, tracked=True, common=True)  # type: ignore[assignment]
    """Optimizer steps of the run. Default: as many as fit into `minutes`, by a measurement on this machine."""
    minutes: float = setting(4.0, more_than=0, may_change=True, common=True)
    """Target duration of the entire job, in minutes."""
