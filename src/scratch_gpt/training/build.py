"""Build a pretraining run from its settings: tokenizer, data, starting point, model, strategy, batch sizes, precision.

:func:`build` calls one function for each, in order. A run that has a checkpoint is built to resume from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from scratch_gpt.compute.activation_checkpointing import enable_activation_checkpointing
from scratch_gpt.compute.compile import compile_blocks, uncompile_blocks
from scratch_gpt.compute.float8 import check_num_tokens, use_float8
from scratch_gpt.compute.malloc import keep_freed_memory
from scratch_gpt.compute.precision import check_precision, has_bf16
from scratch_gpt.config import PhaseSettings, PretrainSettings, TrainingSettings
from scratch_gpt.console import print0
from scratch_gpt.data.loader import TrainingData
from scratch_gpt.data.mixture import DataOrder, DataPosition
from scratch_gpt.data.packing import BestFit, pack
from scratch_gpt.data.shards import TokenStream, content_fingerprint, read_manifest
from scratch_gpt.data.tokenizer import load_tokenizer
from scratch_gpt.distributed import context_parallel
from scratch_gpt.distributed.materialize import build_meta_model, build_model, init_weights
from scratch_gpt.distributed.optimizer import build_optimizer
from scratch_gpt.distributed.pipeline import build_pipeline_strategy
from scratch_gpt.distributed.safetensors_reader import load_weights
from scratch_gpt.distributed.setup import build_strategy
from scratch_gpt.distributed.strategy import Strategy
from scratch_gpt.errors import UserError
from scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM
from scratch_gpt.model.loading import build_config
from scratch_gpt.training.autotune import PrecisionChoice, autotune
from scratch_gpt.training.checkpoint import (
    STATE,
    TrainingState,
    checkpoint_problem,
    find_checkpoint,
    load_checkpoint,
    load_optimizer,
    newest_checkpoint,
    read_state,
    saved_weights,
)
from scratch_gpt.training.trainer import BatchSizes, RunData, Trainer, TrainerCallback, TrainUnit

STEP_OVERHEAD = 1.2
"""Time of a full step (optimizer, validation and checkpoints included), relative to its forward and backward pass."""
MIN_STEPS = 30


@dataclass(frozen=True)
class Shards:
    """The token shards of a run, opened."""

    folder: Path
    fingerprint: str
    vocab_size: int
    train: dict[str, TokenStream]
    """By source."""
    validation: dict[str, TokenStream]


@dataclass(frozen=True)
class StartingPoint:
    """Starting point of a run: its newest checkpoint, the saved model of --init-from, or neither."""

    checkpoint: Path | None
    init_from: Path | None
    state: TrainingState | None
    """State of the checkpoint."""

    @property
    def weights(self) -> Path | None:
        """Folder of the weights; None: initialize them."""
        return self.checkpoint or self.init_from


@dataclass
class Pretraining:
    """A run that is ready to train. ``model`` is not on its ranks yet; :meth:`build_trainer` puts it there."""

    settings: PretrainSettings
    run_dir: Path
    tokenizer: Any
    shards: Shards
    start: StartingPoint
    strategy: Strategy
    model: Any
    data: RunData
    precision: PrecisionChoice

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def steps_in(self, seconds: float) -> int:
        """Estimate how many optimizer steps take ``seconds``, from the time measured at the start; a multiple of 10, and
        at least :data:`MIN_STEPS`.
        """
        steps = int(seconds / (self.precision.seconds_per_step * STEP_OVERHEAD))
        return max(MIN_STEPS, steps // 10 * 10)

    def build_trainer(self, callbacks: Sequence[TrainerCallback] = ()) -> Trainer:
        """Put the model on its ranks, initialize or load weights and optimizer, and print the layout."""
        unit = build_train_unit(self.strategy, self.model, self.tokenizer, self.start, self.precision, self.settings)
        layout = self.strategy.describe(unit.model, self.precision.precision, self.shards.fingerprint)
        for number, line in enumerate(layout):
            print0(("layout     " if number == 0 else "           ") + line)
        # after the weights are initialized: every data-parallel rank has its own dropout
        torch.manual_seed(self.settings.seed + self.strategy.rng_rank)
        state = restore_or_create_state(self.start, unit, self.precision, self.shards.fingerprint, self.settings)
        return Trainer(self.settings, self.run_dir, unit, self.data, state, callbacks)


def build(settings: PretrainSettings, run_dir: Path, budget_seconds: float | None = None) -> Pretraining:
    """Build the run of ``settings`` on the tokenizer and the shards that `prepare_tokenizer` and `prepare_data` left.

    Args:
        budget_seconds: expected duration of the run, where ``settings.max_steps`` is None because it follows from it.

    Raises:
        UserError: settings, data, model and processes do not fit together.
    """
    training = settings.training
    keep_freed_memory()  # saves a fifth of a step's time on CPUs
    tokenizer = load_tokenizer(tokenizer_folder(settings, run_dir))
    shards = open_shards(data_folder(settings, run_dir))
    start = find_starting_point(settings, run_dir)
    check_same_shards(start, shards, run_dir)
    strategy = choose_strategy(training, start)
    model = build_or_load_model(settings, tokenizer, strategy, start)
    check_vocabulary(shards, model.config)
    context_length = choose_context_length(training, model.config, strategy, shards)
    train_data = build_train_data(settings, shards, context_length, model.config.vocab_size)
    if settings.parallel.pipeline > 1:
        strategy = build_pipeline_strategy(strategy, settings, model.config, context_length)
    batch_sizes = choose_batch_sizes(training, strategy, context_length)
    data = RunData(train_data, shards.validation, batch_sizes)
    enable_activation_checkpointing(model, training)
    precision = choose_precision(training, strategy, model, start, data, settings.max_steps, budget_seconds)
    run = Pretraining(settings, run_dir, tokenizer, shards, start, strategy, model, data, precision)
    print0(
        f"model      {run.num_parameters:,} parameters, context {context_length}, "
        f"{batch_sizes.sequences * context_length:,} tokens per step on {strategy.world_size} process(es)"
    )
    how = "compiled" if precision.compiled else "eager"
    print0(f"precision  {precision.precision}, {how}: {precision.reason}")
    return run


# ------------------------------------------------------------------------------------------------ tokenizer and data


def tokenizer_folder(settings: PretrainSettings, run_dir: Path) -> Path:
    return run_dir / "tokenizer" if settings.tokenizer_path is None else Path(settings.tokenizer_path)


def data_folder(settings: PretrainSettings, run_dir: Path) -> Path:
    return run_dir / "data" if settings.data_path is None else Path(settings.data_path)


def open_shards(folder: Path) -> Shards:
    manifest = read_manifest(folder)
    train, validation = (
        {name: TokenStream.open(folder, split, manifest, name) for name in manifest["sources"]}
        for split in ("train", "validation")
    )
    return Shards(folder, content_fingerprint(manifest), manifest["vocab_size"], train, validation)


def check_vocabulary(shards: Shards, config: ScratchGPTConfig) -> None:
    if shards.vocab_size > config.vocab_size:
        raise UserError(
            f"{shards.folder} was made with a vocabulary of {shards.vocab_size} tokens, the model has "
            f"{config.vocab_size}: use shards made with the model's own tokenizer"
        )


def build_train_data(settings: PretrainSettings, shards: Shards, context_length: int, vocab_size: int) -> TrainingData:
    """Pack every source into rows of ``context_length`` tokens, and order them by the mixture of each phase."""
    training = settings.training
    if training.phases and training.mixture:
        raise UserError("give --training.mixture or --training.phases, not both: each phase has its own mixture")
    packings = {
        name: pack(stream, training.packing, context_length, training.document_mask, settings.seed, name)
        for name, stream in shards.train.items()
    }
    order = DataOrder(packings, training.phases or [PhaseSettings("pretrain", 1.0, training.mixture)])
    for name, packing in packings.items():
        if isinstance(packing, BestFit):
            print0(
                f"packing    {name}: {packing.sequences_per_epoch:,} sequences per epoch, {packing.waste:.2%} padding"
            )
    if len(packings) > 1:
        for phase in order.phases:
            shares = (f"{name} {float(share):.1%}" for name, share in order.mixtures[phase.name].proportions.items())
            print0(f"mixture    {phase.name} ({phase.share:.0%} of the steps): {', '.join(shares)} of the sequences")
    return TrainingData(shards.train, order, context_length, training.document_mask, vocab_size)


# ------------------------------------------------------------------------------------------------ starting point


def find_starting_point(settings: PretrainSettings, run_dir: Path) -> StartingPoint:
    checkpoint = newest_checkpoint(run_dir)
    if checkpoint is not None:
        return StartingPoint(checkpoint, None, read_state(checkpoint))
    return StartingPoint(None, find_init_from(settings.init_from, settings.init_optimizer), None)


def find_init_from(init_from: str | None, with_optimizer: bool) -> Path | None:
    """The folder that `--init-from` names: a saved model, or the newest model of a run directory.

    Raises:
        UserError: there is none, or it is damaged, or ``with_optimizer`` and there is no optimizer state.
    """
    if init_from is None:
        return None
    named = Path(init_from)
    if (named / STATE).is_dir() and (problem := checkpoint_problem(named)) is not None:
        raise UserError(f"--init-from: {named} is not a valid checkpoint: {problem}")
    newest, problems = find_checkpoint(named)
    for problem in problems:
        print0(problem)
    candidates = [named, named / "final", newest]
    if with_optimizer:
        candidates = [folder for folder in (named, newest) if folder and (folder / STATE).is_dir()]
    for folder in candidates:
        if folder is not None and (folder / "config.json").is_file():
            return folder
    what = "checkpoint with an optimizer" if with_optimizer else "saved model or run"
    raise UserError(f"--init-from: {named} holds no {what}")


def check_same_shards(start: StartingPoint, shards: Shards, run_dir: Path) -> None:
    if start.state is not None and start.state.data != shards.fingerprint:
        raise UserError(
            f"{run_dir} was trained on other token shards than are in {shards.folder} now. Restore those, or start over "
            "with --fresh."
        )


# ------------------------------------------------------------------------------------------------ model and strategy


def choose_strategy(training: TrainingSettings, start: StartingPoint) -> Strategy:
    """The strategy that `accelerate launch` was configured with, checked against what the run needs."""
    strategy = build_strategy()
    precision = start.state.precision if start.state else training.precision
    # A resumed run may drop its compiled blocks under a strategy that cannot compile, so only a new one is checked.
    compiled = start.state is None and training.compile == "on"
    strategy.check(training.optimizer, precision, compiled)
    return strategy


def build_or_load_model(settings: PretrainSettings, tokenizer: Any, strategy: Strategy, start: StartingPoint) -> Any:
    """The float32 model in training mode: saved or newly initialized.

    A model that will be sharded may be too large for one process, so it has no weights yet (it is on the meta device).
    """
    if strategy.is_sharded or settings.parallel.pipeline > 1:
        config = build_config(settings.model, tokenizer)
        model = build_meta_model(ScratchGPTConfig.from_pretrained(start.weights) if start.weights else config)
    elif start.weights is None:
        model = build_model(build_config(settings.model, tokenizer), settings.seed)
    else:
        model = ScratchGPTForCausalLM.from_pretrained(start.weights, dtype=torch.float32)
    model.train()
    return model


def build_train_unit(
    strategy: Strategy,
    model: Any,
    tokenizer: Any,
    start: StartingPoint,
    precision: PrecisionChoice,
    settings: PretrainSettings,
) -> TrainUnit:
    """Shard or replicate the model, give it weights if it has none yet, and build the optimizer."""
    is_empty = next(model.parameters()).is_meta
    parallelized = strategy.parallelize(model, precision.precision)
    if is_empty and start.weights is not None:
        load_weights(model, saved_weights(start.weights))
    elif is_empty:
        init_weights(model, settings.seed)
    wrapped, optimizer = strategy.wrap(parallelized, build_optimizer(model, settings.training))
    return TrainUnit(strategy, wrapped, optimizer, tokenizer)


def restore_or_create_state(
    start: StartingPoint, unit: TrainUnit, precision: PrecisionChoice, data: str, settings: PretrainSettings
) -> TrainingState:
    """Restore optimizer, random number generators and state of the checkpoint; or start at step 0."""
    if start.checkpoint is not None:
        state = load_checkpoint(unit.strategy, start.checkpoint, unit.optimizer)
        print0(f"resumed    {start.checkpoint.name}: {state.step:,} of {settings.max_steps:,} steps are done")
        return state
    if start.init_from is not None and settings.init_optimizer:
        load_optimizer(start.init_from, unit.optimizer)
    return TrainingState(
        step=0,
        tokens=0,
        data=data,
        data_position=DataPosition(),
        precision=precision.precision,
        compiled=precision.compiled,
    )


# ------------------------------------------------------------------------------------------------ sizes


def choose_context_length(
    training: TrainingSettings, config: ScratchGPTConfig, strategy: Strategy, shards: Shards
) -> int:
    """Tokens per sequence: ``training.context_length``. Default: the longest that the model takes."""
    max_length = config.max_position_embeddings
    context_length = training.context_length or max_length
    if config.position_embedding_type == "learned" and context_length > max_length:
        raise UserError(f"--training.context_length is {context_length}, the model has {max_length} learned positions")
    context_parallel.check_context_length(config, context_length, strategy.cp_size)
    for split, streams, min_tokens in (
        ("training", shards.train, context_length + 1),
        ("held-out", shards.validation, 2),
    ):
        num_tokens = sum(map(len, streams.values()))
        if num_tokens < min_tokens:
            raise UserError(
                f"the {split} text has only {num_tokens} tokens, one sequence takes {context_length + 1}: give more text "
                "or a smaller --training.context_length"
            )
    return context_length


def choose_batch_sizes(training: TrainingSettings, strategy: Strategy, context_length: int) -> BatchSizes:
    sequences, remainder = divmod(training.total_batch_size, context_length)
    if remainder or sequences == 0 or sequences % strategy.dp_size:
        raise UserError(
            f"--training.total_batch_size is {training.total_batch_size} tokens; it must be a multiple of "
            f"{context_length} (context length) x {strategy.dp_size} (data-parallel processes)"
        )
    per_rank = sequences // strategy.dp_size
    device_batch_size = strategy.device_batch_size(per_rank, training.device_batch_size)
    if per_rank % device_batch_size:
        raise UserError(
            f"--training.device_batch_size is {device_batch_size}; it must divide the {per_rank} sequences per process "
            "and step"
        )
    return BatchSizes(sequences, device_batch_size, strategy.dp_size)


# ------------------------------------------------------------------------------------------------ precision


def choose_precision(
    training: TrainingSettings,
    strategy: Strategy,
    model: Any,
    start: StartingPoint,
    data: RunData,
    max_steps: int | None,
    budget_seconds: float | None,
) -> PrecisionChoice:
    """Decide the precision and whether blocks are compiled, the same on all ranks; compiles them and adds float8 layers.

    A resumed run keeps the choice of its start, or its losses would change. A new run is measured, unless its model is
    sharded and may be too large for that.
    """
    precision = start.state.precision if start.state is not None else training.precision
    check_precision(precision, strategy.device)
    if precision == "fp8":
        check_num_tokens(data.batch_sizes.device_batch_size, data.train.context_length // strategy.cp_size)
        use_float8(model)
    if start.state is not None:
        return _precision_as_at_start(start.state, strategy, model)
    if strategy.is_sharded:
        return _precision_unmeasured(training, strategy, model)
    return _precision_by_speed(training, strategy, model, data, max_steps, budget_seconds)


def _precision_as_at_start(state: TrainingState, strategy: Strategy, model: Any) -> PrecisionChoice:
    compiled = state.compiled and strategy.can_compile
    if compiled:
        compile_blocks(model)
    reason = "as at the start of the run"
    if state.compiled and not compiled:
        reason += f", except that {strategy.name} cannot compile blocks"
    return PrecisionChoice(state.precision, compiled, 0.0, reason)


def _precision_unmeasured(training: TrainingSettings, strategy: Strategy, model: Any) -> PrecisionChoice:
    compiled = training.compile == "on"
    if compiled:
        compile_blocks(model)
    default = "bf16" if has_bf16(strategy.device) else "fp32"
    shared = [default if training.precision == "auto" else training.precision]
    broadcast_object_list(shared)
    return PrecisionChoice(shared[0], compiled, 0.0, "not measured, since the model is sharded")


def _precision_by_speed(
    training: TrainingSettings,
    strategy: Strategy,
    model: Any,
    data: RunData,
    max_steps: int | None,
    budget_seconds: float | None,
) -> PrecisionChoice:
    sizes = data.batch_sizes
    micro_batches = sizes.sequences // (sizes.device_batch_size * sizes.dp_size)
    first = data.train.order.at_step(DataPosition(), 0, max_steps or 1)
    batch = data.train.read_step(first, sizes.sequences, micro_batches, 0, sizes.dp_size).batches[0]
    model.to(strategy.device)
    choice = autotune(model, batch.to(strategy.device), micro_batches, training, max_steps, budget_seconds)
    shared = [choice]
    broadcast_object_list(shared)  # every rank measured; the main process decides
    if shared[0].compiled != choice.compiled:
        (compile_blocks if shared[0].compiled else uncompile_blocks)(model)
    return shared[0]
