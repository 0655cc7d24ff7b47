"""Pipeline parallelism: the blocks of a model spread over processes, through which micro-batches flow.

A stage is a run of blocks; the first one also embeds the tokens and the last one has the head and the loss. The
schedules are those of `torch.distributed.pipelining`: 1F1B (Narayanan et al., 2019, arXiv:1806.03377), where a process
has one stage, and interleaved 1F1B (Narayanan et al., 2021, arXiv:2104.04473), where it has two that lie apart, so that
it waits less. What is computed is the step of a single process, the micro-batches of a pipeline being those of gradient
accumulation.

A stage is the model itself with holes in it, so that every parameter keeps its name and `modeling_scratch_gpt.py`
remains the only description of the forward pass.

Pipelines side by side have other data. They are copies, or (with an FSDP2 configuration) processes in the same place share
a stage in parts. Then a stage is gathered for the first micro-batch, its gradients are reduced after the last one, and
between steps only the parts are kept: which of torch's schedules do by themselves, as torchtitan uses them.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor

from scratch_gpt.compute.precision import autocast
from scratch_gpt.config import ParallelSettings, PretrainSettings
from scratch_gpt.data.batches import IGNORE_INDEX, Batch
from scratch_gpt.distributed.dtensor import num_shards, to_local
from scratch_gpt.distributed.materialize import init_buffers
from scratch_gpt.distributed.strategy import Strategy
from scratch_gpt.errors import UserError
from scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM
from scratch_gpt.model.flops import flops_per_token

STAGES_PER_PROCESS = {"1f1b": 1, "interleaved1f1b": 2}
EMBEDDING = "transformer.wte.weight"


# ------------------------------------------------------------------------------------------------ the split


@dataclass(frozen=True)
class StageSplit:
    """Which blocks each stage has, and its share of the model's floating-point operations."""

    blocks: tuple[range, ...]
    shares: tuple[float, ...]

    def describe(self, processes: int) -> Iterator[str]:
        """One line for each stage; stage s is in place s modulo ``processes`` of the pipeline."""
        last = len(self.blocks) - 1
        for stage, (blocks, share) in enumerate(zip(self.blocks, self.shares, strict=True)):
            parts = [f"blocks {blocks[0]} to {blocks[-1]}" if len(blocks) > 1 else f"block {blocks[0]}"]
            parts = ["embedding"] * (stage == 0) + parts + ["head and loss"] * (stage == last)
            yield f"stage {stage} in place {stage % processes}: {', '.join(parts)}, {share:.0%} of the FLOPs"


def split_into_stages(config: ScratchGPTConfig, context_length: int, stages: int) -> StageSplit:
    """The split whose slowest stage is fastest. The head counts as what it computes; looking up an embedding is free."""
    flops = flops_per_token(config, context_length).total
    head = 6 * config.padded_vocab_size * config.hidden_size
    num_blocks = config.num_hidden_layers
    block = (flops - head) / num_blocks
    assert 2 <= stages <= num_blocks

    def slowest(of_last: int) -> float:
        others = -(-(num_blocks - of_last) // (stages - 1))  # rounded up
        return max(others * block, of_last * block + head)

    of_last = min(range(1, num_blocks - stages + 2), key=lambda number: (slowest(number), -number))
    each, more = divmod(num_blocks - of_last, stages - 1)
    # The first stages keep more micro-batches in flight, so it is later ones that get one block more.
    sizes = [each] * (stages - 1 - more) + [each + 1] * more + [of_last]
    starts = [sum(sizes[:stage]) for stage in range(stages)]
    blocks = tuple(range(start, start + size) for start, size in zip(starts, sizes, strict=True))
    costs = [size * block + head * (stage == stages - 1) for stage, size in enumerate(sizes)]
    return StageSplit(blocks, tuple(cost / flops for cost in costs))


# ------------------------------------------------------------------------------------------------ the stages


class PassThrough(nn.Module):
    """In the place of a block that another stage has."""

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        return hidden_states


def _shallow_copy(module: nn.Module) -> Any:
    twin = copy.copy(module)
    twin._modules = module._modules.copy()
    return twin


def _keep(model: Any, blocks: set[int], first: bool, last: bool) -> None:
    """Drop all of ``model`` but these blocks, the embeddings of the first stage and the head of the last.

    A tied head remains the embedding's matrix, also by name.
    """
    backbone = model.transformer
    backbone.h = nn.ModuleList(block if i in blocks else PassThrough() for i, block in enumerate(backbone.h))
    if not first:
        backbone.wpe, backbone.drop = None, nn.Identity()
        if not (last and model.config.tie_word_embeddings):
            backbone.wte = None
    if not last:
        backbone.ln_f, model.lm_head = nn.Identity(), None


class StageModule(nn.Module):
    """Token ids or hidden states to hidden states (batch, seq, hidden), or on the last stage to the loss.

    It shares its weights with ``model``.
    """

    def __init__(
        self,
        model: ScratchGPTForCausalLM,
        blocks: range,
        first: bool,
        last: bool,
        autocast: Callable[[], AbstractContextManager],
    ):
        super().__init__()
        self.model = _shallow_copy(model)
        self.model.transformer = _shallow_copy(model.transformer)
        _keep(self.model, set(blocks), first, last)
        self.first, self.last, self.autocast = first, last, autocast
        self.blocks = [self.model.transformer.h[i] for i in blocks]
        if not first and model.config.position_embedding_type == "learned":  # they are in the hidden states already
            self.model.transformer.config = copy.copy(model.config)
            self.model.transformer.config.position_embedding_type = "none"

    def forward(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        num_items_in_batch: int,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        arguments: dict[str, Any] = {("input_ids" if self.first else "inputs_embeds"): inputs, "use_cache": False}
        with self.autocast():
            if not self.last:
                return self.model.transformer(position_ids=position_ids, **arguments).last_hidden_state
            return self.model(
                position_ids=position_ids,
                shift_labels=targets,
                num_items_in_batch=num_items_in_batch,
                skip_logits=True,
                **arguments,
            ).loss


# ------------------------------------------------------------------------------------------------ the pipeline


class Pipeline(nn.Module):
    """This process's stages of a model of which the other processes of a mesh (pipeline, data) have the rest.

    ``model``, whole and the same on all of them or empty (on torch's meta device), is reduced to what this one holds,
    under the names of the whole.
    """

    def __init__(
        self,
        model: ScratchGPTForCausalLM,
        mesh: DeviceMesh,
        schedule: str,
        context_length: int,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
    ):
        super().__init__()
        self.group, self.data_group = (mesh[name].get_group() for name in mesh.mesh_dim_names)
        self.rank, self.size = self.group.rank(), self.group.size()
        self.schedule, self.device = schedule, device
        self.num_stages = self.size * STAGES_PER_PROCESS[schedule]
        self.split = split_into_stages(model.config, context_length, self.num_stages)
        own = range(self.rank, self.num_stages, self.size)
        self.stages = nn.ModuleList(
            StageModule(model, self.split.blocks[stage], stage == 0, stage == self.num_stages - 1, autocast)
            for stage in own
        )
        _keep(model, {i for stage in own for i in self.split.blocks[stage]}, 0 in own, self.num_stages - 1 in own)
        self.model = model if next(model.parameters()).is_meta else model.to(device)
        if model.config.tie_word_embeddings:
            ends = [dist.get_global_rank(self.group, rank) for rank in (0, self.size - 1)]
            self.tied_group, _ = dist.new_subgroups_by_enumeration(_of_all_processes(ends))
        self.loss_factor = 1.0
        self._schedules: dict[tuple[int, torch.Size], Any] = {}

    @property
    def tied_end(self) -> nn.Parameter | None:
        """This process's copy of the matrix that the first stage embeds with and the last one has as its head."""
        tied = self.model.config.tie_word_embeddings and self.model.transformer.wte is not None
        return self.model.transformer.wte.weight if tied else None

    @property
    def is_sharded(self) -> bool:
        """Whether the processes of the data group have parts of the same stages."""
        return isinstance(self.stages[0], FSDPModule)

    def materialize(self) -> None:
        """See :func:`layout.make_room`."""
        for stage in self.stages:
            stage.to_empty(device=self.device)
            init_buffers(stage.model, self.device)
        init_buffers(self.model, self.device)

    def forward_backward(self, batches: list[Batch], num_targets: int, loss_factor: float = 1.0) -> torch.Tensor:
        """The loss of ``batches``, one micro-batch each, in nats per ``num_targets``: on every process of the pipeline.

        The gradients, times ``loss_factor``, are summed over the copies of the pipeline that have other data.
        """
        # parts of gradients are averaged over the processes that share a stage; what we want is their sum
        self.loss_factor = loss_factor * (self.data_group.size() if self.is_sharded else 1)
        targets = torch.cat([batch.targets for batch in batches])
        arguments: dict[str, Any] = {"targets": targets, "num_items_in_batch": num_targets}
        if batches[0].position_ids is not None:
            arguments["position_ids"] = torch.cat([batch.position_ids for batch in batches])
        inputs = (torch.cat([batch.input_ids for batch in batches]),) if self.rank == 0 else ()
        losses: list[torch.Tensor] = []
        schedule = self._schedule(len(batches), batches[0].input_ids.shape)
        schedule.step(*inputs, target=targets, losses=losses, return_outputs=False, **arguments)
        self._reduce_gradients()
        loss = torch.stack(losses).detach().sum() / self.loss_factor if losses else torch.zeros((), device=self.device)
        dist.all_reduce(loss, group=self.group)
        return loss

    def _reduce_gradients(self) -> None:
        if self.data_group.size() > 1 and not self.is_sharded:
            for parameter in self.model.parameters():
                dist.all_reduce(parameter.grad, group=self.data_group)
        if self.tied_end is not None:
            dist.all_reduce(to_local(self.tied_end.grad), group=self.tied_group)

    def _schedule(self, micro_batches: int, shape: torch.Size) -> Any:
        """The schedule for so many micro-batches of this shape."""
        if (micro_batches, shape) not in self._schedules:
            ids = torch.empty(shape, dtype=torch.int64, device="meta")
            hidden = torch.empty(*shape, self.model.config.hidden_size, device="meta", requires_grad=True)
            loss = torch.empty((), device="meta", requires_grad=True)
            stages = [
                PipelineStage(
                    stage,
                    self.rank + number * self.size,
                    self.num_stages,
                    self.device,
                    # given, so that torch need not find out by a pass through the model
                    input_args=ids if stage.first else hidden,
                    output_args=loss if stage.last else hidden,
                    group=self.group,
                )
                for number, stage in enumerate(self.stages)
            ]
            of_loss = {"loss_fn": lambda loss, targets: loss * self.loss_factor, "scale_grads": False}
            self._schedules[micro_batches, shape] = (
                Schedule1F1B(stages[0], micro_batches, **of_loss)
                if self.schedule == "1f1b"
                else ScheduleInterleaved1F1B(stages, micro_batches, **of_loss)
            )
        return self._schedules[micro_batches, shape]

    @torch.no_grad()
    def sum_of_losses(self, batch: Batch) -> torch.Tensor:
        """The sum of the cross-entropies of a batch of any shape in nats, on every process of the pipeline."""
        inputs, loss = batch.input_ids, torch.zeros((), device=self.device)
        for index in range(self.num_stages):
            here, there = index % self.size, (index + 1) % self.size
            if here == self.rank:
                output = self.stages[index // self.size](inputs, batch.targets, 1, batch.position_ids)
                if index == self.num_stages - 1:
                    loss = output
                else:
                    dist.send(output, group=self.group, group_dst=there)
            elif there == self.rank and index < self.num_stages - 1:
                inputs = torch.empty(*batch.input_ids.shape, self.model.config.hidden_size, device=self.device)
                dist.recv(inputs, group=self.group, group_src=here)
        dist.broadcast(loss, group=self.group, group_src=self.size - 1)
        return loss

    def gather_full(self, tensors: Mapping[str, torch.Tensor], copy: bool = False) -> dict[str, torch.Tensor]:
        """The tensors of all stages by name, whole and tied ones once: on the first process, on the CPU.

        All processes call it. What is there already is not copied, unless ``copy`` says so.
        """
        if self.rank > 0 and self.tied_end is not None:
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(EMBEDDING)}
        described: list[Any] = [None] * self.size
        own = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        dist.all_gather_object(described, own, group=self.group)
        whole: dict[str, torch.Tensor] = {}
        for source in range(self.size):
            for name, (shape, dtype) in described[source].items():
                if self.rank == source:
                    tensor = tensors[name].detach()
                    if isinstance(tensor, DTensor):
                        tensor = tensor.full_tensor()
                if self.data_group.rank() > 0:
                    continue
                if self.rank == source == 0:
                    whole[name] = tensor.to("cpu", copy=copy).contiguous()
                elif self.rank == source:
                    dist.send(tensor.to(self.device).contiguous(), group=self.group, group_dst=0)
                elif self.rank == 0:
                    buffer = torch.empty(shape, dtype=dtype, device=self.device)
                    dist.recv(buffer, group=self.group, group_src=source)
                    whole[name] = buffer.cpu()
        return whole


def _of_all_processes(own: list[int]) -> list[list[int]]:
    """``own`` of every process, without repetition: groups are made by all processes together."""
    lists: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, own)
    return [list(one) for one in sorted({tuple(one) for one in lists})]


# ------------------------------------------------------------------------------------------------ the layout


class PipelineStrategy(Strategy):
    """Pipelines side by side with other data; process p has place p // pipelines in its own."""

    def __init__(self, strategy: Strategy, settings: PretrainSettings, context_length: int):
        self.settings, self.context_length = settings.parallel, context_length
        places, side_by_side = self.settings.pipeline, strategy.world_size // self.settings.pipeline
        data = "dp_shard" if strategy.uses_fsdp else "data"
        mesh = init_device_mesh(strategy.device.type, (places, side_by_side), mesh_dim_names=("pipeline", data))
        super().__init__(strategy.accelerator, "pipeline x fsdp2" if strategy.uses_fsdp else "pipeline", mesh)
        self.places = places
        self.pipeline: Pipeline

    @property
    def dp_size(self) -> int:
        return self.world_size // self.places

    @property
    def dp_rank(self) -> int:
        return self.rank % self.dp_size

    @property
    def rng_rank(self) -> int:
        return self.rank

    def device_batch_size(self, rows: int, asked: int | None) -> int:
        return micro_batch_size(self.settings, rows, asked)

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return super().all_reduce_sum(tensor) / self.places  # in each place of a pipeline is the same

    def parallelize(self, model: Any, precision: str) -> Pipeline:
        assert self.mesh is not None
        schedule = self.settings.pipeline_schedule
        autocasting = functools.partial(autocast, self.device.type, precision)
        empty = next(model.parameters()).is_meta
        self.pipeline = Pipeline(model, self.mesh, schedule, self.context_length, self.device, autocasting)
        if self.uses_fsdp:
            for stage in self.pipeline.stages:
                self._shard(stage, stage.blocks, precision, (stage,))
        self._verify_sharding(model)
        if empty:
            self.pipeline.materialize()
        return self.pipeline

    @staticmethod
    def unwrap(model: nn.Module) -> Any:
        return model.model

    def forward_backward(
        self, model: Any, batches: Sequence[Batch], num_targets: int, precision: str, loss_scale: float = 1.0
    ) -> torch.Tensor:
        return model.forward_backward([batch.to(self.device) for batch in batches], num_targets, loss_scale)

    def score(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return model.sum_of_losses(batch), (batch.targets != IGNORE_INDEX).sum()

    def grad_norm_weight(self, parameter: nn.Parameter) -> float:
        return (0.5 if parameter is self.pipeline.tied_end else 1.0) * num_shards(parameter) / self.dp_size

    def gather_full(self, tensors: Mapping[str, torch.Tensor], copy: bool = False) -> dict[str, torch.Tensor]:
        return self.pipeline.gather_full(tensors, copy)

    def describe(self, model: nn.Module, precision: str, data: str) -> list[str]:
        first, *others = super().describe(model, precision, data)
        return [f"{first}, {self.settings.pipeline_schedule}", *self.pipeline.split.describe(self.places), *others]


def micro_batch_size(settings: ParallelSettings, rows: int, asked: int | None) -> int:
    """Of the ``rows`` that a pipeline reads for a step; ``asked``: training.device_batch_size.

    Raises:
        UserError: the schedule cannot run so many micro-batches.
    """
    micro_batches = settings.pipeline_microbatches
    if asked and micro_batches:
        raise UserError(
            "give --training.device_batch_size or --parallel.pipeline_microbatches, not both: each says how the rows of "
            "a step are divided"
        )
    if asked is None:
        micro_batches = micro_batches or min(rows, 4 * settings.pipeline)
        if rows % micro_batches:
            raise UserError(
                f"the {rows} rows per pipeline and step do not divide into {micro_batches} micro-batches: give "
                "--parallel.pipeline_microbatches or another --training.total_batch_size"
            )
        asked = rows // micro_batches
    micro_batches = rows // asked
    advice = "give more --parallel.pipeline_microbatches, and a --training.total_batch_size that has the rows"
    if settings.pipeline_schedule == "1f1b" and micro_batches < settings.pipeline:
        raise UserError(f"{micro_batches} micro-batches cannot fill the {settings.pipeline} stages of 1f1b: {advice}")
    if settings.pipeline_schedule == "interleaved1f1b" and micro_batches % settings.pipeline:
        raise UserError(
            f"interleaved1f1b takes a multiple of --parallel.pipeline {settings.pipeline} micro-batches, and a step has "
            f"{micro_batches}: {advice}"
        )
    return asked


def build_pipeline_strategy(
    strategy: Strategy, settings: PretrainSettings, config: ScratchGPTConfig, context_length: int
) -> PipelineStrategy:
    """In place of ``layout``, which the configuration file of `accelerate launch` asks for.

    Raises:
        UserError: the processes, the model or the settings do not allow the pipeline that was asked for.
    """
    asked = f"--parallel.pipeline is {settings.parallel.pipeline}"
    if strategy.name not in ("single", "ddp", "fsdp2"):
        raise UserError(
            f"{asked}, the configuration file says {strategy.name}: take configs/accelerate/pipeline.yaml, or "
            "pipeline_fsdp2.yaml"
        )
    if strategy.world_size % settings.parallel.pipeline:
        raise UserError(f"{asked}; it must divide the number of processes, which is {strategy.world_size}")
    if strategy.name == "fsdp2" and strategy.world_size == settings.parallel.pipeline:
        raise UserError(
            f"{asked}, and so is the number of processes: no two share a stage. Take configs/accelerate/pipeline.yaml"
        )
    if strategy.name == "fsdp2" and strategy.offloads_to_cpu:
        raise UserError(f"{asked} and fsdp_offload_params is true, which is not tested with pipelines: leave it false")
    stages = settings.parallel.pipeline * STAGES_PER_PROCESS[settings.parallel.pipeline_schedule]
    if stages > config.num_hidden_layers:
        raise UserError(
            f"{asked} with {settings.parallel.pipeline_schedule}, that is {stages} stages, but the model has only "
            f"{config.num_hidden_layers} blocks, of which each stage needs one"
        )
    if settings.training.batch_warmup_steps:
        raise UserError(
            f"{asked} and --training.batch_warmup_steps is {settings.training.batch_warmup_steps}: a small batch would "
            "have too few micro-batches for the stages; leave it at 0"
        )
    for name in ("sample_every", "benchmark_every"):
        if getattr(settings.training, name) is not None:
            raise UserError(
                f"{asked} and --training.{name} is given: no process has the model that would write; drop it"
            )
    return PipelineStrategy(strategy, settings, context_length)
