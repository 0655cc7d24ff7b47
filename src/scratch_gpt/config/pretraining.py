"""Settings of `pretrain` and `quickstart`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from scratch_gpt.config.data import TextSettings, TokenizerSettings


@dataclass
class ModelSettings:
    """The architecture: fields of ScratchGPTConfig. What is left out follows from the preset."""

    preset: str = "modern-2m"
    """modern-2m, gpt2, gpt2-medium, modern-30m, ...: see scratch_gpt.model.presets."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    num_hidden_layers: int | None = None
    """Number of blocks."""
    num_attention_heads: int | None = None
    """Number of query heads."""
    num_key_value_heads: int | None = None
    """Number of key/value heads; fewer than query heads is grouped-query attention."""
    intermediate_size: int | None = None
    """Width of the MLP."""
    max_position_embeddings: int | None = None
    """Longest sequence the model takes; the context of training when training.context_length is left out."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Any other field of ScratchGPTConfig, for example --model.overrides.norm_type layernorm."""


@dataclass
class PhaseSettings:
    """One phase of training, with a mixture of its own."""

    name: str
    """Such as pretrain or mid-training."""
    share: float = 1.0
    """Share of the optimizer steps; the shares of all phases make 1."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Weights of the sources, as training.mixture."""


@dataclass
class TrainingSettings:
    """The pretraining loop."""

    context_length: int | None = None
    """Tokens per row; left out: the model's max_position_embeddings."""
    total_batch_size: int = 1024
    """Tokens per optimizer step, over all processes and micro-batches."""
    device_batch_size: int | None = None
    """Rows per forward pass of one process; left out: as many as total_batch_size asks, without accumulation."""
    packing: Literal["concat", "best_fit"] = "concat"
    """concat: rows run on through documents, no padding; best_fit: documents stay whole where they fit into a row."""
    document_mask: bool = False
    """Keep the documents of a row from seeing each other, and restart positions at each."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Share of the tokens by source of the shards, such as {"stories": 0.7, "tales": 0.3}; left out: by size."""
    phases: list[PhaseSettings] = field(default_factory=list)
    """Instead of one mixture, phases one after the other, each with a name, a share of the steps and a mixture."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    schedule: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    """After the warm-up: stable then linear decay (wsd), half a cosine, a straight line, or constant."""
    min_lr_ratio: float | None = None
    """Where the schedule ends, as a share of the peak; left out: 0, for cosine 0.1."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    decay_fraction: float = 0.4
    """Share of the steps that the decay of the wsd schedule takes."""
    batch_warmup_steps: int = 0
    """Steps over which the batch grows to total_batch_size."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon for the matrices of the blocks with adamw for the rest."""
    muon_momentum: float = 0.95
    """Muon: decay of the momentum."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices of the blocks only."""
    beta1: float = 0.9
    """AdamW: decay of the first moment."""
    beta2: float = 0.95
    """AdamW: decay of the second moment."""
    max_grad_norm: float = 1.0
    """The global gradient norm is clipped to this."""
    precision: Literal["auto", "bf16", "fp32", "fp16", "fp8"] = "auto"
    """auto: bf16 or fp32, the faster on this machine, measured at the start; fp16: CUDA, with dynamic loss scaling;
    fp8: CUDA from compute capability 8.9, blocks in float8 and the rest in bf16, needs `pip install scratch-gpt[fp8]`."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of each block; auto: only where it pays within the run, measured. Not with tensor parallelism."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """Recompute in the backward pass: whole blocks, or all but matrix products and attention. Less memory, more time."""
    activation_checkpointing_every: int = 1
    """Recompute every n-th block only."""
    log_every: int = 1
    """Steps between two lines in metrics.jsonl."""
    eval_every: int = 200
    """Steps between two validations."""
    save_every: int = 200
    """Steps between two checkpoints."""
    keep_last: int = 2
    """Number of checkpoints to keep, beside the one with the best validation."""
    keep_every: int | None = None
    """Keep the checkpoints of every n-th step as well."""
    async_save: Literal["auto", "on", "off"] = "auto"
    """Write checkpoints in the background, from a copy in memory; auto: on a GPU, since on a CPU it does not pay."""
    trackers: list[str] | str = "auto"
    """Dashboards that get the metrics, of trackio, tensorboard and wandb: [tensorboard]; [] for none;
    auto: trackio (local, no account) where it is installed. Each is an extra: `pip install scratch-gpt[tensorboard]`."""
    sample_every: int | None = None
    """Steps between two looks at what the model writes, in samples.jsonl; a checkpoint is saved before."""
    sample_prompts: list[str] = field(default_factory=list)
    """Beginnings to continue; left out: the beginning of a document."""
    benchmark_every: int | None = None
    """Steps between two benchmarks with the lm-eval harness, in metrics.jsonl; a checkpoint is saved before."""
    benchmark_tasks: list[str] = field(default_factory=list)
    """Tasks of the harness; left out: next_sentence and word_order, made from the held-out text."""
    benchmark_path: str | None = None
    """Folder of further task files for the harness."""
    benchmark_limit: int = 100
    """Questions of each task."""
    profile_steps: list[int] = field(default_factory=list)
    """First and last step for torch's profiler, such as [10, 13]: a table, and a trace in profile/."""
    memory_snapshot_step: int | None = None
    """CUDA: step whose allocations go to profile/, for https://pytorch.org/memory_viz."""


@dataclass
class GuardSettings:
    """What happens to a step whose loss or gradient is out of line."""

    sigmas: float = 6.0
    """Skip a step whose loss or gradient norm is this many standard deviations above the recent mean; 0: only a step
    that is not finite."""
    window: int = 128
    """Good steps that the mean and the deviation are taken over."""
    max_skips: int = 5
    """Bad steps in a row after which the run goes back to its newest checkpoint and passes over the data in between."""
    max_rollbacks: int = 3
    """Rollbacks in a row after which it gives up."""
    rollback_lr_factor: float = 1.0
    """Multiplies the learning rate at each rollback."""


@dataclass
class ParallelSettings:
    """How the model is spread over processes, beyond what the configuration file of `accelerate launch` says."""

    pipeline: int = 1
    """Processes in a row, each with some of the blocks (see pipeline.yaml); the others are copies with other data."""
    pipeline_schedule: Literal["1f1b", "interleaved1f1b"] = "1f1b"
    """1f1b: one stage for each process; interleaved1f1b: two that lie apart, for less waiting and more communication."""
    pipeline_microbatches: int | None = None
    """Micro-batches of a step; left out: as training.device_batch_size says, or 4 for each process of the pipeline."""
    timeout: float = 1800.0
    """Seconds after which a run of several processes ends that wait for one of them, which is named. Longer than what one
    does alone between two steps: saving, samples, benchmarks."""


@dataclass
class PretrainSettings(TextSettings):
    """Pretrain a model: text to tokenizer to shards to checkpoints. The same command goes on after an interruption."""

    run_dir: str = "runs/pretrain"
    """Folder for everything the run writes."""
    max_steps: int = 600
    """Optimizer steps of the whole run."""
    seed: int = 1337
    """Decides initialisation, data order and sampling."""
    fresh: bool = False
    """Delete what an earlier run left in run_dir and start over."""
    dry_run: bool = False
    """Prepare everything, say what would be trained and how, and stop before the first step."""
    max_hours: float | None = None
    """Save and stop after this time (exit code 75); the same command goes on."""
    init_from: str | None = None
    """Begin with the weights of this saved model, checkpoint or run directory: continued pretraining, as a new run."""
    init_optimizer: bool = False
    """Take the optimizer's state from the checkpoint of init_from as well."""
    tokenizer_path: str | None = None
    """Take this tokenizer instead of training one."""
    data_path: str | None = None
    """Take these shards (of `data prepare`, with the same tokenizer_path) instead of making them from the corpus."""
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    guard: GuardSettings = field(default_factory=GuardSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)


@dataclass
class QuickstartSettings(PretrainSettings):
    """The whole way in a few minutes: tokenizer, shards, pretraining, samples, a reload elsewhere, benchmark, card."""

    run_dir: str = "runs/quickstart"
    """Folder for everything the run writes."""
    max_steps: int | None = None  # type: ignore[assignment]
    """Optimizer steps; left out: as many as fit into `minutes` on this machine, measured."""
    minutes: float = 4.0
    """Aim for this duration of the whole job on a quiet machine."""
