"""ZeRO through DeepSpeed: what data parallelism keeps on every process lies in parts on all of them.

Stage 1 cuts the optimizer's state and the weights that it updates, stage 2 the gradients as well, stage 3 also the weights
that the model computes with, which are gathered module by module (Rajbhandari et al., 2020, arXiv:1910.02054); the parts may
lie in the memory of the CPU, where they are updated then (Ren et al., 2021, arXiv:2101.06840).

DeepSpeed cuts, gathers and sums. What decides the numbers stays with the loop: the AdamW of `optimizer.py`, float32 weights
under autocast, the norm of the gradients and whether a step is taken. Checkpoints are those of any other layout: tensors of
the optimizer are put together by name, for DeepSpeed keeps one long row of all parameters of a group.
"""

import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping
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
from scratch_gpt.distributed.optimizer import STATE_OF, Optimizers, with_state
from scratch_gpt.distributed.safetensors_reader import SafetensorsReader
from scratch_gpt.distributed.strategy import Strategy
from scratch_gpt.errors import UserError
from scratch_gpt.model.modeling_scratch_gpt import ScratchGPTRotaryEmbedding

UNDERSTOOD = {"stage", "offload_optimizer", "offload_param", "overlap_comm", "contiguous_gradients", "reduce_scatter"}
UNDERSTOOD |= {"reduce_bucket_size", "allgather_bucket_size", "allgather_partitions", "sub_group_size"}
"""Settings under zero_optimization, beside those that begin with stage3_, that change memory and speed only."""
IN_PARTS = {1: "optimizer", 2: "optimizer and gradients", 3: "optimizer, gradients and weights"}


class DeepSpeedStrategy(Strategy):
    """Data parallel over all processes, with a stage of ZeRO; ``config`` is DeepSpeed's."""

    def __init__(self, accelerator: Accelerator, config: dict[str, Any]):
        self.stage: int = config["zero_optimization"]["stage"]
        super().__init__(accelerator, f"zero{self.stage}")
        self.config = config
        self.on_cpu = {
            what: (config["zero_optimization"].get(f"offload_{what}") or {}).get("device", "none") == "cpu"
            for what in ("optimizer", "param")
        }
        self.deepspeed = import_deepspeed(self.device)
        self.engine: Any
        self.optimizers: DeepSpeedOptimizers
        self.others: list[Any] = []

    @property
    def is_sharded(self) -> bool:
        return self.stage == 3

    @property
    def can_compile(self) -> bool:
        return self.stage < 3

    def check(self, optimizer: str, precision: str, compiled: bool) -> None:
        check(self.stage, optimizer, precision, compiled)

    # ------------------------------------------------------------------------------------------------ model

    def parallelize(self, model: Any, precision: str) -> nn.Module:
        for setting, numbers in buffer_sizes(model).items():
            self.config["zero_optimization"].setdefault(setting, numbers)
        if next(model.parameters()).is_meta:
            self._materialize(model)
        else:
            model.to(self.device)
        if precision != "fp32":  # inside of the engine, which would switch off what is around it
            forward = model.forward

            @functools.wraps(forward)
            def autocasting(*arguments: Any, **keywords: Any) -> Any:
                with autocast(self.device.type, precision):
                    return forward(*arguments, **keywords)

            model.forward = autocasting
        return model

    def _materialize(self, model: Any) -> None:
        """Memory for the own parts of an empty model; one module at a time is whole for a moment."""
        tied = model.config.tie_word_embeddings
        for module in model.modules():
            if any(p is not None for p in module._parameters.values()) and not (tied and module is model.lm_head):
                module.to_empty(device=self.device, recurse=False)
                self.deepspeed.zero.Init(module, config_dict_or_path=self.config)
        if tied:
            model.lm_head.weight = model.transformer.wte.weight
        if model.config.position_embedding_type == "rope":
            model.transformer.rotary_emb = ScratchGPTRotaryEmbedding(model.config).to(self.device)

    def wrap(self, model: Any, optimizers: Optimizers) -> tuple[nn.Module, Optimizers]:
        (optimizer,) = optimizers.optimizers
        self._announce_heads(model)
        self.engine, *_ = self.deepspeed.initialize(model=model, optimizer=optimizer, config=self.config)
        self.optimizers = DeepSpeedOptimizers(self.engine)
        self._verify_sharding(self.engine)
        return self.engine, self.optimizers

    def divide(self, model: Any) -> None:
        """Leave each process its part of ``model``, which is not trained; in place, as stage 3 does it."""
        self._announce_heads(model)
        offload = self.config["zero_optimization"].get("offload_param")
        zero = {"stage": 3, **buffer_sizes(model), **({"offload_param": offload} if offload else {})}
        engine, *_ = self.deepspeed.initialize(model=model, config={**self.config, "zero_optimization": zero})
        self.others.append(engine)  # what gathers the model's weights ends with it
        model.eval()

    def _announce_heads(self, model: nn.Module) -> None:
        for module in model.modules() if self.stage == 3 else ():
            head = getattr(module, "lm_head", None)
            if head is not None:  # the loss multiplies by its weight without calling it
                self.deepspeed.zero.register_external_parameter(module, head.weight)

    def _verify_sharding(self, model: nn.Module) -> None:
        number = sum(full_shape(parameter).numel() for parameter in self.optimizers.parameters.values())
        if self.optimizers.stage != self.stage or (self.world_size > 1 and self.optimizers.held >= number):
            raise UserError(
                f"{self.name} was asked for, but DeepSpeed runs stage {self.optimizers.stage}, and this process "
                f"updates {self.optimizers.held:,} of {number:,} numbers"
            )
        if self.on_cpu["optimizer"] != self.optimizers.offloaded:
            raise UserError(f"offload_optimizer_device is not in force: {self.config['zero_optimization']}")

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
        model.empty_partition_cache()  # small parameters stay gathered, and what is gathered would stay as it was
        super().load_weights(model, saved)
        model.optimizer.refresh_fp32_params()  # the ones that the optimizer updates

    # ------------------------------------------------------------------------------------------------ gradients

    def local_gradients(self, parameters: Iterable[nn.Parameter]) -> tuple[list[torch.Tensor], list[float]]:
        pieces = list(self.optimizers.gradients())
        return pieces, [1.0] * len(pieces)

    # ------------------------------------------------------------------------------------------------ whole tensors

    def gather_full(self, tensors: Mapping[str, torch.Tensor], copy: bool = False) -> dict[str, torch.Tensor]:
        """As for every layout, by the names of parameters, and of the state :class:`DeepSpeedOptimizers` names."""
        weights = dict(self.unwrap(self.engine).named_parameters())
        whole: dict[str, torch.Tensor] = {}
        for name in tensors:
            tensor = self._whole(weights[name]) if name in weights else self.optimizers.whole(name)
            if self.is_main_process:
                whole[name] = tensor.detach().to("cpu", copy=copy).contiguous()
        return whole

    def _whole(self, parameter: Any) -> torch.Tensor:
        if not is_zero3(parameter):
            return parameter
        start, _ = zero3_range(parameter)
        return gather_full_tensor([(start, to_local(parameter))], full_shape(parameter), self.device)

    # ------------------------------------------------------------------------------------------------ words

    def describe(self, model: nn.Module, precision: str, data: str) -> list[str]:
        first, *others = super().describe(model, precision, data)
        return [f"{first}, DeepSpeed {self.deepspeed.__version__}", self.describe_parts(), *others]

    def describe_parts(self) -> str:
        """What is in parts, and where they lie."""
        where = "the memory of the CPU" if self.optimizers.offloaded else f"{self.device.type}'s own memory"
        ours = (
            f"{IN_PARTS[self.optimizers.stage]} in parts: each updates {self.optimizers.held:,} numbers, padding included, in "
            f"{where}"
        )
        if self.on_cpu["param"]:
            ours += "; weights lie there, too, until they are gathered"
        if self.stage == 3 and (small := self.engine.optimizer.persistent_parameters):
            ours += f"; {sum(p.ds_numel for p in small):,} numbers of {len(small)} small parameters stay gathered"
        return ours


# ------------------------------------------------------------------------------------------------ the optimizer


@dataclass(frozen=True)
class Fragment:
    """Where a process has its part of a parameter: so many ``numbers`` from ``start`` on of the flattened parameter lie
    from ``offset`` on in ``row``, and the optimizer's state for them in rows like that one.
    """

    row: nn.Parameter
    offset: int
    start: int
    numbers: int

    def of(self, row: torch.Tensor) -> torch.Tensor:
        return row.detach()[self.offset : self.offset + self.numbers]


class DeepSpeedOptimizers(Optimizers):
    """The AdamW that updates this process's rows of the engine."""

    def __init__(self, engine: Any):
        self.engine, self.zero = engine, engine.optimizer
        super().__init__(self.zero.optimizer)
        self.parameters = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
        self.rows: list[nn.Parameter] = (
            self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        )

    @property
    def stage(self) -> int:
        """As it is in force."""
        if all(is_zero3(parameter) for parameter in self.parameters.values()):
            return 3
        return 2 if self.zero.partition_gradients else 1

    @property
    def held(self) -> int:
        """Of how many numbers this process has the optimizer's state."""
        return sum(row.numel() for row in self.rows)

    @property
    def offloaded(self) -> bool:
        return self.zero.offload_optimizer if self.stage == 3 else self.zero.cpu_offload

    def gradients(self) -> Iterator[torch.Tensor]:
        """This process's part of the gradients, summed over all; what changes in it reaches the step."""
        if self.offloaded:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # they are on their way to the CPU
            yield from (row.grad for row in self.rows if row.grad is not None)
        else:
            yield from (piece for pieces in self.zero.averaged_gradients.values() for piece in pieces or ())

    def step(self) -> None:
        self.engine.step()

    def zero_grad(self) -> None:
        """After a step that was taken there is nothing left to drop."""
        self.zero.zero_grad(set_to_none=True)
        if self.stage == 3:
            self.zero.averaged_gradients.clear()
            return
        for kept in (self.zero.averaged_gradients, self.zero.all_grad_tensors):
            kept.update(dict.fromkeys(kept))
        self.zero.micro_step_id = -1  # the next micro-batch is the first

    # ------------------------------------------------------------------------------------------------ by name

    def place(self, parameter: Any) -> Fragment | None:
        """None where this process has no part of ``parameter``."""
        if self.stage == 3:
            index, offset, size = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = parameter.ds_zero_partition_rank * size
            return Fragment(self.rows[index], offset, start, to_local(parameter).numel())
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Fragment(self.rows[mapping.param_group_index], here.start, there.start, here.numel)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The names of the state, for :meth:`DeepSpeedStrategy.gather`: what is behind them lies in rows."""
        if not self.zero.optimizer.state:
            return {}
        nothing = torch.empty(0)
        return {f"{name}.{key}": nothing for name in self.parameters for key in sorted(STATE_OF["AdamW"])}

    def whole(self, name: str) -> torch.Tensor:
        """The tensor with a name of :meth:`state_tensors`, complete on the main process."""
        name, _, key = name.rpartition(".")
        state = self.zero.optimizer.state
        if key == "step":  # the same for all
            return state[self.rows[0]]["step"].clone()
        parameter = self.parameters[name]
        place = self.place(parameter)
        own = [] if place is None else [(place.start, place.of(state[place.row][key]))]
        return gather_full_tensor(own, full_shape(parameter), self.engine.device)

    def load_state_tensors(self, saved: SafetensorsReader) -> None:
        there = with_state(saved, self.parameters, "AdamW")
        if not there:
            return
        states = self.zero.optimizer.state
        for row in self.rows:
            moments = {key: torch.zeros_like(row.detach()) for key in ("exp_avg", "exp_avg_sq")}
            states[row] = {"step": saved.read(f"{there[0]}.step", row), **moments}
        for name in there:
            parameter = self.parameters[name]
            place = self.place(parameter)
            if place is not None:
                for key in ("exp_avg", "exp_avg_sq"):
                    part = saved.read_range(f"{name}.{key}", parameter, place.start, place.start + place.numbers)
                    place.of(states[place.row][key]).copy_(part)


def gather_full_tensor(own: list[tuple[int, torch.Tensor]], shape: torch.Size, device: torch.device) -> torch.Tensor:
    """On the main process, the tensor of which every process has ``own`` pieces, each with where it begins."""
    together = torch.zeros(shape.numel(), dtype=torch.float32, device=device)
    for start, piece in own:
        together[start : start + piece.numel()] = piece
    dist.reduce(together, dst=0)
    return together.view(shape)


# ------------------------------------------------------------------------------------------------ the configuration


def build_deepspeed_strategy() -> DeepSpeedStrategy:
    """The stage that the configuration file of `accelerate launch` asks for; see :func:`requested_config`."""
    config = requested_config()
    return DeepSpeedStrategy(build_accelerator(), config)


def requested_config() -> dict[str, Any]:
    """DeepSpeed's configuration, from the configuration file of `accelerate launch`.

    Raises:
        UserError: it asks for what is not supported, or DeepSpeed is not installed.
    """
    if parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise UserError(
            "parallelism_config together with distributed_type: DEEPSPEED is not supported: ZeRO divides over all "
            "processes. Take fsdp2_tp.yaml, fsdp2_cp.yaml or hsdp.yaml of configs/accelerate/"
        )
    if find_spec("deepspeed") is None:
        raise UserError(
            "the configuration file says distributed_type: DEEPSPEED, and the package deepspeed is not installed: "
            "pip install 'scratch-gpt[deepspeed]', or take configs/accelerate/fsdp2.yaml, which needs no other package"
        )
    return deepspeed_config(DeepSpeedPlugin().deepspeed_config)


CANNOT = {
    "optimizer muon": "Muon orthogonalises whole matrices, and DeepSpeed cuts all parameters as one long row",
    "precision fp16": "its loss scale is not carried over to DeepSpeed's gradients",
    "precision fp8": "float8 weights in DeepSpeed's parts are not tested",
    "compile on": "a compiled block would have to gather its weights",
}


def check(stage: int, optimizer: str, precision: str, compiled: bool) -> None:
    """Raises a UserError for what a stage of ZeRO cannot do."""
    asked = [f"optimizer {optimizer}", f"precision {precision}", *(["compile on"] if compiled and stage == 3 else [])]
    for what in asked:
        if what in CANNOT:
            raise UserError(
                f"--training.{what} is not supported under zero{stage}: {CANNOT[what]}. Change it, or take "
                "configs/accelerate/fsdp2.yaml"
            )


def deepspeed_config(asked: dict[str, Any]) -> dict[str, Any]:
    """What DeepSpeed is given in place of the configuration that Accelerate has made of a configuration file.

    Raises:
        UserError: it contains what the settings of a run say, or what is not supported.
    """
    foreign = {key for key, value in asked.items() if value != "auto"} - {"zero_optimization", "steps_per_print"}
    if foreign:
        raise UserError(
            f"deepspeed_config: {', '.join(sorted(foreign))} cannot be given there. Precision, gradient accumulation and "
            "clipping, optimizer and schedule follow from --training.*; leave only what belongs to ZeRO"
        )
    zero = {key: value for key, value in asked["zero_optimization"].items() if value is not None}
    unknown = [key for key in zero if key not in UNDERSTOOD and not key.startswith("stage3_")]
    if unknown:
        raise UserError(f"deepspeed_config: {', '.join(unknown)} under zero_optimization: not supported here")
    if zero["stage"] not in IN_PARTS:
        raise UserError(f"deepspeed_config: zero_stage is {zero['stage']}; it must be 1, 2 or 3")
    for what in ("offload_optimizer", "offload_param"):
        device = zero.get(what, {}).get("device", "none")
        if device == "nvme":
            raise UserError(f"deepspeed_config: {what}_device nvme is not supported: take cpu")
        if device == "cpu" and zero["stage"] < (3 if what == "offload_param" else 2):
            raise UserError(f"deepspeed_config: {what}_device cpu is for a higher zero_stage than {zero['stage']}")
    return {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,  # the loop reads the rows: DeepSpeed only needs to be told some number
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its own would have to be compiled; torch's is vectorised, too
    }


def buffer_sizes(model: Any) -> dict[str, int]:
    """How many numbers DeepSpeed may hold beside the parts, where a configuration does not say.

    By itself it takes 2 GB to send gradients, and keeps up to a billion weights gathered: most models would be whole on
    every process. Here it is as under FSDP2: a block in use, another on its way, the norms.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    block = max(sum(parameter.numel() for parameter in blocks[0].parameters()) for blocks in lists)
    width = model.config.hidden_size if hasattr(model, "config") else 0
    return {
        "reduce_bucket_size": block,
        "stage3_prefetch_bucket_size": block,
        "stage3_max_live_parameters": 2 * block,
        "stage3_max_reuse_distance": block // 2,
        "stage3_param_persistence_threshold": 10 * width,
    }


def import_deepspeed(device: torch.device) -> Any:
    """The package, quiet, for ``device``, with a process group."""
    import deepspeed

    # DeepSpeed calls torch's functions by names that are old since torch 2.13.
    warnings.filterwarnings("ignore", message=".torch.distributed.[a-z_]+. is deprecated", category=FutureWarning)
    if device.type == "cpu":  # only inference needs it, and it would be compiled, for a minute
        deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)
    deepspeed.init_distributed("gloo" if device.type == "cpu" else None, auto_mpi_discovery=False)
    return deepspeed
