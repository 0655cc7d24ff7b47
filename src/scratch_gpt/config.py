"""The settings of every verb: typed dataclasses, filled from a YAML file and dotted command-line overrides.

A verb's settings are one dataclass; the string under a field is its ``--help`` and its documentation. The order of
precedence is default < ``--config FILE.yaml`` < ``--section.field value``. Unknown names are refused with the nearest
valid one. Nothing here imports torch, so that ``--help`` answers at once.
"""

import dataclasses
import difflib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml

from scratch_gpt.errors import UserError
from scratch_gpt.files import write_text

# ------------------------------------------------------------------------------------------------ sections


@dataclass
class SourceSettings:
    """One of several texts: give ``path`` or ``dataset``."""

    path: str | None = None
    """File, folder or glob: .txt, .jsonl, .parquet or .arrow; .txt and .jsonl also as .gz, .zst or .xz."""
    dataset: str | None = None
    """Dataset of the Hugging Face Hub by name, or a local folder that `datasets` saved or loads."""
    configuration: str | None = None
    """Of the dataset, where it has several."""
    split: str = "train"
    """Of the dataset."""
    streaming: bool = False
    """Read the dataset from where it lies instead of downloading it first."""
    column: str = "text"
    """The column (or JSON field) that holds the text."""
    template: str | None = None
    """Text made from several columns instead, for example "{title}: {text}"."""
    validation_path: str | None = None
    """Held-out text in a place of its own; left out: taken from this source, see validation_fraction."""


@dataclass
class TextSettings:
    """Which text, and what is held out of it."""

    corpus: str | None = None
    """File, folder or glob (.txt, .jsonl, .parquet, .arrow); left out: bundled corpus (three novels of Jane Austen)."""
    column: str = "text"
    """The column (or JSON field) of the corpus that holds the text."""
    template: str | None = None
    """Text made from several columns of the corpus instead, for example "{title}: {text}"."""
    sources: dict[str, SourceSettings] = field(default_factory=dict)
    """Several texts instead of one corpus: a name for each, and where it is."""
    validation_corpus: str | None = None
    """Held-out text in a place of its own; left out: taken from the corpus, see validation_fraction."""
    validation_fraction: float = 0.05
    """Share of the documents held out (by hash); of a corpus of under 20 documents, the end of each of them."""
    errors: Literal["strict", "replace"] = "strict"
    """Bytes that are not UTF-8, and NUL: an error, or U+FFFD in their place."""
    on_error: Literal["stop", "skip"] = "stop"
    """A broken record (not JSON, no such column, not UTF-8): stop there, or leave it out and count it."""


@dataclass
class TokenizerSettings:
    """The byte-level BPE tokenizer."""

    vocab_size: int = 2048
    """Number of tokens: the special ones, the 256 bytes and the merges."""
    words: Literal["gpt4", "gpt2"] = "gpt4"
    """Where text is cut before merging: as GPT-4 does (a sign may lead a word, line breaks apart) or as GPT-2 does."""
    digits: Literal[1, 2, 3] = 3
    """Longest run of digits that stays together."""
    max_characters: int = 200_000_000
    """Train on at most this much of the corpus (memory grows with its variety)."""
    max_document_characters: int = 1_000_000
    """Of each document, train on its beginning up to this length."""


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
    final_learning_rate: float | None = None
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
    rollback_learning_rate: float = 1.0
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


# ------------------------------------------------------------------------------------------------ verbs


@dataclass
class TokenizerTrainSettings(TextSettings):
    """Train a byte-level BPE tokenizer on a corpus, or take an existing one."""

    output: str = "runs/tokenizer"
    """Folder for the tokenizer, in the form that AutoTokenizer loads."""
    from_: str | None = None
    """Take this tokenizer (folder, or name on the Hub) instead of training one."""
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)


@dataclass
class TokenizerReportSettings:
    """Compare tokenizers on texts: bytes per token, share of the vocabulary in use, round trip."""

    tokenizers: list[str] = field(default_factory=lambda: ["runs/tokenizer"])
    """Folders of tokenizers (or names on the Hub), as a list: [runs/tokenizer, other/gpt2]."""
    texts: list[str] = field(default_factory=list)
    """Files, folders or globs, each a row of the table; left out: the held-out part of the bundled corpus."""
    column: str = "text"
    """The column (or JSON field) that holds the text."""
    errors: Literal["strict", "replace"] = "strict"
    """What to do with bytes that are not UTF-8."""
    max_characters: int = 5_000_000
    """Of each text, look at this much."""


@dataclass
class DataPrepareSettings(TextSettings):
    """Tokenize texts into shards, with a held-out validation split. The same command goes on after an interruption."""

    tokenizer_path: str = "runs/tokenizer"
    """Folder of a tokenizer, for example one made by `tokenizer train`."""
    output: str = "runs/data"
    """Folder for the shards and their manifest."""
    workers: int | None = None
    """Processes; left out: as many as there are cores. The result is the same for any number."""
    deduplicate: bool = False
    """Keep only the first of documents with the same text, over all sources."""
    decontaminate: list[str] = field(default_factory=list)
    """Evaluation files: documents that share 13 words in a row with any of their texts are left out."""


@dataclass
class DataInspectSettings:
    """Print the manifest of token shards, verify every checksum and decode a few rows."""

    POSITIONAL: ClassVar[str] = "path"
    path: str = "runs/data"
    """Folder of the shards."""
    tokenizer_path: str | None = None
    """Tokenizer to decode sample rows with."""
    rows: int = 2
    """Rows to decode of each source."""


@dataclass
class DatatroveImportSettings:
    """Make token shards from the .ds files that datatrove's DocumentTokenizer wrote."""

    path: str
    """Folder of .ds files with their .ds.index, or one such file."""
    tokenizer_path: str = "runs/tokenizer"
    """Folder of the tokenizer that they were made with."""
    output: str = "runs/data"
    """Folder for the shards and their manifest."""
    name: str = "corpus"
    """Of the source."""
    validation_path: str | None = None
    """Held-out .ds files in a place of their own; left out: taken from the others, see validation_fraction."""
    validation_fraction: float = 0.05
    """Share of the documents held out, by a hash of their tokens."""


@dataclass
class DatatroveExportSettings:
    """Write token shards as .ds files for datatrove's tools, a folder for each source and split."""

    output: str
    """Folder for the .ds, .ds.index and .ds.metadata files."""
    path: str = "runs/data"
    """Folder of the shards."""
    tokenizer_path: str | None = None
    """Tokenizer to name in the metadata."""


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
    resume_from: str | None = None
    """Begin with the weights of this saved model, checkpoint or run directory: continued pretraining, as a new run."""
    resume_optimizer: bool = False
    """Take the optimizer's state from the checkpoint of resume_from as well."""
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
class PlannedTokenizerSettings(TokenizerSettings):
    """The tokenizer of a run that is only planned."""

    vocab_size: int | None = None  # type: ignore[assignment]
    """Number of tokens; left out: the preset's own."""


@dataclass
class PlanSettings(PretrainSettings):
    """Before a run: parameters, FLOPs, memory per device and layout, largest batch, time and cost. Trains nothing."""

    tokenizer: PlannedTokenizerSettings = field(default_factory=PlannedTokenizerSettings)
    devices: int = 1
    """Number of devices."""
    devices_per_node: int = 8
    """Devices of one machine, with a fast network between them: tensor parallelism and hsdp's shards stay inside."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Kind of device; auto: this machine's if device_memory is left out, else cuda."""
    device_memory: str | None = None
    """Memory of a device, such as 80GB or 24GiB; left out: what this machine has."""
    flops: float | None = None
    """Peak FLOP/s of a device in the run's precision, from its data sheet (990e12: H100 SXM, dense bf16)."""
    mfu: float = 0.4
    """Share of the peak that the run is expected to reach."""
    price: float | None = None
    """Price of one device for one hour."""
    tokens: float | None = None
    """Tokens to train on; left out: max_steps times training.total_batch_size."""
    dry_run: bool = False
    """Also take a step of the chosen layout on devices that do not exist, without memory, and count what one holds."""


@dataclass
class DoctorSettings(PretrainSettings):
    """Print the machine, the versions, the devices, and the layout that each process of this launch runs."""


@dataclass
class FindBatchSizeSettings(PretrainSettings):
    """Try real training steps on this machine, with larger and larger device batches, until memory runs out."""

    tokenizer: PlannedTokenizerSettings = field(default_factory=PlannedTokenizerSettings)
    limit_memory: str | None = None
    """Memory that a try may take, such as 4GB; left out: the GPU's, on CPU what is free now."""
    limit_rows: int = 256
    """Largest device batch to try."""


@dataclass
class QuickstartSettings(PretrainSettings):
    """The whole way in a few minutes: tokenizer, shards, pretraining, samples, a reload elsewhere, benchmark, card."""

    run_dir: str = "runs/quickstart"
    """Folder for everything the run writes."""
    max_steps: int | None = None  # type: ignore[assignment]
    """Optimizer steps; left out: as many as fit into `minutes` on this machine, measured."""
    minutes: float = 4.0
    """Aim for this duration of the whole job on a quiet machine."""


@dataclass
class StageSettings:
    """What the stages of alignment have in common."""

    model: str = "runs/sft/final"
    """Folder of the model to begin with (or a name on the Hub)."""
    data: str = "bundled"
    """.jsonl, .json or .parquet, a folder that `datasets` saved, or a dataset of the Hub: see the README for its columns;
    bundled: made from the bundled corpus, to try things out."""
    validation_data: str | None = None
    """Likewise, held out; left out: taken from data, see validation_fraction."""
    validation_fraction: float = 0.05
    """Share of the rows of data that is held out."""
    split: str = "train"
    """Of a dataset."""
    plain_text: Literal["chat", "continue"] = "chat"
    """Prompts and answers that are plain texts: what a user and the assistant say (chat), or texts that go on (continue)."""
    run_dir: str = "runs/stage"
    """Folder for everything the run writes."""
    max_steps: int = 300
    """Optimizer steps of the whole run."""
    seed: int = 1337
    """Decides the order of the data and all that is drawn."""
    fresh: bool = False
    """Delete what an earlier run left in run_dir and start over."""
    max_hours: float | None = None
    """Save and stop after this time (exit code 75); the same command goes on."""
    lora_rank: int | None = None
    """Train LoRA adapters of this rank on all linear layers instead of all weights."""
    load_in_4bit: bool = False
    """With lora_rank: hold the frozen matrices in 4 bits (QLoRA; needs `pip install 'scratch-gpt[qlora]'`)."""
    merge_adapters: bool = True
    """Write them into the weights of final/, which is then a model like any other; adapters/ has them apart."""
    trackers: list[str] = field(default_factory=list)
    """Dashboards that get the metrics, of trackio, tensorboard and wandb."""


@dataclass
class StageTrainingSettings:
    """How a stage learns."""

    batch_size: int = 16
    """Rows of one optimizer step, over all processes."""
    device_batch_size: int | None = None
    """Rows that one process learns from at a time; left out: its whole part of the batch."""
    learning_rate: float = 2e-4
    """At its peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How it falls after the warm-up: to 0, or not at all."""
    warmup_steps: int = 10
    """Optimizer steps in which it rises from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the matrix products; weights are fp32 in both."""
    activation_checkpointing: bool = False
    """Less memory, about a fifth slower."""
    max_length: int | None = None
    """Longer rows are left out, and counted; left out: the model's context."""
    log_every: int = 1
    """Steps between two lines in metrics.jsonl."""
    eval_every: int = 100
    """Steps between two validations."""
    save_every: int = 100
    """Steps between two checkpoints."""
    keep_last: int = 2
    """How many checkpoints to keep."""


@dataclass
class SFTTrainingSettings(StageTrainingSettings):
    """How supervised fine-tuning learns."""

    packing: bool = False
    """Put several rows into one of max_length, which do not see each other: faster where lengths differ."""


@dataclass
class SFTSettings(StageSettings):
    """Supervised fine-tuning: teach a base model to answer, by the loss of the assistant's tokens alone."""

    model: str = "runs/quickstart/final"
    """Folder of the model to begin with (or a name on the Hub)."""
    run_dir: str = "runs/sft"
    """Folder for everything the run writes."""
    sft: SFTTrainingSettings = field(default_factory=SFTTrainingSettings)


@dataclass
class RewardTrainingSettings(StageTrainingSettings):
    """How the reward model learns."""

    learning_rate: float = 1e-4
    """At its peak."""
    center_rewards_coefficient: float | None = None
    """Keep the scores of a pair around 0 by this weight on the square of their sum."""


@dataclass
class RewardSettings(StageSettings):
    """Reward model: learn from pairs which answer is the better one; gives one score for a conversation."""

    run_dir: str = "runs/reward"
    """Folder for everything the run writes."""
    reward: RewardTrainingSettings = field(default_factory=RewardTrainingSettings)


@dataclass
class DPOTrainingSettings(StageTrainingSettings):
    """How direct preference optimisation learns."""

    learning_rate: float = 2e-5
    """At its peak."""
    beta: float = 0.1
    """How dear it is to leave the model that it begins with."""
    loss_type: str = "sigmoid"
    """sigmoid (DPO itself), ipo, hinge, robust, ...: those of TRL's DPOConfig."""
    label_smoothing: float = 0.0
    """Share of the pairs that are taken to be the wrong way round."""


@dataclass
class DPOSettings(StageSettings):
    """Direct preference optimisation: learn from pairs what to answer, without a reward model."""

    run_dir: str = "runs/dpo"
    """Folder for everything the run writes."""
    dpo: DPOTrainingSettings = field(default_factory=DPOTrainingSettings)


@dataclass
class KTOTrainingSettings(StageTrainingSettings):
    """How Kahneman-Tversky optimisation learns."""

    learning_rate: float = 2e-5
    """At its peak."""
    beta: float = 0.1
    """How dear it is to leave the model that it begins with."""
    desirable_weight: float = 1.0
    """Weight of the good answers."""
    undesirable_weight: float = 1.0
    """Weight of the bad ones."""


@dataclass
class KTOSettings(StageSettings):
    """Kahneman-Tversky optimisation: learn from single answers, each good or bad."""

    run_dir: str = "runs/kto"
    """Folder for everything the run writes."""
    kto: KTOTrainingSettings = field(default_factory=KTOTrainingSettings)


@dataclass
class GroupTrainingSettings(StageTrainingSettings):
    """How a policy learns from groups of completions of one prompt."""

    batch_size: int = 32
    """Completions of one optimizer step, over all processes: a multiple of num_generations."""
    learning_rate: float = 1e-5
    """At its peak."""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """How it falls after the warm-up: to 0, or not at all."""
    num_generations: int = 8
    """Completions of each prompt, which are compared with one another."""
    num_iterations: int = 1
    """Optimizer steps on the same completions."""
    max_completion_length: int = 64
    """Tokens after which a completion is cut off."""
    temperature: float = 1.0
    """Of sampling, and of every probability that is compared."""
    beta: float = 0.05
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
class DrawingSettings(StageSettings):
    """What the stages that draw completions have in common."""

    reward_model: str | None = None
    """Folder of a sequence classifier with one score (its tokenizer may be another)."""
    reward: str | None = None
    """A Python function instead, as module:function: f(prompts, completions, completion_ids, **columns) -> scores;
    left out for the bundled data: 1 for one whole sentence."""


@dataclass
class GRPOSettings(DrawingSettings):
    """Group relative policy optimisation: reinforcement learning without a value function."""

    run_dir: str = "runs/grpo"
    """Folder for everything the run writes."""
    grpo: GRPOTrainingSettings = field(default_factory=GRPOTrainingSettings)


@dataclass
class RLOOSettings(DrawingSettings):
    """REINFORCE with a leave-one-out baseline: reinforcement learning, at its simplest."""

    run_dir: str = "runs/rloo"
    """Folder for everything the run writes."""
    rloo: GroupTrainingSettings = field(default_factory=GroupTrainingSettings)


@dataclass
class PPOTrainingSettings:
    """How PPO learns; a rollout is `mini_batches` times `mini_batch_size` completions."""

    mini_batch_size: int = 32
    """Completions of one optimizer step, over all processes."""
    device_batch_size: int | None = None
    """Completions that one process learns from at a time; left out: its whole part of a mini-batch."""
    mini_batches: int = 2
    """Optimizer steps per pass over a rollout."""
    epochs: int = 4
    """How often each rollout is learnt from."""
    learning_rate: float = 1e-5
    """At its peak; it falls to 0 along a straight line."""
    value_learning_rate: float | None = None
    """Of the value model; left out: the same. A small or new one has to learn faster than the policy may move."""
    warmup_steps: int = 0
    """Optimizer steps in which the learning rate rises from 0."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the matrix products; weights are fp32 in both."""
    activation_checkpointing: bool = False
    """Less memory, about a fifth slower."""
    max_prompt_length: int | None = None
    """Longer prompts are left out, and counted; left out: what the model's context leaves."""
    max_completion_length: int = 64
    """Tokens after which a completion is cut off."""
    temperature: float = 1.0
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
    eval_every: int = 200
    """Optimizer steps between two evaluations on the validation prompts."""
    save_every: int = 200
    """Optimizer steps between two checkpoints; put off to the end of a rollout."""
    keep_last: int = 2
    """How many checkpoints to keep."""


@dataclass
class PPOSettings(DrawingSettings):
    """Reinforcement learning with PPO from a reward model or function. The same command goes on after an interruption."""

    run_dir: str = "runs/ppo"
    """Folder for everything the run writes."""
    max_steps: int = 800
    """Optimizer steps of the whole run; a rollout takes mini_batches x epochs of them."""
    ppo: PPOTrainingSettings = field(default_factory=PPOTrainingSettings)


@dataclass
class EvaluateSettings:
    """Measure a saved model: validation bits per byte and a sentence benchmark through the lm-eval harness."""

    POSITIONAL: ClassVar[str] = "model"
    model: str = "runs/quickstart/final"
    """Folder of a saved model (or a name on the Hub)."""
    text: str | None = None
    """Text file to measure on; left out: the held-out part of the bundled corpus."""
    errors: Literal["strict", "replace"] = "strict"
    """What to do with bytes that are not UTF-8."""
    limit: int = 200
    """Questions per task."""
    seed: int = 1337
    """Decides how the questions are drawn."""
    output: str | None = None
    """Write the results to this JSON file as well."""


@dataclass
class GenerateSettings:
    """Continue a prompt."""

    POSITIONAL: ClassVar[str] = "model"
    model: str = "runs/quickstart/final"
    """Folder of a saved model (or a name on the Hub)."""
    prompt: str = "It was"
    """Text to continue."""
    max_new_tokens: int = 120
    """Length of each continuation, in tokens."""
    temperature: float = 0.8
    """0 takes the likeliest token each time."""
    top_k: int = 50
    """Sample from the k likeliest tokens only; 0: from all."""
    num_return_sequences: int = 1
    """How many continuations."""
    seed: int = 1337
    """Decides the samples."""


@dataclass
class ExportSettings:
    """Write a saved model as a stock class of transformers, for tools that do not know ours: same logits."""

    POSITIONAL: ClassVar[str] = "model"
    model: str = "runs/quickstart/final"
    """Folder of a saved model; may stand alone after the verb."""
    to: Literal["auto", "gpt2", "llama", "qwen3", "qwen2", "mistral", "smollm3"] = "auto"
    """The architecture; auto: the first that can express the model."""
    output: str = "runs/exported"
    """Folder for the result; it must not exist."""
    verify: bool = True
    """Load both afterwards, one after the other, and compare their logits."""


@dataclass
class ImportSettings:
    """Read a saved GPT-2, Llama, Mistral, Qwen2, Qwen3 or SmolLM3 as a ScratchGPT model: same logits."""

    POSITIONAL: ClassVar[str] = "path"
    path: str = "runs/exported"
    """Folder of the saved model; may stand alone after the verb."""
    output: str = "runs/imported"
    """Folder for the result; it must not exist."""
    verify: bool = True
    """Load both afterwards, one after the other, and compare their logits."""


# ------------------------------------------------------------------------------------------------ reading and writing

Settings = TypeVar("Settings")


def parse_settings(settings_class: type[Settings], arguments: Sequence[str], prog: str) -> Settings:
    """Command-line words to a filled ``settings_class``; prints help and exits for ``--help``.

    Raises:
        UserError: an unknown name (with the nearest valid one), or a value of the wrong type.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

    class Parser(jsonargparse.ArgumentParser):
        def format_help(
            self, *args: Any, **kwargs: Any
        ) -> str:  # --run-dir and --section.field_name, as the documentation writes them
            help_text: str = super().format_help(*args, **kwargs)
            return re.sub(r"--[a-z_]+(?![\w.])", lambda name: name.group().rstrip("_").replace("_", "-"), help_text)

    parser = Parser(
        prog=prog,
        usage=f"{prog} [--config FILE.yaml] [--setting value ...]",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    parser.add_class_arguments(settings_class)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parser warns of its own future versions
            parsed = parser.instantiate(parser.parse_args(_normalise(arguments, settings_class)))
    except jsonargparse.ArgumentError as error:
        raise UserError(_explain(str(error), _all_names(settings_class), prog)) from error
    settings = settings_class(**{f.name: parsed[f.name] for f in dataclasses.fields(settings_class)})  # type: ignore[arg-type]
    check_limits(settings)
    return settings


# Smallest value allowed, by field name; "more than 0" where 0 itself makes no sense.
_AT_LEAST = {"warmup_steps": 0, "weight_decay": 0, "beta1": 0, "beta2": 0, "decay_fraction": 0, "temperature": 0}
_AT_LEAST |= {"top_k": 0, "rows": 0, "seed": 0, "batch_warmup_steps": 0, "final_learning_rate": 0, "muon_momentum": 0}
_AT_LEAST |= {"sigmas": 0, "beta": 0, "num_generations": 2}
_BELOW_ONE = {"beta1", "beta2", "mfu", "muon_momentum", "validation_fraction"}
_MORE_THAN_ZERO = {"max_steps", "minutes", "max_characters", "hidden_size", "num_hidden_layers", "num_attention_heads"}
_MORE_THAN_ZERO |= {"num_key_value_heads", "intermediate_size", "max_position_embeddings", "context_length"}
_MORE_THAN_ZERO |= {"total_batch_size", "device_batch_size", "learning_rate", "max_grad_norm", "log_every"}
_MORE_THAN_ZERO |= {"value_learning_rate"}
_MORE_THAN_ZERO |= {"eval_every", "save_every", "keep_last", "limit", "max_new_tokens", "num_return_sequences"}
_MORE_THAN_ZERO |= {"workers", "max_document_characters"}
_MORE_THAN_ZERO |= {"validation_fraction", "window", "max_skips", "max_rollbacks", "rollback_learning_rate"}
_MORE_THAN_ZERO |= {"activation_checkpointing_every", "max_hours", "keep_every"}
_MORE_THAN_ZERO |= {"pipeline", "pipeline_microbatches"}
_MORE_THAN_ZERO |= {"sample_every", "benchmark_every", "benchmark_limit", "memory_snapshot_step"}
_MORE_THAN_ZERO |= {
    "mini_batch_size",
    "mini_batches",
    "epochs",
    "lora_rank",
    "batch_size",
    "max_length",
    "num_iterations",
}
_MORE_THAN_ZERO |= {"max_completion_length"}
_MORE_THAN_ZERO |= {"devices", "devices_per_node", "flops", "mfu", "price", "tokens", "limit_rows"}


# Sections whose keys the user chooses.
FREE_KEYS = ("model.overrides.", "training.mixture.")


def check_limits(settings: Any) -> None:
    """Raises one UserError that names every number that is out of range."""
    problems = []
    for name, value in flatten(settings).items():
        field_name = name.rsplit(".", 1)[-1]
        if isinstance(value, bool) or not isinstance(value, int | float) or name.startswith(FREE_KEYS):
            continue
        if field_name in _MORE_THAN_ZERO and not value > 0:
            problems.append(f"--{name} is {value}; it must be more than 0")
        if field_name in _AT_LEAST and not value >= _AT_LEAST[field_name]:
            problems.append(f"--{name} is {value}; it must be at least {_AT_LEAST[field_name]}")
        if field_name in _BELOW_ONE and not value < 1:
            problems.append(f"--{name} is {value}; it must be below 1")
    if problems:
        raise UserError("\n".join(problems))


_BYTES = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_BYTES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str, name: str) -> int:
    """``80GB`` (10^9 bytes each), ``24GiB`` (2^30 each), ``512 MB`` or a plain number of bytes.

    Raises:
        UserError: anything else; it calls the setting ``name``.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if match is None or match.group(2).upper() not in _BYTES or not float(match.group(1)):
        raise UserError(f"--{name} is {text!r}; give an amount of memory such as 80GB, 24GiB or 512MB")
    return int(float(match.group(1)) * _BYTES[match.group(2).upper()])


def save_settings(settings: Any, path: Path) -> None:
    """Write ``settings`` as a YAML file that ``--config`` takes."""
    write_text(path, yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False))


def flatten(settings: Any) -> dict[str, Any]:
    """``{"training.learning_rate": 0.004, ...}``: every field by the name it has on the command line."""

    def walk(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in values.items():
            if isinstance(value, dict) and value:
                flat |= walk(f"{prefix}{key}.", value)
            else:
                flat[prefix + key] = value
        return flat

    return walk("", settings if isinstance(settings, dict) else dataclasses.asdict(settings))


def _normalise(arguments: Sequence[str], settings_class: Any) -> list[str]:
    """``--run-dir`` is ``--run_dir``, ``--fresh`` alone is ``--fresh=true``, and a first word alone is the verb's object."""
    positional = getattr(settings_class, "POSITIONAL", None)
    if positional is not None and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{positional}", *arguments]
    switches = {f"--{f.name}" for f in dataclasses.fields(settings_class) if f.type is bool}
    words: list[str] = []
    for position, word in enumerate(arguments):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            name = "--from_" if name == "--from" else name  # a field cannot be called from
            word = "--" + name[2:].replace("-", "_") + equals + value
            following = arguments[position + 1 : position + 2]
            if word in switches and (not following or following[0].startswith("--")):
                word += "=true"
        words.append(word)
    return words


def _all_names(settings_class: Any) -> list[str]:
    names = ["config", "help"]
    for f in dataclasses.fields(settings_class):
        names.append(f.name)
        if dataclasses.is_dataclass(f.type):
            names += [f"{f.name}.{name}" for name in _all_names(f.type)[2:]]
    return names


def _explain(message: str, names: list[str], prog: str) -> str:
    """The parser's complaint, with the nearest valid name where a name is unknown."""
    message = re.sub(r"^Parser key \"(.+?)\":\s*", r"--\1: ", message.strip())
    message = re.sub(r"typing\.|<class '(\w+)'>", r"\1", message)
    optional = re.match(r"(--[\w.]+): .*?Subtypes: \[(\w+), NoneType\].*Given value: (.*)", message, flags=re.DOTALL)
    if optional:
        message = "{}: Expected a {}. Got value: {}".format(*optional.groups())
    unknown = re.search(r"unrecognized arguments: -*([\w.]+)|Option '([\w.]+)' is not accepted", message)
    in_group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    if unknown:
        name = unknown.group(1) or unknown.group(2)
    elif in_group:
        name = f"{in_group.group(1)}.{in_group.group(2)}"
    else:
        return f"{message}\nSee {prog} --help."
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown setting {name!r}.{hint} See {prog} --help."


def nearest_or_refuse(name: str, valid: list[str]) -> str:
    """Never returns a guess: raises a UserError that names the nearest of ``valid``."""
    nearest = difflib.get_close_matches(name, valid, n=1, cutoff=0.4)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise UserError(f"unknown verb {name!r}.{hint} The verbs are: {', '.join(valid)}.")
