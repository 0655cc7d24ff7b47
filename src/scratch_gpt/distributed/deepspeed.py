"""ZeRO through DeepSpeed: shard over data-parallel ranks what plain data parallelism replicates.

Stage 1 shards the optimizer state and the float32 weights that it updates, stage 2 the gradients as well, stage 3 also the
weights that the model computes with, which are gathered module by module (Rajbhandari et al., 2020, arXiv:1910.02054). The
shards may be offloaded to the memory of the CPU and updated there (Ren et al., 2021, arXiv:2101.06840).

DeepSpeed shards, gathers and reduces. The numerics stay with this package: the AdamW of `optimizer.py`, float32 weights
under autocast, gradient clipping, and whether a step is taken. Checkpoints are those of every other strategy: DeepSpeed
keeps one flat buffer for all parameters of a group, from which optimizer state is gathered by name.

All use of DeepSpeed's undocumented attributes is in this file, except for a parameter's ``ds_*`` in `dtensor.py`;
`tests/distributed/test_private_attributes.py` lists them.
"""

import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, parse_flag_from_env
from torch import nn

from scratch_gpt.compute.precision import autocast
from scratch_gpt.distributed.dtensor import full_shape, is_zero3, to_local, zero3_range
from scratch_gpt.distributed.launch import build_accelerator
from scratch_gpt.distributed.materialize import init_buffers
from scratch_gpt.distributed.optimizer import STATE_KEYS, Optimizers, names_with_state
from scratch_gpt.distributed.safetensors_reader import SafetensorsReader
from scratch_gpt.distributed.strategy import Strategy
from scratch_gpt.errors import UserError

SUPPORTED_ZERO_SETTINGS = {
    "stage",
    "offload_optimizer",
    "offload_param",
    "overlap_comm",
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "allgather_bucket_size",
    "allgather_partitions",
    "sub_group_size",
}
"""Settings under zero_optimization that affect memory and speed only, as do those that begin with stage3_."""
SHARDED_BY_STAGE = {1: "optimizer", 2: "optimizer and gradients", 3: "optimizer, gradients and weights"}


class DeepSpeedStrategy(Strategy):
    """Data parallelism over all ranks with a stage of ZeRO; ``config`` is that of `deepspeed.initialize`."""

    def __init__(self, accelerator: Accelerator, config: dict[str, Any]):
        self.stage: int = config["zero_optimization"]["stage"]
        super().__init__(accelerator, f"zero{self.stage}")
        self.config = config
        self.offload_requested = {
            what: (config["zero_optimization"].get(f"offload_{what}") or {}).get("device", "none") == "cpu"
            for what in ("optimizer", "param")
        }
        self.deepspeed = import_deepspeed(self.device)
        self.engine: Any
        self.optimizers: DeepSpeedOptimizers
        self.frozen_engines: list[Any] = []

    @property
    def is_sharded(self) -> bool:
        return self.stage == 3

    @property
    def can_compile(self) -> bool:
        return self.stage < 3

    def check(self, optimizer: str, precision: str, compiled: bool) -> None:
        check_settings(self.stage, optimizer, precision, compiled)

    # ------------------------------------------------------------------------------------------------ model

    def parallelize(self, model: Any, precision: str, roots: Sequence[nn.Module] | None = None) -> nn.Module:
        assert roots is None
        for setting, numel in buffer_sizes(model).items():
            self.config["zero_optimization"].setdefault(setting, numel)
        if next(model.parameters()).is_meta:
            self._materialize(model)
        else:
            model.to(self.device)
        if precision != "fp32":  # inside the engine, which switches off an autocast around it
            forward = model.forward

            @functools.wraps(forward)
            def forward_in_autocast(*args: Any, **kwargs: Any) -> Any:
                with autocast(self.device.type, precision):
                    return forward(*args, **kwargs)

            model.forward = forward_in_autocast
        return model

    def _materialize(self, model: Any) -> None:
        """Allocate this rank's shards of the meta ``model``, holding one unsharded module at a time."""
        tied_head = model.lm_head if model.config.tie_word_embeddings else None
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)) and module is not tied_head:
                module.to_empty(device=self.device, recurse=False)
                self.deepspeed.zero.Init(module, config_dict_or_path=self.config)
        init_buffers(model, self.device)

    def wrap(self, model: Any, optimizers: Optimizers) -> tuple[nn.Module, Optimizers]:
        (optimizer,) = optimizers.optimizers
        self._register_heads(model)
        self.engine, *_ = self.deepspeed.initialize(model=model, optimizer=optimizer, config=self.config)
        self.optimizers = DeepSpeedOptimizers(self.engine)
        self._verify_sharding(self.engine)
        return self.engine, self.optimizers

    def shard_frozen_model(self, model: Any) -> None:
        """Shard ``model``, which is not trained, in place as stage 3 does."""
        self._register_heads(model)
        offload = self.config["zero_optimization"].get("offload_param")
        zero = {"stage": 3, **buffer_sizes(model), **({"offload_param": offload} if offload else {})}
        engine, *_ = self.deepspeed.initialize(model=model, config={**self.config, "zero_optimization": zero})
        self.frozen_engines.append(engine)  # the hooks that gather the weights live as long as the engine
        model.eval()

    def _register_heads(self, model: nn.Module) -> None:
        for module in model.modules() if self.stage == 3 else ():
            head = getattr(module, "lm_head", None)
            if head is not None:  # the loss multiplies by the head's weight without calling the head
                self.deepspeed.zero.register_external_parameter(module, head.weight)

    def _verify_sharding(self, model: nn.Module) -> None:
        optimizers = self.optimizers
        total = sum(full_shape(parameter).numel() for parameter in optimizers.parameters.values())
        if optimizers.stage != self.stage or (self.world_size > 1 and optimizers.local_numel >= total):
            raise UserError(
                f"{self.name} was requested, but DeepSpeed runs stage {optimizers.stage}, and this process updates "
                f"{optimizers.local_numel:,} of {total:,} weights"
            )
        if self.offload_requested["optimizer"] != optimizers.is_offloaded:
            raise UserError(f"offload_optimizer_device is not in effect: {self.config['zero_optimization']}")

    @staticmethod
    def unwrap(model: Any) -> Any:
        return model.module

    @contextmanager
    def micro_batch(self, model: Any, last: bool) -> Iterator[None]:
        model.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, model: Any, loss: torch.Tensor) -> None:
        model.backward(loss)

    def release_gathered_weights(self, model: Any) -> None:
        model.empty_partition_cache()

    def load_weights(self, model: Any, saved: SafetensorsReader) -> None:
        model.empty_partition_cache()  # or small parameters that stay gathered would keep their old values
        super().load_weights(model, saved)
        model.optimizer.refresh_fp32_params()  # the copies that the optimizer updates

    # ------------------------------------------------------------------------------------------------ gradients

    def local_gradients(self, parameters: Iterable[nn.Parameter]) -> tuple[list[torch.Tensor], list[float]]:
        gradients = list(self.optimizers.gradients())
        return gradients, [1.0] * len(gradients)

    # ------------------------------------------------------------------------------------------------ full tensors

    def gather_full(self, tensors: Mapping[str, torch.Tensor], copy: bool = False) -> dict[str, torch.Tensor]:
        """Gather tensors with the names of parameters, or of :meth:`DeepSpeedOptimizers.state_tensors`."""
        weights = dict(self.unwrap(self.engine).named_parameters())
        full: dict[str, torch.Tensor] = {}
        for name in tensors:
            tensor = self._gather_weight(weights[name]) if name in weights else self.optimizers.gather_state(name)
            if self.is_main_process:
                full[name] = tensor.detach().to("cpu", copy=copy).contiguous()
        return full

    def _gather_weight(self, parameter: Any) -> torch.Tensor:
        if not is_zero3(parameter):
            return parameter
        start, _ = zero3_range(parameter)
        return gather_full_tensor(start, to_local(parameter), full_shape(parameter), self.device)

    # ------------------------------------------------------------------------------------------------ description

    def describe(self, model: nn.Module, precision: str, data: str) -> list[str]:
        first, *others = super().describe(model, precision, data)
        return [f"{first}, DeepSpeed {self.deepspeed.__version__}", self.describe_sharding(), *others]

    def describe_sharding(self) -> str:
        """Say what is sharded, and in which memory the shards are."""
        memory = "the memory of the CPU" if self.optimizers.is_offloaded else f"the memory of the {self.device.type}"
        description = (
            f"{SHARDED_BY_STAGE[self.optimizers.stage]} sharded: each process updates {self.optimizers.local_numel:,} "
            f"weights, padding included, in {memory}"
        )
        if self.offload_requested["param"]:
            description += "; weights stay there, too, until they are gathered"
        if self.stage == 3 and (small := self.engine.optimizer.persistent_parameters):
            numel = sum(parameter.ds_numel for parameter in small)
            description += f"; {len(small)} small parameters ({numel:,} weights) stay gathered"
        return description


# ------------------------------------------------------------------------------------------------ the optimizer


@dataclass(frozen=True)
class Fragment:
    """This rank's shard of a parameter: ``numel`` elements of the flattened parameter from ``start`` on, which are the
    elements from ``offset`` on of ``buffer``, one of the flat buffers that the optimizer updates.
    """

    buffer: nn.Parameter
    offset: int
    start: int
    numel: int

    def view_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the shard's elements of ``tensor``, which is laid out as ``buffer`` is, such as optimizer state."""
        return tensor.detach()[self.offset : self.offset + self.numel]


class DeepSpeedOptimizers(Optimizers):
    """The AdamW over this rank's flat buffers of an engine."""

    def __init__(self, engine: Any):
        self.engine, self.zero = engine, engine.optimizer
        super().__init__(self.zero.optimizer)
        self.parameters = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
        self.flat_buffers: list[nn.Parameter] = (
            self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        )

    @property
    def stage(self) -> int:
        """The stage of ZeRO that is in effect."""
        if all(is_zero3(parameter) for parameter in self.parameters.values()):
            return 3
        return 2 if self.zero.partition_gradients else 1

    @property
    def local_numel(self) -> int:
        """The number of weights, padding included, whose optimizer state this rank has."""
        return sum(buffer.numel() for buffer in self.flat_buffers)

    @property
    def is_offloaded(self) -> bool:
        """Whether weights are updated in the memory of the CPU."""
        return self.zero.offload_optimizer if self.stage == 3 else self.zero.cpu_offload

    def gradients(self) -> Iterator[torch.Tensor]:
        """Yield this rank's shards of the reduced gradients; changing them in place changes the step."""
        if self.is_offloaded:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # the copies to the CPU are asynchronous
            yield from (buffer.grad for buffer in self.flat_buffers if buffer.grad is not None)
        else:
            yield from (shard for shards in self.zero.averaged_gradients.values() for shard in shards or ())

    def step(self) -> None:
        self.engine.step()

    def zero_grad(self) -> None:
        """Drop the gradients of a step that is skipped; a step that is taken drops its own."""
        self.zero.zero_grad(set_to_none=True)
        if self.stage == 3:
            self.zero.averaged_gradients.clear()
            return
        for gradients in (self.zero.averaged_gradients, self.zero.all_grad_tensors):
            gradients.update(dict.fromkeys(gradients))
        self.zero.micro_step_id = -1  # the next micro-batch is the first of its step

    # ------------------------------------------------------------------------------------------------ by name

    def fragment_of(self, parameter: Any) -> Fragment | None:
        """Return this rank's shard of ``parameter``, or None if it has none."""
        if self.stage == 3:
            index, offset, size = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = parameter.ds_zero_partition_rank * size
            return Fragment(self.flat_buffers[index], offset, start, to_local(parameter).numel())
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        in_buffer, in_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
        buffer = self.flat_buffers[mapping.param_group_index]
        return Fragment(buffer, in_buffer.start, in_parameter.start, in_buffer.numel)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Return the names of the state for :meth:`DeepSpeedStrategy.gather_full`, with empty tensors."""
        if not self.zero.optimizer.state:
            return {}
        placeholder = torch.empty(0)
        return {f"{name}.{key}": placeholder for name in self.parameters for key in sorted(STATE_KEYS["AdamW"])}

    def gather_state(self, name: str) -> torch.Tensor:
        """Gather the state tensor with a name of :meth:`state_tensors`, in full on the main process."""
        name, _, key = name.rpartition(".")
        state = self.zero.optimizer.state
        if key == "step":  # the same for all parameters
            return state[self.flat_buffers[0]]["step"].clone()
        parameter = self.parameters[name]
        fragment = self.fragment_of(parameter)
        start, shard = (
            (0, torch.empty(0)) if fragment is None else (fragment.start, fragment.view_of(state[fragment.buffer][key]))
        )
        return gather_full_tensor(start, shard, full_shape(parameter), self.engine.device)

    def load_state_tensors(self, saved: SafetensorsReader) -> None:
        names = names_with_state(saved, self.parameters, "AdamW")
        if not names:
            return
        states = self.zero.optimizer.state
        for buffer in self.flat_buffers:
            moments = {key: torch.zeros_like(buffer.detach()) for key in ("exp_avg", "exp_avg_sq")}
            states[buffer] = {"step": saved.read(f"{names[0]}.step", buffer), **moments}
        for name in names:
            parameter = self.parameters[name]
            fragment = self.fragment_of(parameter)
            if fragment is not None:
                start, end = fragment.start, fragment.start + fragment.numel
                for key in ("exp_avg", "exp_avg_sq"):
                    shard = saved.read_range(f"{name}.{key}", parameter, start, end)
                    fragment.view_of(states[fragment.buffer][key]).copy_(shard)


def gather_full_tensor(start: int, shard: torch.Tensor, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """Gather on the main process a tensor of ``shape``; each rank has the elements from ``start`` on of it, flattened."""
    full = torch.zeros(shape.numel(), dtype=torch.float32, device=device)
    full[start : start + shard.numel()] = shard
    dist.reduce(full, dst=0)
    return full.view(shape)


# ------------------------------------------------------------------------------------------------ the configuration


def build_deepspeed_strategy() -> DeepSpeedStrategy:
    """Build the strategy of a configuration file with distributed_type: DEEPSPEED.

    Raises:
        UserError: It requests a feature that is not supported, or DeepSpeed is not installed.
    """
    config = requested_deepspeed_config()
    return DeepSpeedStrategy(build_accelerator(), config)


def requested_deepspeed_config() -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize` that the configuration file of `accelerate launch` requests.

    Raises:
        UserError: It requests a feature that is not supported, or DeepSpeed is not installed.
    """
    if parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise UserError(
            "parallelism_config together with distributed_type: DEEPSPEED is not supported: ZeRO shards over all "
            "processes. Take fsdp2_tp.yaml, fsdp2_cp.yaml or hsdp.yaml of configs/accelerate/"
        )
    if find_spec("deepspeed") is None:
        raise UserError(
            "the configuration file says distributed_type: DEEPSPEED, and the package deepspeed is not installed: "
            "pip install 'scratch-gpt[deepspeed]', or take configs/accelerate/fsdp2.yaml, which needs no other package"
        )
    return deepspeed_config(DeepSpeedPlugin().deepspeed_config)


UNSUPPORTED = {
    "optimizer muon": "Muon orthogonalizes full matrices, and DeepSpeed flattens all parameters into one buffer",
    "precision fp16": "its loss scale is not applied to DeepSpeed's gradients",
    "precision fp8": "float8 weights sharded by DeepSpeed are not tested",
    "compile on": "a compiled block would have to gather its weights",
}


def check_settings(stage: int, optimizer: str, precision: str, compiled: bool) -> None:
    """Raise a UserError for settings that a stage of ZeRO does not support."""
    requested = [f"optimizer {optimizer}", f"precision {precision}", *["compile on"] * (compiled and stage == 3)]
    for setting in requested:
        if setting in UNSUPPORTED:
            raise UserError(
                f"--training.{setting} is not supported under zero{stage}: {UNSUPPORTED[setting]}. Change it, or take "
                "configs/accelerate/fsdp2.yaml"
            )


def deepspeed_config(requested: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize`, from the one that Accelerate has read from a file.

    Raises:
        UserError: It contains what the settings of a run say, or what is not supported.
    """
    foreign = {key for key, value in requested.items() if value != "auto"} - {"zero_optimization", "steps_per_print"}
    if foreign:
        raise UserError(
            f"deepspeed_config: {', '.join(sorted(foreign))} cannot be given there. Precision, gradient accumulation and "
            "clipping, optimizer and schedule follow from --training.*; leave only what belongs to ZeRO"
        )
    zero = {key: value for key, value in requested["zero_optimization"].items() if value is not None}
    unsupported = [key for key in zero if key not in SUPPORTED_ZERO_SETTINGS and not key.startswith("stage3_")]
    if unsupported:
        raise UserError(f"deepspeed_config: {', '.join(unsupported)} under zero_optimization: not supported here")
    if zero["stage"] not in SHARDED_BY_STAGE:
        raise UserError(f"deepspeed_config: zero_stage is {zero['stage']}; it must be 1, 2 or 3")
    for setting in ("offload_optimizer", "offload_param"):
        device = zero.get(setting, {}).get("device", "none")
        if device == "nvme":
            raise UserError(f"deepspeed_config: {setting}_device nvme is not supported: take cpu")
        if device == "cpu" and zero["stage"] < (3 if setting == "offload_param" else 2):
            raise UserError(f"deepspeed_config: {setting}_device cpu is for a higher zero_stage than {zero['stage']}")
    return {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,  # required, and without effect: DeepSpeed reads no data here
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's must be compiled, and torch's is vectorized, too
    }


def buffer_sizes(model: Any) -> dict[str, int]:
    """Return how many elements DeepSpeed may hold besides the shards, for settings that a configuration leaves open.

    By default DeepSpeed takes 2 GB to send gradients and keeps up to a billion weights gathered, so most models would be
    unsharded on every rank. These sizes are as under FSDP2: one block in use, the next one in flight, and the norms.
    """
    block_lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    block = max(sum(parameter.numel() for parameter in blocks[0].parameters()) for blocks in block_lists)
    hidden_size = model.config.hidden_size if hasattr(model, "config") else 0
    return {
        "reduce_bucket_size": block,
        "stage3_prefetch_bucket_size": block,
        "stage3_max_live_parameters": 2 * block,
        "stage3_max_reuse_distance": block // 2,
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed without its warnings, for ``device``, and initialize its process group."""
    import deepspeed

    # DeepSpeed calls torch.distributed by names that are deprecated since torch 2.13.
    warnings.filterwarnings("ignore", message=".torch.distributed.[a-z_]+. is deprecated", category=FutureWarning)
    if device.type == "cpu":  # an extension for inference only, which takes a minute to compile
        deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)
    deepspeed.init_distributed("gloo" if device.type == "cpu" else None, auto_mpi_discovery=False)
    return deepspeed
