"""Save and resume a `transformers.Trainer`: each checkpoint is a plain model, complete or absent, without pickles.

    class OurTrainer(ResumableTrainerMixin, SFTTrainer): ...

Trainer writes into the checkpoint's folder piece by piece, pickles optimizer, schedule and random states, and uses another
format for sharded models. Here the full tensors go by name to safetensors, in the protocol of `training/checkpoint.py`, so
that a run can be resumed under another strategy or on another number of ranks. The sequences of each step are a function of
the seed and the step alone.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import TrainerControl
from transformers.trainer import TRAINER_STATE_NAME

from scratch_gpt.alignment.rng import random_states, set_random_states
from scratch_gpt.alignment.sampler import ResumableBatchSampler
from scratch_gpt.alignment.trainer_parallel import ParallelTrainerMixin, gather_full
from scratch_gpt.distributed.safetensors_reader import SafetensorsReader
from scratch_gpt.errors import UserError
from scratch_gpt.files import disk_errors, write_json
from scratch_gpt.training.checkpoint import STATE, delete_old, new_checkpoint, unsharded_model


class ResumableTrainerMixin(ParallelTrainerMixin):
    """Add to a trainer, as its first base class, for exact resume and for training under any strategy."""

    control: TrainerControl
    uses_resumable_sampler = False
    """Whether :class:`ResumableBatchSampler` chooses the sequences of each step; false for trainers with another order."""

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        for parameter in self.model.parameters():
            if parameter.requires_grad:  # TRL makes adapters of quantized weights bf16, where small steps are lost
                parameter.data = parameter.data.float()

    # ------------------------------------------------------------------------------------------------ save

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.store_flos()
        step, main = self.state.global_step, self.accelerator.is_main_process
        run_dir = Path(self.args.output_dir)
        weights = self.full_weights()  # first, as it frees what an evaluation left gathered
        optimizer = self._full_optimizer_state(main)
        states = gather_object([random_states()])[:: self.get_tp_size()]
        error_message: list[Any] = [None]
        if main:
            target = run_dir / f"checkpoint-{step}"
            try:
                with disk_errors(f"{target} (earlier checkpoints are untouched)"):
                    with new_checkpoint(target) as folder:
                        self.write_output_model(folder, weights)
                        self.write_extra_state(folder, weights)
                        save_file(optimizer, folder / STATE / "optimizer.safetensors")
                        save_file(_stack(states), folder / STATE / "rng.safetensors")
                        progress = {"step": step, "scheduler_step": self.lr_scheduler.last_epoch}
                        write_json(folder / STATE / "state.json", progress)
                        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
                    if self.args.save_total_limit is not None:
                        delete_old(run_dir, self.args.save_total_limit)
            except UserError as error:
                error_message = [str(error)]
        broadcast_object_list(error_message)
        if error_message[0] is not None:
            raise UserError(error_message[0])

    def write_output_model(self, folder: Path, weights: dict[str, torch.Tensor] | None) -> None:
        """Save the output model and its tokenizer; on the main process. ``weights``: from :meth:`full_weights`."""
        write_model(self.output_model, folder, weights)
        self.processing_class.save_pretrained(folder)

    def write_extra_state(self, folder: Path, weights: dict[str, torch.Tensor] | None) -> None:
        """Save what else a checkpoint needs; on the main process. Default: nothing."""

    def _full_optimizer_state(self, keep: bool) -> dict[str, torch.Tensor]:
        if self.deepspeed is not None:
            return self.deepspeed.gather_full(self.deepspeed.optimizers.state_tensors())
        optimizer = _unwrap_optimizer(self.optimizer)
        tensors = {
            f"{name}.{key}": value
            for name, parameter in self._optimized_parameters()
            for key, value in optimizer.state[parameter].items()
        }
        return gather_full(tensors, keep)

    def _optimized_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The trained parameters and their names, in the optimizer's order."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        groups = _unwrap_optimizer(self.optimizer).param_groups
        return [(names[id(parameter)], parameter) for group in groups for parameter in group["params"]]

    # ------------------------------------------------------------------------------------------------ resume

    def train(self, resume_from_checkpoint: Any = None, *arguments: Any, **keywords: Any) -> Any:
        if self.is_fsdp_enabled or self.strategy is not None:
            if resume_from_checkpoint:  # Trainer would load weights when the model is sharded already
                self.load_model(Path(resume_from_checkpoint))
            self.apply_parallelism()
        return super().train(resume_from_checkpoint, *arguments, **keywords)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if model is None and self.strategy is None:
            self.load_model(Path(resume_from_checkpoint))

    def load_model(self, folder: Path) -> None:
        """Load the weights of a checkpoint on all ranks, before the model is sharded."""
        load_weights(self.model, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint) / STATE
        saved = SafetensorsReader(folder, "optimizer.safetensors")
        if self.deepspeed is not None:
            self.deepspeed.optimizers.load_state_tensors(saved)
        else:
            self._load_optimizer_state(saved)
        self._set_schedule(json.loads((folder / "state.json").read_text())["scheduler_step"])

    def _load_optimizer_state(self, saved: SafetensorsReader) -> None:
        positions = {name: (at, parameter) for at, (name, parameter) in enumerate(self._optimized_parameters())}
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key in saved.names:
            name, _, kind = key.rpartition(".")
            if name in positions:
                at, parameter = positions[name]
                state.setdefault(at, {})[kind] = saved.read(key, parameter)
        optimizer = _unwrap_optimizer(self.optimizer)
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    def _set_schedule(self, step: int) -> None:
        """Put the learning rate where this run's own schedule has it after ``step`` steps."""
        scheduler = self.lr_scheduler
        rates = [rate * factor(step) for rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        scheduler.load_state_dict(
            {**scheduler.state_dict(), "last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
        )
        for group, rate in zip(_unwrap_optimizer(self.optimizer).param_groups, rates, strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the random states if the checkpoint has one for each data-parallel rank; else keep the current ones."""
        if checkpoint is None:
            return
        states = load_file(Path(checkpoint) / STATE / "rng.safetensors")
        if len(states["cpu"]) == self.dp_size:
            set_random_states({kind: of_all_ranks[self.dp_rank] for kind, of_all_ranks in states.items()})

    # ------------------------------------------------------------------------------------------------ data order

    def get_train_dataloader(self) -> DataLoader:
        if not self.uses_resumable_sampler:
            return super().get_train_dataloader()
        args = self.args
        sampler = ResumableBatchSampler(
            num_samples=len(self.train_dataset),
            device_batch_size=args.per_device_train_batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            max_steps=args.max_steps,
            dp_rank=self.dp_rank,
            dp_size=self.dp_size,
            seed=args.seed,
        )
        # A generator of its own, so that the loader does not advance the random numbers of training.
        return DataLoader(
            self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator, generator=torch.Generator()
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.uses_resumable_sampler:  # Trainer takes the whole run for one epoch
            self.state.epoch = self.state.global_step * self.samples_per_step / len(self.train_dataset)
        super().log(logs, start_time)

    @property
    def samples_per_step(self) -> int:
        """Samples of an optimizer step, over all data-parallel ranks."""
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.dp_size

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Count the tokens that the model reads, without padding; trainers that generate count by themselves."""
        if isinstance(inputs, Mapping) and "input_ids" in inputs:
            mask = inputs.get("attention_mask")
            count = inputs["input_ids"].numel() if mask is None else int(mask.sum())
            tokens = self.accelerator.reduce(torch.tensor(count, device=self.args.device), "sum")
            self.state.num_input_tokens_seen += int(tokens) // self.get_tp_size()


def write_model(model: Any, folder: Path, weights: dict[str, torch.Tensor] | None) -> None:
    """Save a model, or its adapters, as a plain directory; a sharded one with its gathered ``weights``."""
    if weights is not None and not hasattr(model, "get_base_model"):
        model = unsharded_model(model, next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule)))
    use_cache, model.config.use_cache = model.config.use_cache, True  # Trainer switches it off
    model.save_pretrained(folder, state_dict=weights)
    model.config.use_cache = use_cache


def load_weights(model: Any, folder: Path) -> None:
    """Load the weights, or adapters, that :func:`write_model` saved into a model of the same kind."""
    if hasattr(model, "get_base_model"):
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    else:
        model.load_state_dict(type(model).from_pretrained(folder, dtype=model.dtype).state_dict())


def _stack(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The random states of all data-parallel ranks, by kind, each (ranks, numbers)."""
    return {kind: torch.stack([of_one_rank[kind] for of_one_rank in states]) for kind in states[0]}


def _unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Torch's optimizer, without Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
