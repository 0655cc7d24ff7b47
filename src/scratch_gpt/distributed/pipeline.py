"""Pipeline parallelism: the blocks of a model are divided over ranks, through which micro-batches flow.

A stage is a run of consecutive blocks; the first stage also embeds the tokens, and the last one has the head and the loss.
The schedules are those of `torch.distributed.pipelining`: 1F1B (Narayanan et al., 2019, arXiv:1806.03377), with one stage
per rank, and interleaved 1F1B (Narayanan et al., 2021, arXiv:2104.04473), with two stages per rank that are not adjacent,
so that ranks idle less. The micro-batches are those of gradient accumulation, and the step equals that of one process.

A stage is the model itself with the other stages' modules removed, so that every parameter keeps its name and
`modeling_scratch_gpt.py` remains the only description of the forward pass.

Data-parallel copies of the pipeline read different data. With an FSDP2 configuration, the copies of a stage are sharded:
a stage is gathered for the first micro-batch, its gradients are reduce-scattered after the last one, and between steps only
the shards are kept, which torch's schedules do by themselves.
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

STAGES_PER_RANK = {"1f1b": 1, "interleaved1f1b": 2}
EMBEDDING = "transformer.wte.weight"


# ------------------------------------------------------------------------------------------------ the split


@dataclass(frozen=True)
class StageSplit:
    """The blocks of each stage, and its fraction of the model's floating-point operations."""

    blocks: tuple[range, ...]
    flops_fractions: tuple[float, ...]

    def describe(self, num_ranks: int) -> Iterator[str]:
        """Yield one line for each stage of a pipeline of ``num_ranks``; stage s is on rank s modulo ``num_ranks``."""
        last = len(self.blocks) - 1
        for stage, (blocks, fraction) in enumerate(zip(self.blocks, self.flops_fractions, strict=True)):
            parts = [f"blocks {blocks[0]} to {blocks[-1]}" if len(blocks) > 1 else f"block {blocks[0]}"]
            parts = ["embedding"] * (stage == 0) + parts + ["head and loss"] * (stage == last)
            yield f"stage {stage} on pipeline rank {stage % num_ranks}: {', '.join(parts)}, {fraction:.0%} of the FLOPs"


def split_into_stages(config: ScratchGPTConfig, context_length: int, num_stages: int) -> StageSplit:
    """Return the split whose slowest stage is fastest, in FLOPs; looking up an embedding is free."""
    flops = flops_per_token(config, context_length).total
    head = 6 * config.padded_vocab_size * config.hidden_size
    num_blocks = config.num_hidden_layers
    block = (flops - head) / num_blocks
    assert 2 <= num_stages <= num_blocks

    def slowest(in_last: int) -> float:
        in_others = -(-(num_blocks - in_last) // (num_stages - 1))  # rounded up
        return max(in_others * block, in_last * block + head)

    in_last = min(range(1, num_blocks - num_stages + 2), key=lambda number: (slowest(number), -number))
    in_each, remainder = divmod(num_blocks - in_last, num_stages - 1)
    # The first stages keep more micro-batches in flight, so later ones get the extra blocks.
    sizes = [in_each] * (num_stages - 1 - remainder) + [in_each + 1] * remainder + [in_last]
    starts = [sum(sizes[:stage]) for stage in range(num_stages)]
    blocks = tuple(range(start, start + size) for start, size in zip(starts, sizes, strict=True))
    costs = [size * block + head * (stage == num_stages - 1) for stage, size in enumerate(sizes)]
    return StageSplit(blocks, tuple(cost / flops for cost in costs))


# ------------------------------------------------------------------------------------------------ the stages


class PassThrough(nn.Module):
    """Stands in for a block that another stage has, and returns its input."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return hidden_states


def _shallow_copy(module: nn.Module) -> Any:
    """Copy ``module`` with the same parameters, buffers and children, which the copy may replace or drop."""
    shared = [
        *module.children(),
        *module.parameters(recurse=False),
        *module.buffers(recurse=False),
        *([module.config] if hasattr(module, "config") else []),
    ]
    return copy.deepcopy(module, memo={id(one): one for one in shared})


def _prune(model: Any, blocks: set[int], first: bool, last: bool) -> None:
    """Remove from ``model`` all but these blocks, the embeddings of the first stage and the head of the last.

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
    """One stage, sharing its weights with ``model``.

    The first stage takes token ids (batch, seq), others hidden states (batch, seq, hidden). The last stage returns the loss,
    others return hidden states.
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
        _prune(self.model, set(blocks), first, last)
        self.first, self.last, self.autocast = first, last, autocast
        self.blocks = [self.model.transformer.h[i] for i in blocks]
        if not first and model.config.position_embedding_type == "learned":  # the first stage has added them
            self.model.transformer.config = copy.copy(model.config)
            self.model.transformer.config.position_embedding_type = "none"

    def forward(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        num_items_in_batch: int,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        kwargs: dict[str, Any] = {("input_ids" if self.first else "inputs_embeds"): inputs, "use_cache": False}
        with self.autocast():
            if not self.last:
                return self.model.transformer(position_ids=position_ids, **kwargs).last_hidden_state
            return self.model(
                position_ids=position_ids,
                shift_labels=targets,
                num_items_in_batch=num_items_in_batch,
                skip_logits=True,
                **kwargs,
            ).loss


# ------------------------------------------------------------------------------------------------ the pipeline


class Pipeline(nn.Module):
    """This rank's stages of a model whose other stages are on the other ranks of ``mesh`` (pipeline, data).

    ``model`` has the same weights on every rank, or is on the meta device. It is pruned in place to what this rank holds,
    under the names of the full model.
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
        self.num_stages = self.size * STAGES_PER_RANK[schedule]
        self.split = split_into_stages(model.config, context_length, self.num_stages)
        local_stages = range(self.rank, self.num_stages, self.size)
        self.stages = nn.ModuleList(
            StageModule(model, self.split.blocks[stage], stage == 0, stage == self.num_stages - 1, autocast)
            for stage in local_stages
        )
        local_blocks = {i for stage in local_stages for i in self.split.blocks[stage]}
        _prune(model, local_blocks, 0 in local_stages, self.num_stages - 1 in local_stages)
        self.model = model if next(model.parameters()).is_meta else model.to(device)
        if model.config.tie_word_embeddings:
            first_and_last = [dist.get_global_rank(self.group, rank) for rank in (0, self.size - 1)]
            self.tied_group, _ = dist.new_subgroups_by_enumeration(_gather_distinct(first_and_last))
        self.loss_factor = 1.0
        self._schedules: dict[tuple[int, torch.Size], Any] = {}

    @property
    def tied_weight(self) -> nn.Parameter | None:
        """This rank's copy of a tied embedding, which the last stage has as its head; None if there is none here."""
        tied = self.model.config.tie_word_embeddings and self.model.transformer.wte is not None
        return self.model.transformer.wte.weight if tied else None

    @property
    def is_sharded(self) -> bool:
        """Whether the stages are sharded over the data-parallel ranks."""
        return isinstance(self.stages[0], FSDPModule)

    def materialize(self) -> None:
        """Allocate the stages of a model on the meta device; see :func:`materialize.materialize`."""
        for stage in self.stages:
            stage.to_empty(device=self.device)
            init_buffers(stage.model, self.device)
        init_buffers(self.model, self.device)

    def forward_backward(self, batches: list[Batch], num_targets: int, loss_factor: float = 1.0) -> torch.Tensor:
        """Run one step, each of ``batches`` being a micro-batch; all ranks of the pipeline return the loss.

        The gradients, times ``loss_factor``, are summed over the data-parallel copies of the pipeline.

        Returns:
            The sum of the cross-entropies of ``batches`` in nats, divided by ``num_targets``.
        """
        # sharded gradients are averaged over the data-parallel ranks, and should be summed
        self.loss_factor = loss_factor * (self.data_group.size() if self.is_sharded else 1)
        targets = torch.cat([batch.targets for batch in batches])
        kwargs: dict[str, Any] = {"targets": targets, "num_items_in_batch": num_targets}
        if batches[0].position_ids is not None:
            kwargs["position_ids"] = torch.cat([batch.position_ids for batch in batches])
        inputs = (torch.cat([batch.input_ids for batch in batches]),) if self.rank == 0 else ()
        losses: list[torch.Tensor] = []
        schedule = self._schedule(len(batches), batches[0].input_ids.shape)
        schedule.step(*inputs, target=targets, losses=losses, return_outputs=False, **kwargs)
        self._reduce_gradients()
        loss = torch.stack(losses).detach().sum() / self.loss_factor if losses else torch.zeros((), device=self.device)
        dist.all_reduce(loss, group=self.group)
        return loss

    def _reduce_gradients(self) -> None:
        if self.data_group.size() > 1 and not self.is_sharded:
            for parameter in self.model.parameters():
                dist.all_reduce(parameter.grad, group=self.data_group)
        if self.tied_weight is not None:
            dist.all_reduce(to_local(self.tied_weight.grad), group=self.tied_group)

    def _schedule(self, num_micro_batches: int, shape: torch.Size) -> Any:
        """Return the schedule for ``num_micro_batches`` of ``shape`` (batch, seq), built at its first use."""
        if (num_micro_batches, shape) not in self._schedules:
            ids = torch.empty(shape, dtype=torch.int64, device="meta")
            hidden = torch.empty(*shape, self.model.config.hidden_size, device="meta", requires_grad=True)
            loss = torch.empty((), device="meta", requires_grad=True)
            stages = [
                PipelineStage(
                    stage,
                    self.rank + number * self.size,
                    self.num_stages,
                    self.device,
                    # given, or torch infers the shapes by running the model
                    input_args=ids if stage.first else hidden,
                    output_args=loss if stage.last else hidden,
                    group=self.group,
                )
                for number, stage in enumerate(self.stages)
            ]
            loss_options = {"loss_fn": lambda loss, targets: loss * self.loss_factor, "scale_grads": False}
            self._schedules[num_micro_batches, shape] = (
                Schedule1F1B(stages[0], num_micro_batches, **loss_options)
                if self.schedule == "1f1b"
                else ScheduleInterleaved1F1B(stages, num_micro_batches, **loss_options)
            )
        return self._schedules[num_micro_batches, shape]

    @torch.no_grad()
    def loss_sum(self, batch: Batch) -> torch.Tensor:
        """Return the sum of the cross-entropies of a batch of any shape, in nats, on every rank of the pipeline."""
        inputs, loss = batch.input_ids, torch.zeros((), device=self.device)
        for stage in range(self.num_stages):
            rank, next_rank = stage % self.size, (stage + 1) % self.size
            if rank == self.rank:
                output = self.stages[stage // self.size](inputs, batch.targets, 1, batch.position_ids)
                if stage == self.num_stages - 1:
                    loss = output
                else:
                    dist.send(output, group=self.group, group_dst=next_rank)
            elif next_rank == self.rank and stage < self.num_stages - 1:
                inputs = torch.empty(*batch.input_ids.shape, self.model.config.hidden_size, device=self.device)
                dist.recv(inputs, group=self.group, group_src=rank)
        dist.broadcast(loss, group=self.group, group_src=self.size - 1)
        return loss

    def gather_full(self, tensors: Mapping[str, torch.Tensor], copy: bool = False) -> dict[str, torch.Tensor]:
        """Gather the tensors of all stages, unsharded, on the CPU of the first rank; tied ones once.

        With ``copy``, tensors that are on that CPU already are copied as well.
        """
        if self.rank > 0 and self.tied_weight is not None:
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(EMBEDDING)}
        specs: list[Any] = [None] * self.size
        local_specs = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        dist.all_gather_object(specs, local_specs, group=self.group)
        full: dict[str, torch.Tensor] = {}
        for source in range(self.size):
            for name, (shape, dtype) in specs[source].items():
                if self.rank == source:
                    tensor = tensors[name].detach()
                    if isinstance(tensor, DTensor):
                        tensor = tensor.full_tensor()
                if self.data_group.rank() > 0:
                    continue
                if self.rank == source == 0:
                    full[name] = tensor.to("cpu", copy=copy).contiguous()
                elif self.rank == source:
                    dist.send(tensor.to(self.device).contiguous(), group=self.group, group_dst=0)
                elif self.rank == 0:
                    buffer = torch.empty(shape, dtype=dtype, device=self.device)
                    dist.recv(buffer, group=self.group, group_src=source)
                    full[name] = buffer.cpu()
        return full


def _gather_distinct(ranks: list[int]) -> list[list[int]]:
    """Return the distinct lists of ``ranks`` over all processes, because process groups are created collectively."""
    lists: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, ranks)
    return [list(one) for one in sorted({tuple(one) for one in lists})]


# ------------------------------------------------------------------------------------------------ the strategy


class PipelineStrategy(Strategy):
    """Data-parallel copies of a pipeline: global rank r is pipeline rank r // copies of copy r % copies."""

    def __init__(self, strategy: Strategy, parallel: ParallelSettings, context_length: int):
        self.parallel, self.context_length = parallel, context_length
        self.pipeline_size = parallel.pipeline
        copies = strategy.world_size // self.pipeline_size
        data = "dp_shard" if strategy.uses_fsdp else "data"
        mesh = init_device_mesh(strategy.device.type, (self.pipeline_size, copies), mesh_dim_names=("pipeline", data))
        super().__init__(strategy.accelerator, "pipeline x fsdp2" if strategy.uses_fsdp else "pipeline", mesh)
        self.pipeline: Pipeline

    @property
    def dp_size(self) -> int:
        return self.world_size // self.pipeline_size

    @property
    def dp_rank(self) -> int:
        return self.rank % self.dp_size

    @property
    def rng_rank(self) -> int:
        return self.rank

    def device_batch_size(self, num_sequences: int, requested: int | None) -> int:
        return micro_batch_size(self.parallel, num_sequences, requested)

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return super().all_reduce_sum(tensor) / self.pipeline_size  # all ranks of a pipeline have the same

    def parallelize(self, model: Any, precision: str, roots: Sequence[nn.Module] | None = None) -> Pipeline:
        assert self.mesh is not None and roots is None
        schedule = self.parallel.pipeline_schedule
        autocasting = functools.partial(autocast, self.device.type, precision)
        on_meta = next(model.parameters()).is_meta
        self.pipeline = Pipeline(model, self.mesh, schedule, self.context_length, self.device, autocasting)
        if self.uses_fsdp:
            for stage in self.pipeline.stages:
                self._fully_shard(stage, stage.blocks, precision, (stage,))
        self._verify_sharding(model)
        if on_meta:
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
        return model.loss_sum(batch), (batch.targets != IGNORE_INDEX).sum()

    def grad_norm_weight(self, parameter: nn.Parameter) -> float:
        return (0.5 if parameter is self.pipeline.tied_weight else 1.0) * num_shards(parameter) / self.dp_size

    def gather_full(self, tensors: Mapping[str, torch.Tensor], copy: bool = False) -> dict[str, torch.Tensor]:
        return self.pipeline.gather_full(tensors, copy)

    def describe(self, model: nn.Module, precision: str, data: str) -> list[str]:
        first, *others = super().describe(model, precision, data)
        return [
            f"{first}, {self.parallel.pipeline_schedule}",
            *self.pipeline.split.describe(self.pipeline_size),
            *others,
        ]


def micro_batch_size(parallel: ParallelSettings, num_sequences: int, requested: int | None) -> int:
    """Return the sequences per micro-batch, if a pipeline reads ``num_sequences`` for each step.

    ``requested`` is training.device_batch_size. Default: from parallel.pipeline_microbatches.

    Raises:
        UserError: The schedule cannot run that number of micro-batches.
    """
    num_micro_batches = parallel.pipeline_microbatches
    if requested and num_micro_batches:
        raise UserError(
            "give --training.device_batch_size or --parallel.pipeline_microbatches, not both: each says how the sequences "
            "of a step are divided into micro-batches"
        )
    if requested is None:
        num_micro_batches = num_micro_batches or min(num_sequences, 4 * parallel.pipeline)
        if num_sequences % num_micro_batches:
            raise UserError(
                f"the {num_sequences} sequences per pipeline and step do not divide into {num_micro_batches} "
                "micro-batches: give --parallel.pipeline_microbatches or another --training.total_batch_size"
            )
        requested = num_sequences // num_micro_batches
    num_micro_batches = num_sequences // requested
    advice = "give more --parallel.pipeline_microbatches, and a --training.total_batch_size with that many sequences"
    if parallel.pipeline_schedule == "1f1b" and num_micro_batches < parallel.pipeline:
        raise UserError(
            f"{num_micro_batches} micro-batches cannot fill the {parallel.pipeline} stages of 1f1b: {advice}"
        )
    if parallel.pipeline_schedule == "interleaved1f1b" and num_micro_batches % parallel.pipeline:
        raise UserError(
            f"interleaved1f1b takes a multiple of --parallel.pipeline {parallel.pipeline} micro-batches, and a step has "
            f"{num_micro_batches}: {advice}"
        )
    return requested


def build_pipeline_strategy(
    strategy: Strategy, settings: PretrainSettings, config: ScratchGPTConfig, context_length: int
) -> PipelineStrategy:
    """Build a pipeline over the ranks of ``strategy``, the one that the launch's configuration file requests.

    Raises:
        UserError: The processes, the model or the settings do not allow the requested pipeline.
    """
    parallel, training = settings.parallel, settings.training
    requested = f"--parallel.pipeline is {parallel.pipeline}"
    if strategy.name not in ("single", "ddp", "fsdp2"):
        raise UserError(
            f"{requested}, the configuration file says {strategy.name}: take configs/accelerate/pipeline.yaml, or "
            "pipeline_fsdp2.yaml"
        )
    if strategy.world_size % parallel.pipeline:
        raise UserError(f"{requested}; it must divide the number of processes, which is {strategy.world_size}")
    if strategy.name == "fsdp2" and strategy.world_size == parallel.pipeline:
        raise UserError(
            f"{requested}, and so is the number of processes: no stage has two to be sharded over. Take "
            "configs/accelerate/pipeline.yaml"
        )
    if strategy.name == "fsdp2" and strategy.offloads_to_cpu:
        raise UserError(
            f"{requested} and fsdp_offload_params is true, which is not tested with pipelines: set it to false"
        )
    num_stages = parallel.pipeline * STAGES_PER_RANK[parallel.pipeline_schedule]
    if num_stages > config.num_hidden_layers:
        raise UserError(
            f"{requested} with {parallel.pipeline_schedule}, that is {num_stages} stages, but the model has only "
            f"{config.num_hidden_layers} blocks, and each stage needs one"
        )
    if training.batch_warmup_steps:
        raise UserError(
            f"{requested} and --training.batch_warmup_steps is {training.batch_warmup_steps}: a small batch would have too "
            "few micro-batches for the stages; leave it at 0"
        )
    for name in ("sample_every", "benchmark_every"):
        if getattr(training, name) is not None:
            raise UserError(
                f"{requested} and --training.{name} is given: no process has the full model that it needs; drop it"
            )
    return PipelineStrategy(strategy, parallel, context_length)
