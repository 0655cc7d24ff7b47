"""Pretraining: text to tokenizer to shards to checkpoints to ``final/``.

    scratch-gpt pretrain --run-dir runs/mine --corpus book.txt --max-steps 1000
    accelerate launch --num_processes 8 -m scratch_gpt pretrain --config pretrain.yaml

This file makes what is not there yet and finds what is; the training itself is in ``loop.py``.
"""

from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list

from scratch_gpt.compute.activation_checkpointing import enable_activation_checkpointing
from scratch_gpt.compute.compile import compile_blocks, uncompile_blocks
from scratch_gpt.compute.float8 import check_tokens, use_float8
from scratch_gpt.compute.malloc import keep_freed_memory
from scratch_gpt.compute.precision import check_precision, has_bf16
from scratch_gpt.config import PhaseSettings, PretrainSettings
from scratch_gpt.console import print0
from scratch_gpt.data.loader import TrainingData
from scratch_gpt.data.mixture import DataOrder, DataPosition
from scratch_gpt.data.packing import BestFit, pack
from scratch_gpt.data.prepare import prepare, summary
from scratch_gpt.data.shards import TokenStream, content_fingerprint, read_manifest
from scratch_gpt.data.sources import split_documents
from scratch_gpt.data.tokenizer import fingerprint, load_tokenizer, save_tokenizer, train_tokenizer
from scratch_gpt.distributed import context_parallel
from scratch_gpt.distributed.launch import launch_state, shutdown
from scratch_gpt.distributed.materialize import build_model, empty_model, init_weights
from scratch_gpt.distributed.optimizer import build_optimizer
from scratch_gpt.distributed.optimizer import describe as describe_groups
from scratch_gpt.distributed.pipeline import build_pipeline_strategy
from scratch_gpt.distributed.safetensors_reader import load_weights
from scratch_gpt.distributed.setup import build_strategy
from scratch_gpt.distributed.strategy import Strategy
from scratch_gpt.errors import UserError
from scratch_gpt.files import disk_errors, new_folder
from scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM
from scratch_gpt.model.loading import build_config
from scratch_gpt.training.autotune import PrecisionChoice, autotune
from scratch_gpt.training.checkpoint import (
    STATE,
    TrainingState,
    find_checkpoint,
    load_checkpoint,
    load_optimizer,
    newest_checkpoint,
    problem_with,
    read_state,
    save_model,
    saved_weights,
    unsharded_model,
    weight_tensors,
)
from scratch_gpt.training.lr_schedule import learning_rate
from scratch_gpt.training.metrics import read_events
from scratch_gpt.training.monitor import Looks, check_monitoring
from scratch_gpt.training.out_of_memory import is_out_of_memory, out_of_memory_advice
from scratch_gpt.training.run_directory import has_trained, record_settings, run_directory, stored_settings
from scratch_gpt.training.spike_guard import summarize_events
from scratch_gpt.training.trainer import BatchSizes, Trainer


def pretrain_command(settings: PretrainSettings, looks: Looks | None = None) -> None:
    """`scratch-gpt pretrain`; ``looks`` at the model on the way come from rooms that this one does not know."""
    state = launch_state(settings.parallel.timeout)
    check_precision(settings.training.precision, state.device)
    check_monitoring(settings.training, state.device)
    # One process looks at the run directory and holds its lock; the others wait until it is ready.
    if state.is_main_process:
        with run_directory(settings) as run_dir:
            if (run_dir / "final").is_dir() and stored_settings(run_dir).get("max_steps") == settings.max_steps:
                print0(f"{run_dir}/final is finished ({settings.max_steps:,} steps). --fresh starts over.")
                return
            if not (settings.dry_run and has_trained(run_dir)):
                record_settings(run_dir, settings)
            prepare_tokenizer(settings, run_dir)
            prepare_data(settings, run_dir)
            state.wait_for_everyone()
            _train(settings, run_dir, looks)
    else:
        state.wait_for_everyone()
        _train(settings, Path(settings.run_dir), looks)


def _train(settings: PretrainSettings, run_dir: Path, looks: Looks | None) -> None:
    try:
        pretraining = Pretraining(settings, run_dir, looks=looks)
        if settings.dry_run:
            pretraining.describe()
        else:
            pretraining.run()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(out_of_memory_advice(error, settings)) from error


def prepare_tokenizer(settings: PretrainSettings, run_dir: Path) -> None:
    """Train the tokenizer that the run directory does not have yet."""
    path = tokenizer_folder(settings, run_dir)
    if settings.tokenizer_path is None and not path.is_dir():
        train, _, _ = split_documents(settings)
        tokenizer = train_tokenizer(train, settings.tokenizer)
        with disk_errors(str(path)), new_folder(path) as folder:
            save_tokenizer(tokenizer, folder)
    print0(f"tokenizer  {len(load_tokenizer(path)):,} tokens in {path}")


def prepare_data(settings: PretrainSettings, run_dir: Path) -> None:
    """Make the shards that the run directory does not have yet."""
    tokenizer_path = tokenizer_folder(settings, run_dir)
    if settings.data_path is None:
        manifest = prepare(settings, tokenizer_path, data_folder(settings, run_dir))
    else:
        manifest = read_manifest(Path(settings.data_path))
        if manifest["tokenizer"] != fingerprint(tokenizer_path):
            raise UserError(f"{settings.data_path} was made with another tokenizer than {tokenizer_path}")
    print0(f"data       {summary(manifest)}")


def tokenizer_folder(settings: PretrainSettings, run_dir: Path) -> Path:
    return run_dir / "tokenizer" if settings.tokenizer_path is None else Path(settings.tokenizer_path)


def data_folder(settings: PretrainSettings, run_dir: Path) -> Path:
    return run_dir / "data" if settings.data_path is None else Path(settings.data_path)


def find_origin(settings: PretrainSettings) -> Path | None:
    """The folder that `--init-from` names: a saved model, or the newest model of a run directory.

    Raises:
        UserError: there is none, or it is damaged, or it has no optimizer state where that is asked for.
    """
    if settings.init_from is None:
        return None
    named = Path(settings.init_from)
    if (named / STATE).is_dir() and (problem := problem_with(named)) is not None:
        raise UserError(f"--init-from: {named} is not a valid checkpoint: {problem}")
    newest, problems = find_checkpoint(named)
    for problem in problems:
        print0(problem)
    candidates = [named, named / "final", newest]
    if settings.init_optimizer:
        candidates = [folder for folder in (named, newest) if folder and (folder / STATE).is_dir()]
    for folder in candidates:
        if folder is not None and (folder / "config.json").is_file():
            return folder
    what = "checkpoint with an optimizer" if settings.init_optimizer else "saved model or run"
    raise UserError(f"--init-from: {named} holds no {what}")


STEP_OVERHEAD = 1.2
"""A whole step over its forward and backward pass: optimizer, validation, checkpoints."""
FEWEST_STEPS = 30


class Pretraining:
    """One run: built from its settings, or from its newest valid checkpoint where there is one.

    ``settings.max_steps`` may still be None here, with ``budget_seconds`` to say how long the run will be about.
    """

    def __init__(
        self,
        settings: PretrainSettings,
        run_dir: Path,
        budget_seconds: float | None = None,
        looks: Looks | None = None,
    ):
        self.settings, self.run_dir, self.budget_seconds, self.looks = settings, run_dir, budget_seconds, looks
        keep_freed_memory()  # a fifth of a step's time on CPUs
        self.tokenizer = load_tokenizer(tokenizer_folder(settings, run_dir))
        folder = data_folder(settings, run_dir)
        manifest = read_manifest(folder)
        self.data_fingerprint = content_fingerprint(manifest)
        self.train_streams, self.validation_streams = (
            {name: TokenStream.open(folder, split, manifest, name) for name in manifest["sources"]}
            for split in ("train", "validation")
        )

        self.checkpoint = newest_checkpoint(run_dir)
        self.origin = find_origin(settings) if self.checkpoint is None else None
        self.strategy = build_strategy()
        self.begun = None if self.checkpoint is None else read_state(self.checkpoint)
        asked, begun = settings.training, self.begun
        compiled = begun is None and asked.compile == "on"  # what has begun goes on without, if need be
        self.strategy.check(asked.optimizer, begun.precision if begun else asked.precision, compiled)
        self.source = self.checkpoint or self.origin
        # Too large a model for one process is spread before it is filled.
        self.empty = self.strategy.is_sharded or settings.parallel.pipeline > 1
        if self.empty:
            config = build_config(settings.model, self.tokenizer)
            self.model = empty_model(ScratchGPTConfig.from_pretrained(self.source) if self.source else config)
        elif self.source is None:
            self.model = build_model(build_config(settings.model, self.tokenizer), settings.seed)
        else:
            self.model = ScratchGPTForCausalLM.from_pretrained(self.source, dtype=torch.float32)
        self.model.train()
        if manifest["vocab_size"] > self.model.config.vocab_size:
            raise UserError(
                f"{folder} was made with a vocabulary of {manifest['vocab_size']} tokens, the model has "
                f"{self.model.config.vocab_size}: take the shards of the model's own tokenizer"
            )

        self.context_length = self._context_length()
        self.order = self._order()
        self.data = TrainingData(
            self.train_streams,
            self.order,
            self.context_length,
            settings.training.document_mask,
            self.model.config.vocab_size,
        )
        if settings.parallel.pipeline > 1:
            self.strategy = build_pipeline_strategy(self.strategy, settings, self.model.config, self.context_length)
        self.shape = self._batch_shape(self.strategy.dp_size)
        enable_activation_checkpointing(self.model, settings.training)
        self.precision_choice = self._choose_precision()
        print0(
            f"model      {self.num_parameters:,} parameters, context {self.context_length}, "
            f"{self.shape.rows * self.context_length:,} tokens a step on {self.strategy.world_size} process(es)"
        )
        how = "compiled" if self.precision_choice.compiled else "eager"
        print0(f"arithmetic {self.precision_choice.precision}, {how}: {self.precision_choice.reason}")

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def steps_in(self, seconds: float) -> int:
        """How many optimizer steps fit into ``seconds``, as measured at the start; at least :data:`FEWEST_STEPS`."""
        steps = int(seconds / (self.precision_choice.seconds_per_step * STEP_OVERHEAD))
        return max(FEWEST_STEPS, steps // 10 * 10)

    def run(self) -> None:
        """Train to the last step and write ``final/``; see :meth:`Loop.run` for what may end it before."""
        strategy = self.strategy
        model = strategy.parallelize(self.model, self.precision_choice.precision)
        if self.empty and self.source is not None:
            load_weights(self.model, saved_weights(self.source))
        elif self.empty:
            init_weights(self.model, self.settings.seed)
        model, optimizer = strategy.wrap(model, build_optimizer(self.model, self.settings.training))
        for number, line in enumerate(strategy.describe(model, self.precision_choice.precision, self.data_fingerprint)):
            print0(("layout     " if number == 0 else "           ") + line)
        torch.manual_seed(self.settings.seed + strategy.rng_rank)  # each part of the data has dropout of its own
        state = TrainingState(
            step=0,
            tokens=0,
            data=self.data_fingerprint,
            cursor=DataPosition(),
            precision=self.precision_choice.precision,
            compiled=self.precision_choice.compiled,
        )
        if self.checkpoint is not None:
            state = load_checkpoint(strategy, self.checkpoint, optimizer)
            print0(f"resumed    {self.checkpoint.name}: {state.step:,} of {self.settings.max_steps:,} steps are done")
        elif self.origin is not None and self.settings.init_optimizer:
            load_optimizer(self.origin, optimizer)
        trainer = Trainer(
            self.settings,
            self.run_dir,
            strategy,
            model,
            self.tokenizer,
            optimizer,
            self.data,
            self.validation_streams,
            self.shape,
            state,
            self.looks,
        )
        with trainer.watchdog as watchdog:
            trainer.run()
            read = (f"{name} {epochs:.2f} times" for name, epochs in self.order.epochs(state.cursor).items())
            print0(f"data read  {', '.join(read)}")
            if told := summarize_events(read_events(self.run_dir / "metrics.jsonl")):
                print0(f"guard      {told}")
            watchdog.heartbeat("writing the final model")
            self._save_final(strategy)
            watchdog.stop()
            shutdown(strategy.accelerator)

    def describe(self) -> None:
        """What `--dry-run` says beyond the lines of every run."""
        training, max_steps = self.settings.training, self.settings.max_steps
        for number, line in enumerate(describe_groups(build_optimizer(self.model, training))):
            print0(("optimizer  " if number == 0 else "           ") + line)
        print0(f"schedule   {training.schedule} over {max_steps:,} steps:")
        for step in sorted(
            {0, training.warmup_steps, max_steps // 4, max_steps // 2, 3 * max_steps // 4, max_steps - 1}
        ):
            if 0 <= step < max_steps:
                rows, micro_batches = self.shape.at(step, self.settings)
                print0(
                    f"           step {step + 1:>7,}  learning rate {learning_rate(step, max_steps, training):.2e}  "
                    f"{rows * self.context_length:>9,} tokens in {micro_batches} forward pass(es) per process"
                )
        print0("dry run: nothing was trained")

    def _save_final(self, strategy: Strategy) -> None:
        target = self.run_dir / "final"
        weights = strategy.gather_full(weight_tensors(self.model))
        if strategy.is_main_process:
            with disk_errors(f"{target} (the checkpoints are untouched)"), new_folder(target) as folder:
                save_model(unsharded_model(self.model), weights, self.tokenizer, folder)
            print0(f"saved      {target}")
        strategy.accelerator.wait_for_everyone()

    def _context_length(self) -> int:
        longest = self.model.config.max_position_embeddings
        context = self.settings.training.context_length or longest
        if self.model.config.position_embedding_type == "learned" and context > longest:
            raise UserError(f"--training.context_length is {context}, the model has {longest} learned positions")
        context_parallel.check_context_length(self.model.config, context, self.strategy.cp_size)
        for split, streams in (("training", self.train_streams), ("held-out", self.validation_streams)):
            num_tokens = sum(map(len, streams.values()))
            if num_tokens < (context + 1 if split == "training" else 2):
                raise UserError(
                    f"the {split} text has only {num_tokens} tokens, one row takes {context + 1}: give more text or "
                    "a smaller --training.context_length"
                )
        return context

    def _order(self) -> DataOrder:
        """The rows of every source, and the mixtures of the run's phases."""
        training, seed = self.settings.training, self.settings.seed
        if training.phases and training.mixture:
            raise UserError("give --training.mixture or --training.phases, not both: each phase has its own mixture")
        packings = {
            name: pack(stream, training.packing, self.context_length, training.document_mask, seed, name)
            for name, stream in self.train_streams.items()
        }
        order = DataOrder(packings, training.phases or [PhaseSettings("pretrain", 1.0, training.mixture)])
        for name, packing in packings.items():
            if isinstance(packing, BestFit):
                print0(f"packing    {name}: {packing.sequences_per_epoch:,} rows an epoch, {packing.waste:.2%} padding")
        if len(packings) > 1:
            for phase in order.phases:
                shares = (
                    f"{name} {float(share):.1%}" for name, share in order.mixtures[phase.name].proportions.items()
                )
                print0(f"mixture    {phase.name} ({phase.share:.0%} of the steps): {', '.join(shares)} of the rows")
        return order

    def _batch_shape(self, parts: int) -> BatchSizes:
        training = self.settings.training
        rows, remainder = divmod(training.total_batch_size, self.context_length)
        if remainder or rows == 0 or rows % parts:
            raise UserError(
                f"--training.total_batch_size is {training.total_batch_size} tokens; it must be a multiple of "
                f"{self.context_length} (context) x {parts} (processes that read rows of their own)"
            )
        per_process = rows // parts
        device_batch_size = self.strategy.device_batch_size(per_process, training.device_batch_size)
        if per_process % device_batch_size:
            raise UserError(
                f"--training.device_batch_size is {device_batch_size}; it must divide the {per_process} rows per process and step"
            )
        return BatchSizes(rows, device_batch_size, parts)

    def _choose_precision(self) -> PrecisionChoice:
        """Measured at the start of a run; a resumed run keeps the choice, or its losses would not be the same."""
        state = self.begun
        precision = state.precision if state is not None else self.settings.training.precision
        device = self.strategy.device
        check_precision(precision, device)
        if precision == "fp8":
            check_tokens(self.shape.device_batch_size, self.context_length // self.strategy.cp_size)
            use_float8(self.model)
        if state is not None:
            if state.data != self.data_fingerprint:
                raise UserError(
                    f"{self.run_dir} was trained on other token shards than are in "
                    f"{data_folder(self.settings, self.run_dir)} now. Bring those back, or start over with --fresh."
                )
            compiled = state.compiled and self.strategy.can_compile
            if compiled:
                compile_blocks(self.model)
            reason = "as at the start of the run"
            if state.compiled and not compiled:
                reason += f", but for its compiled blocks, which do not go with {self.strategy.name}"
            return PrecisionChoice(state.precision, compiled, 0.0, reason)
        if self.strategy.is_sharded:  # the whole model, on which speed is measured, may be too large for one process
            compiled = self.settings.training.compile == "on"
            if compiled:
                compile_blocks(self.model)
            agreed = [("bf16" if has_bf16(device) else "fp32") if precision == "auto" else precision]
            broadcast_object_list(agreed)
            return PrecisionChoice(agreed[0], compiled, 0.0, "not measured, for the model is sharded")
        start = self.order.at_step(DataPosition(), 0, self.settings.max_steps or 1)
        micro_batches = self.shape.rows // (self.shape.device_batch_size * self.shape.parts)
        data = self.data.read_step(start, self.shape.rows, micro_batches, 0, self.shape.parts)
        batch = data.batches[0].to(device)
        self.model.to(device)
        choice = autotune(
            self.model, batch, micro_batches, self.settings.training, self.settings.max_steps, self.budget_seconds
        )
        shared = [choice]
        broadcast_object_list(shared)
        if shared[0].compiled != choice.compiled:  # another process was faster the other way
            (compile_blocks if shared[0].compiled else uncompile_blocks)(self.model)
        return shared[0]
