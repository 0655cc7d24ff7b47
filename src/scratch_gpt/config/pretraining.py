"""Settings of `pretrain` and `quickstart`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from scratch_gpt.config.data import TextSettings, TokenizerSettings
from scratch_gpt.config.fields import setting


@dataclass
class ModelSettings:
    """The architecture: fields of ScratchGPTConfig. What is left out follows from the preset."""

    preset: str = "modern-2m"
    """modern-2m, gpt2, gpt2-medium, modern-30m, ...: see scratch_gpt.model.presets."""
    hidden_size: int | None = setting(None, more_than=0)
    """Width of the residual stream."""
    num_hidden_layers: int | None = setting(None, more_than=0)
    """Number of blocks."""
    num_attention_heads: int | None = setting(None, more_than=0)
    """Number of query heads."""
    num_key_value_heads: int | None = setting(None, more_than=0)
    """Number of key/value heads; fewer than query heads is grouped-query attention."""
    intermediate_size: int | None = setting(None, more_than=0)
    """Width of the MLP."""
    max_position_embeddings: int | None = setting(None, more_than=0)
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

    context_length: int | None = setting(None, more_than=0)
    """Tokens per row; left out: the model's max_position_embeddings."""
    total_batch_size: int = setting(1024, more_than=0, may_change=True)
    """Tokens per optimizer step, over all processes and micro-batches."""
    device_batch_size: int | None = setting(None, more_than=0, may_change=True)
    """Rows per forward pass of one process; left out: as many as total_batch_size asks, without accumulation."""
    packing: Literal["concat", "best_fit"] = "concat"
    """concat: rows run on through documents, no padding; best_fit: documents stay whole where they fit into a row."""
    document_mask: bool = False
    """Keep the documents of a row from seeing each other, and restart positions at each."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Share of the tokens by source of the shards, such as {"stories": 0.7, "tales": 0.3}; left out: by size."""
    phases: list[PhaseSettings] = field(default_factory=list)
    """Instead of one mixture, phases one after the other, each with a name, a share of the steps and a mixture."""
    learning_rate: float = setting(3e-3, more_than=0)
    """Peak learning rate."""
    schedule: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    """After the warm-up: stable then linear decay (wsd), half a cosine, a straight line, or constant."""
    min_lr_ratio: float | None = setting(None, at_least=0)
    """Where the schedule ends, as a share of the peak; left out: 0, for cosine 0.1."""
    warmup_steps: int = setting(20, at_least=0)
    """Steps of linear warm-up."""
    decay_fraction: float = setting(0.4, at_least=0)
    """Share of the steps that the decay of the wsd schedule takes."""
    batch_warmup_steps: int = setting(0, at_least=0)
    """Steps over which the batch grows to total_batch_size."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon for the matrices of the blocks with adamw for the rest."""
    muon_momentum: float = setting(0.95, at_least=0, below=1)
    """Muon: decay of the momentum."""
    weight_decay: float = setting(0.1, at_least=0)
    """Decoupled weight decay, on matrices of the blocks only."""
    beta1: float = setting(0.9, at_least=0, below=1)
    """AdamW: decay of the first moment."""
    beta2: float = setting(0.95, at_least=0, below=1)
    """AdamW: decay of the second moment."""
    max_grad_norm: float = setting(1.0, more_than=0)
    """The global gradient norm is clipped to this."""
    precision: Literal["auto", "bf16", "fp32", "fp16", "fp8"] = "auto"
    """auto: bf16 or fp32, the faster on this machine, measured at the start; fp16: CUDA, with dynamic loss scaling;
    fp8: CUDA from compute capability 8.9, blocks in float8 and the rest in bf16, needs `pip install scratch-gpt[fp8]`."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of each block; auto: only where it pays within the run, measured. Not with tensor parallelism."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """Recompute in the backward pass: whole blocks, or all but matrix products and attention. Less memory, more time."""
    activation_checkpointing_every: int = setting(1, more_than=0)
    """Recompute every n-th block only."""
    log_every: int = setting(1, more_than=0, may_change=True)
    """Steps between two lines in metrics.jsonl."""
    eval_every: int = setting(200, more_than=0, may_change=True)
    """Steps between two validations."""
    save_every: int = setting(200, more_than=0, may_change=True)
    """Steps between two checkpoints."""
    keep_last: int = setting(2, more_than=0, may_change=True)
    """Number of checkpoints to keep, beside the one with the best validation."""
    keep_every: int | None = setting(None, more_than=0, may_change=True)
    """Keep the checkpoints of every n-th step as well."""
    async_save: Literal["auto", "on", "off"] = setting("auto", may_change=True)
    """Write checkpoints in the background, from a copy in memory; auto: on a GPU, since on a CPU it does not pay."""
    trackers: list[str] | str = setting("auto", may_change=True)
    """Dashboards that get the metrics, of trackio, tensorboard and wandb: [tensorboard]; [] for none;
    auto: trackio (local, no account) where it is installed. Each is an extra: `pip install scratch-gpt[tensorboard]`."""
    sample_every: int | None = setting(None, more_than=0, may_change=True)
    """Steps between two looks at what the model writes, in samples.jsonl; a checkpoint is saved before."""
    sample_prompts: list[str] = setting(default_factory=list, may_change=True)
    """Beginnings to continue; left out: the beginning of a document."""
    benchmark_every: int | None = setting(None, more_than=0, may_change=True)
    """Steps between two benchmarks with the lm-eval harness, in metrics.jsonl; a checkpoint is saved before."""
    benchmark_tasks: list[str] = setting(default_factory=list, may_change=True)
    """Tasks of the harness; left out: next_sentence and word_order, made from the held-out text."""
    benchmark_path: str | None = setting(None, may_change=True, tracked=False)
    """Folder of further task files for the harness."""
    benchmark_limit: int = setting(100, more_than=0, may_change=True)
    """Questions of each task."""
    profile_steps: list[int] = setting(default_factory=list, may_change=True)
    """First and last step for torch's profiler, such as [10, 13]: a table, and a trace in profile/."""
    memory_snapshot_step: int | None = setting(None, more_than=0, may_change=True)
    """CUDA: step whose allocations go to profile/, for https://pytorch.org/memory_viz."""


@dataclass
class GuardSettings:
    """What happens to a step whose loss or gradient is out of line."""

    sigmas: float = setting(6.0, at_least=0)
    """Skip a step whose loss or gradient norm is this many standard deviations above the recent mean; 0: only a step
    that is not finite."""
    window: int = setting(128, more_than=0)
    """Good steps that the mean and the deviation are taken over."""
    max_skips: int = setting(5, more_than=0)
    """Bad steps in a row after which the run goes back to its newest checkpoint and passes over the data in between."""
    max_rollbacks: int = setting(3, more_than=0)
    """Rollbacks in a row after which it gives up."""
    rollback_lr_factor: float = setting(1.0, more_than=0)
    """Multiplies the learning rate at each rollback."""


@dataclass
class ParallelSettings:
    """How the model is spread over processes, beyond what the configuration file of `accelerate launch` says."""

    pipeline: int = setting(1, more_than=0, may_change=True)
    """Processes in a row, each with some of the blocks (see pipeline.yaml); the others are copies with other data."""
    pipeline_schedule: Literal["1f1b", "interleaved1f1b"] = setting("1f1b", may_change=True)
    """1f1b: one stage for each process; interleaved1f1b: two that lie apart, for less waiting and more communication."""
    pipeline_microbatches: int | None = setting(None, more_than=0, may_change=True)
    """Micro-batches of a step; left out: as training.device_batch_size says, or 4 for each process of the pipeline."""
    timeout: float = setting(1800.0, may_change=True)
    """Seconds after which a run of several processes ends that wait for one of them, which is named. Longer than what one
    does alone between two steps: saving, samples, benchmarks."""


@dataclass
class PretrainSettings(TextSettings):
    """Pretrain a model: text to tokenizer to shards to checkpoints. The same command goes on after an interruption."""

    run_dir: str = setting("runs/pretrain", may_change=True)
    """Folder for everything the run writes."""
    max_steps: int = setting(600, more_than=0, may_change=True, tracked=True)
    """Optimizer steps of the whole run."""
    seed: int = setting(1337, at_least=0, tracked=True)
    """Decides initialisation, data order and sampling."""
    fresh: bool = setting(False, may_change=True)
    """Delete what an earlier run left in run_dir and start over."""
    dry_run: bool = setting(False, may_change=True)
    """Prepare everything, say what would be trained and how, and stop before the first step."""
    max_hours: float | None = setting(None, more_than=0, may_change=True)
    """Save and stop after this time (exit code 75); the same command goes on."""
    init_from: str | None = None
    """Begin with the weights of this saved model, checkpoint or run directory: continued pretraining, as a new run."""
    init_optimizer: bool = False
    """Take the optimizer's state from the checkpoint of init_from as well."""
    tokenizer_path: str | None = None
    """Take this tokenizer instead of training one."""
    data_path: str | None = None
    """Take these shards (of `data prepare`, with the same tokenizer_path) instead of making them from the corpus."""
    tokenizer: TokenizerSettings = setting(default_factory=TokenizerSettings, tracked=True)
    model: ModelSettings = setting(default_factory=ModelSettings, tracked=True)
    training: TrainingSettings = setting(default_factory=TrainingSettings, tracked=True)
    guard: GuardSettings = setting(default_factory=GuardSettings, tracked=True)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)


@dataclass
class QuickstartSettings(PretrainSettings):
    """The whole way in a few minutes: tokenizer, shards, pretraining, samples, a reload elsewhere, benchmark, card."""

    run_dir: str = setting("runs/quickstart", may_change=True)
    """Folder for everything the run writes."""
    max_steps: int | None = setting(None, more_than=0, may_change=True, tracked=True)  # type: ignore[assignment]
    """Optimizer steps; left out: as many as fit into `minutes` on this machine, measured."""
    minutes: float = setting(4.0, more_than=0, may_change=True)
    """Aim for this duration of the whole job on a quiet machine."""
