"""Checkpoints of a `transformers.Trainer` as this package writes them: a plain model, complete or absent, no pickle in it.

    class OurTrainer(ResumableTrainerMixin, SFTTrainer): ...

Trainer writes into the checkpoint's folder as it goes, with torch's pickles for optimizer, schedule and random numbers, and in
a form of its own where models are sharded. Here whole tensors by name go to safetensors, by the protocol of
`training/checkpoint.py`, so that a run goes on in another layout. What a step learns from is a function of the seed and the
step alone, whatever the number of processes.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env, set_seed
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerControl
from transformers.trainer import TRAINER_STATE_NAME
from trl.models.utils import add_hooks, remove_hooks

from scratch_gpt.alignment.ppo.rollout import unwrap_peft
from scratch_gpt.alignment.rng import random_states, set_random_states
from scratch_gpt.alignment.sampler import ResumableBatchSampler
from scratch_gpt.console import print0
from scratch_gpt.distributed import context_parallel
from scratch_gpt.distributed.deepspeed import DeepSpeedStrategy
from scratch_gpt.distributed.dtensor import num_shards
from scratch_gpt.distributed.launch import launch_state
from scratch_gpt.distributed.optimizer import Optimizers, group_by_mesh
from scratch_gpt.distributed.safetensors_reader import SafetensorsReader
from scratch_gpt.distributed.strategy import Strategy
from scratch_gpt.errors import UserError
from scratch_gpt.files import disk_errors, write_json
from scratch_gpt.model.modeling_scratch_gpt import ScratchGPTPreTrainedModel
from scratch_gpt.training.checkpoint import STATE, delete_old, new_checkpoint, unsharded_model


class ResumableTrainerMixin(Trainer):
    """Mixed into a trainer, before it: its checkpoints, its way back into them, and the order of its data."""

    control: TrainerControl
    optimizer: Any
    own_order = False
    """Whether the rows of each step are drawn by :class:`ResumableBatchSampler`; not for trainers with an order of their own."""
    frozen: Sequence[Any] = ()
    """Models beside the one that is trained, and beside a reference in ``ref_model``."""
    generates = False
    """Whether completions are drawn: by processes that share rows, the same ones."""
    zero: DeepSpeedStrategy | None = None
    """Where ZeRO is asked for: what cuts the model's state and puts it together."""
    strategy: Strategy | None = None
    """Where processes are to share rows, by tensor or context parallelism: what divides the model over them."""

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        for parameter in self.model.parameters():
            if parameter.requires_grad:  # TRL makes adapters over quantized weights bf16, where small steps are lost
                parameter.data = parameter.data.float()

    # ------------------------------------------------------------------------------------------------ saving

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.store_flos()
        step, main = self.state.global_step, self.accelerator.is_main_process
        run_dir = Path(self.args.output_dir)
        weights = self.full_weights()  # first: it gives up what an evaluation has gathered
        optimizer = self._full_optimizer_state(main)
        states = gather_object([random_states()])[:: self.get_tp_size()]
        problem: list[Any] = [None]
        if main:
            target = run_dir / f"checkpoint-{step}"
            try:
                with disk_errors(f"{target} (earlier checkpoints are untouched)"):
                    with new_checkpoint(target) as folder:
                        self.write_result(folder, weights)
                        self.write_more(folder, weights)
                        save_file(optimizer, folder / STATE / "optimizer.safetensors")
                        save_file(_stacked(states), folder / STATE / "rng.safetensors")
                        write_json(folder / STATE / "state.json", self.state_to_save())
                        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
                    if self.args.save_total_limit is not None:
                        delete_old(run_dir, self.args.save_total_limit)
            except UserError as error:
                problem = [str(error)]
        broadcast_object_list(problem)
        if problem[0] is not None:
            raise UserError(problem[0])

    @property
    def result(self) -> Any:
        """The model that all this is for, adapters around it where there are any."""
        return self.accelerator.unwrap_model(self.model)

    def write_result(self, folder: Path, weights: dict[str, torch.Tensor] | None) -> None:
        """The result as a plain directory; on the main process. ``weights``: see :meth:`full_weights`."""
        write_model(self.result, folder, weights)
        self.processing_class.save_pretrained(folder)

    def write_more(self, folder: Path, weights: dict[str, torch.Tensor] | None) -> None:
        """What a checkpoint needs beside the result; on the main process."""

    def full_weights(self) -> dict[str, torch.Tensor] | None:
        """The trained weights by name, on the main process; None where the model has them whole anyway."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        parameters = dict(self.model.named_parameters())
        if not any(num_shards(parameter) > 1 for parameter in parameters.values()):
            return None
        has_adapters = hasattr(self.result, "get_base_model")
        wanted = {name: p for name, p in parameters.items() if p.requires_grad or not has_adapters}
        if self.zero is not None:
            self.zero.release_gathered_weights(self.zero.engine)
            return self.zero.gather_full(wanted)
        return gather_full(wanted, self.accelerator.is_main_process)

    def state_to_save(self) -> dict[str, Any]:
        """Of this process, what else a resumed run needs; as JSON."""
        return {"step": self.state.global_step, "scheduler_step": self.lr_scheduler.last_epoch}

    def _full_optimizer_state(self, wanted: bool) -> dict[str, torch.Tensor]:
        if self.zero is not None:
            return self.zero.gather_full(self.zero.optimizers.state_tensors())
        optimizer = _plain(self.optimizer)
        tensors = {
            f"{name}.{key}": value
            for name, parameter in self._optimized()
            for key, value in optimizer.state[parameter].items()
        }
        return gather_full(tensors, wanted)

    def _optimized(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The parameters with their names, in the optimizer's order."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        groups = _plain(self.optimizer).param_groups
        return [(names[id(parameter)], parameter) for group in groups for parameter in group["params"]]

    # ------------------------------------------------------------------------------------------------ going on

    def train(self, resume_from_checkpoint: Any = None, *arguments: Any, **keywords: Any) -> Any:
        if self.is_fsdp_enabled or self.strategy is not None:
            if resume_from_checkpoint:  # while the model is whole: Trainer would come when it is sharded
                self.read_model(Path(resume_from_checkpoint))
            self.shard()
        return super().train(resume_from_checkpoint, *arguments, **keywords)

    def shard(self) -> None:
        """What is to be sharded otherwise than Accelerate will do it, before there is an optimizer."""
        if self.strategy is not None:
            precision = "bf16" if self.args.bf16 else "fp32"
            self.parallelize_trained(self.strategy, precision)
            models = [*self.frozen, getattr(self, "ref_model", None)]
            frozen = {id(one): one for one in models if isinstance(one, ScratchGPTPreTrainedModel)}.values()
            for model in frozen:
                self.strategy.parallelize(model.requires_grad_(False), precision)
            for model in [*self.trained, *frozen]:
                self.strategy.apply_context_parallel(unwrap_peft(model).base_model)
            print0(f"layout     {self.strategy.describe(self.trained[0], precision, '')[0]}")

    @property
    def trained(self) -> list[Any]:
        """The models that are trained."""
        return [self.model]

    def parallelize_trained(self, strategy: Strategy, precision: str) -> None:
        """Divide them over the processes of ``layout``."""
        strategy.parallelize(
            unwrap_peft(self.model), precision
        )  # which TRL calls without the adapters around it, to draw

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if model is None and self.strategy is None:
            self.read_model(Path(resume_from_checkpoint))

    def read_model(self, folder: Path) -> None:
        """The model as a checkpoint has it; on all processes, before it is spread over them."""
        fill(self.model, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint) / STATE
        saved = SafetensorsReader(folder, "optimizer.safetensors")
        state = json.loads((folder / "state.json").read_text())
        if self.zero is not None:
            self.zero.optimizers.load_state_tensors(saved)
            self.load_state(state)
            return
        index = {name: (at, parameter) for at, (name, parameter) in enumerate(self._optimized())}
        loaded: dict[int, dict[str, torch.Tensor]] = {}
        for key in saved.names:
            name, _, kind = key.rpartition(".")
            if name in index:
                at, parameter = index[name]
                loaded.setdefault(at, {})[kind] = saved.read(key, parameter)
        optimizer = _plain(self.optimizer)
        optimizer.load_state_dict({"state": loaded, "param_groups": optimizer.state_dict()["param_groups"]})
        self.load_state(state)

    def load_state(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_to_save`. The learning rate follows from the step, and from the schedule of this run."""
        scheduler, step = self.lr_scheduler, state["scheduler_step"]
        rates = [rate * factor(step) for rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        scheduler.load_state_dict(
            {**scheduler.state_dict(), "last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
        )
        for group, rate in zip(_plain(self.optimizer).param_groups, rates, strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Where another number of processes read rows of their own there is no state for each: new random numbers are drawn."""
        if checkpoint is None:
            return
        states = load_file(Path(checkpoint) / STATE / "rng.safetensors")
        if len(states["cpu"]) == self.dp_size:
            set_random_states({kind: of_all[self.dp_rank] for kind, of_all in states.items()})

    # ------------------------------------------------------------------------------------------------ steps

    def get_train_dataloader(self) -> DataLoader:
        if not self.own_order:
            return super().get_train_dataloader()
        args = self.args
        batches = ResumableBatchSampler(
            rows=len(self.train_dataset),
            device_batch_size=args.per_device_train_batch_size,
            micro_batches=args.gradient_accumulation_steps,
            steps=args.max_steps,
            process=self.dp_rank,
            processes=self.dp_size,
            seed=args.seed,
        )
        # With a generator of its own it leaves the random numbers of training as they are.
        return DataLoader(
            self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator, generator=torch.Generator()
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.own_order:  # to Trainer the whole run is one pass
            self.state.epoch = self.state.global_step * self.rows_per_step / len(self.train_dataset)
        super().log(logs, start_time)

    @property
    def rows_per_step(self) -> int:
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.dp_size

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Tokens that the model has read, without padding; the trainers that draw completions count by themselves."""
        if isinstance(inputs, Mapping) and "input_ids" in inputs:
            mask = inputs.get("attention_mask")
            read = inputs["input_ids"].numel() if mask is None else int(mask.sum())
            read = torch.tensor(read, device=self.args.device)
            self.state.num_input_tokens_seen += int(self.accelerator.reduce(read, "sum")) // self.get_tp_size()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """Also the last moment before a step is taken."""
        if grad_norm is None and (self.zero is not None or self.strategy is not None):
            grad_norm = self._norm_of_parts(math.inf)
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"step {self.state.global_step + 1:,} was not taken: its gradient's norm is {float(norm)}. The checkpoints "
                "before it are good; start over with --fresh and a lower learning rate, or with other data"
            )
        return float(norm)

    # ------------------------------------------------------------------------------------------------ ZeRO

    def use_deepspeed(self, zero: DeepSpeedStrategy) -> None:
        """Train with the state of the optimizer, and as the stage says gradients and weights, in parts.

        To Trainer and TRL the processes are those of plain data parallelism: they would set DeepSpeed up otherwise, with
        weights and gradients in bf16, and not at all on CPUs.
        """
        self.zero = zero
        self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True  # or Trainer would ask for `no_sync`
        self.accelerator.backward = self._backward_in_parts
        if zero.stage == 3:
            models = [*self.frozen, getattr(self, "ref_model", None)]
            for model in {id(one): one for one in models if one is not None}.values():
                zero.shard_frozen_model(model)

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        if (self.zero is None and self.strategy is None) or not training:
            return super()._wrap_model(model, training, dataloader)
        self.accelerator.prepare_model(self.model, evaluation_mode=True)  # for autocast; it is not wrapped
        if self.zero is None:
            self.model._is_accelerate_prepared = True  # or it would be wrapped as copies are
            return self.model
        optimizer = self.optimizer
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        engine, parts = self.zero.wrap(self.zero.parallelize(self.model, "fp32"), Optimizers(optimizer))
        self.optimizer = ShardedStepOptimizer(parts, optimizer)
        print0(f"layout     {self.zero.name} on {self.zero.world_size} process(es): {self.zero.describe_sharding()}")
        return engine

    def _backward_in_parts(self, loss: torch.Tensor) -> None:
        assert self.zero is not None
        with self.zero.micro_batch(self.zero.engine, last=self.accelerator.sync_gradients):
            self.zero.backward(self.zero.engine, loss)
        self.optimizer.due = True

    @contextmanager
    def generating(self) -> Iterator[None]:
        """While processes draw completions, each at its own pace: under ZeRO-3 the weights are whole on each of them."""
        if self.zero is None or self.zero.stage < 3:
            yield
            return
        engine = self.zero.engine
        offload = engine.optimizer.parameter_offload
        # TRL's functions leave one hook, which has the processes agree on where they are.
        start = offload.module._forward_pre_hooks[offload.fwd_pre_hook.id]
        with self.zero.deepspeed.zero.GatheredParameters(list(engine.parameters())):
            offload.fwd_pre_hook.remove()
            remove_hooks(engine)
            yield
            offload.fwd_pre_hook = offload.module.register_forward_pre_hook(start)
            add_hooks(engine)

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.zero is None and self.strategy is None:
            return super()._clip_grad_norm(model)
        return self._norm_of_parts(self.args.max_grad_norm)

    def _norm_of_parts(self, max_norm: float) -> float:
        if self.strategy is not None:
            return self.strategy.clip_grad_norm(self.model.parameters(), max_norm)
        assert self.zero is not None
        return self.zero.clip_grad_norm(self.zero.engine.parameters(), max_norm) if self.optimizer.due else 0.0

    # ------------------------------------------------------------------------------------------------ shared rows

    def use_model_parallel(self, strategy: Strategy) -> None:
        """Train with the matrices, or the columns of rows, divided. To Trainer and TRL the processes are those of plain
        data parallelism, some of which read the same rows.

        Raises:
            UserError: the model is none of this package's, or cannot be divided.
        """
        model = unwrap_peft(self.result)
        if not isinstance(model, ScratchGPTPreTrainedModel):
            raise UserError(
                f"{strategy.name} divides models of this package, and this is a {type(model).__name__}: make it one by "
                "`scratch-gpt import`, or take configs/accelerate/fsdp2.yaml"
            )
        context_parallel.check_context_length(model.config, 2 * strategy.cp_size, strategy.cp_size)
        self.strategy = strategy
        self.accelerator.state.device_mesh = strategy.mesh  # by which Accelerate's loaders find who reads the same rows
        self.accelerator.backward = self._backward_of_parts
        if self.generates:
            set_seed(self.args.seed + strategy.dp_rank)

    def _backward_of_parts(self, loss: torch.Tensor) -> None:
        assert self.strategy is not None
        with ExitStack() as stack:
            for model in self.trained:
                stack.enter_context(self.strategy.micro_batch(model, last=self.accelerator.sync_gradients))
            self.strategy.backward(self.model, loss)

    def create_optimizer(self, *arguments: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*arguments)
        if self.strategy is not None:
            optimizer.param_groups[:] = [
                {**group, "params": [parameter for _, parameter in some]}
                for group in optimizer.param_groups
                for some in group_by_mesh([("", parameter) for parameter in group["params"]])
            ]
        return optimizer

    def get_tp_size(self) -> int:
        """How many processes share each row, which is what Trainer takes it for."""
        return 1 if self.strategy is None else self.strategy.model_parallel_size

    def broadcast_from_first_rank(self, compute: Callable[[], Any]) -> Any:
        """What ``compute`` gives, in one of the processes that share rows: a function of the user's may not give the same twice."""
        return compute() if self.strategy is None else self.strategy.broadcast_from_first_rank(compute)

    @property
    def dp_size(self) -> int:
        """Of how many processes each reads rows of its own."""
        return self.args.world_size if self.strategy is None else self.strategy.dp_size

    @property
    def dp_rank(self) -> int:
        return self.args.process_index if self.strategy is None else self.strategy.dp_rank

    # ------------------------------------------------------------------------------------------------ processes

    def create_accelerator_and_postprocess(self) -> None:
        """With a model that is really sharded where that is asked for, also on CPUs."""
        if parse_flag_from_env("ACCELERATE_USE_FSDP"):
            launch_state()  # TrainingArguments have made the state of the processes anew
        super().create_accelerator_and_postprocess()
        if parse_flag_from_env("ACCELERATE_USE_FSDP"):
            if not self.accelerator.is_fsdp2:
                raise ValueError(f"FSDP2 was asked for, but Accelerate runs {self.accelerator.distributed_type.value}")
            plugin = self.accelerator.state.fsdp_plugin
            plugin.auto_wrap_policy = transformer_auto_wrap_policy  # a shard for each block
            if self.args.bf16:  # Accelerate would reduce gradients in bf16, too
                plugin.mixed_precision_policy = MixedPrecisionPolicy(
                    param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
                )


# ------------------------------------------------------------------------------------------------ the parts


class ShardedStepOptimizer(torch.optim.Optimizer):
    """What a `Trainer` steps under ZeRO: learning rates are set and read here, and the parts are updated by DeepSpeed.

    ``due``: there has been a backward pass since the last step.
    """

    _is_accelerate_prepared = True
    step_was_skipped = False

    def __init__(self, parts: Optimizers, optimizer: torch.optim.Optimizer):
        self.parts, self.due = parts, False
        self.defaults, self.param_groups, self.state = optimizer.defaults, optimizer.param_groups, optimizer.state

    def step(self, closure: Any = None) -> None:
        if self.due:  # a step without gradients changes nothing
            self.parts.step()
        self.due = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.parts.zero_grad()


def gather_full(tensors: Mapping[str, torch.Tensor], wanted: bool) -> dict[str, torch.Tensor]:
    """``tensors`` whole and on the CPU where ``wanted``; all processes call it, for the parts lie on all of them."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if wanted:
            found[name] = full.detach().cpu().contiguous()
    return found


def write_model(model: Any, folder: Path, weights: dict[str, torch.Tensor] | None) -> None:
    """A model, or its adapters, as a plain directory; its ``weights``, where it does not have them whole itself."""
    if weights is not None and not hasattr(model, "get_base_model"):
        model = unsharded_model(model, next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule)))
    use_cache, model.config.use_cache = model.config.use_cache, True  # which Trainer switches off
    model.save_pretrained(folder, state_dict=weights)
    model.config.use_cache = use_cache


def fill(model: Any, folder: Path) -> None:
    """Weights, or adapters, from a saved model's folder into one like it."""
    if hasattr(model, "get_base_model"):
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    else:
        model.load_state_dict(type(model).from_pretrained(folder, dtype=model.dtype).state_dict())


def _stacked(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {kind: torch.stack([of_one[kind] for of_one in states]) for kind in states[0]}


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """Torch's, inside of Accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)
