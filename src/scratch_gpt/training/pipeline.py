"""Pipeline parallelism: the blocks of a model spread over processes, through which micro-batches flow.

A stage is a run of blocks; the first one also embeds the tokens and the last one has the head and the loss. The
schedules are those of `torch.distributed.pipelining`: 1F1B (Narayanan et al., 2019, arXiv:1806.03377), where a process
has one stage, and interleaved 1F1B (Narayanan et al., 2021, arXiv:2104.04473), where it has two that lie apart, so that
it waits less. What is computed is the step of a single process, the micro-batches of a pipeline being those of gradient
accumulation.

A stage is the model itself with holes in it, so that every parameter keeps its name and `modeling_scratch_gpt.py`
remains the only description of the forward pass.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from transformers.modeling_outputs import CausalLMOutputWithPast

from scratch_gpt.data.batches import Batch
from scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM
from scratch_gpt.training.footprint import flops_per_token

STAGES_PER_PROCESS = {"1f1b": 1, "interleaved1f1b": 2}
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"


# ------------------------------------------------------------------------------------------------ the split


@dataclass(frozen=True)
class Split:
    """Which blocks each stage has, and its share of the model's floating-point operations."""

    blocks: tuple[range, ...]
    shares: tuple[float, ...]

    def describe(self, processes: int) -> Iterator[str]:
        """One line for each stage; stage s is on process s modulo ``processes``."""
        last = len(self.blocks) - 1
        for stage, (blocks, share) in enumerate(zip(self.blocks, self.shares, strict=True)):
            parts = [f"blocks {blocks[0]} to {blocks[-1]}" if len(blocks) > 1 else f"block {blocks[0]}"]
            parts = ["embedding"] * (stage == 0) + parts + ["head and loss"] * (stage == last)
            yield f"stage {stage} on process {stage % processes}: {', '.join(parts)}, {share:.0%} of the FLOPs"


def split(config: ScratchGPTConfig, context_length: int, stages: int) -> Split:
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
    return Split(blocks, tuple(cost / flops for cost in costs))


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
    """Drop all of ``model`` but these blocks, the embeddings of the first stage and the head of the last."""
    backbone = model.transformer
    backbone.h = nn.ModuleList(block if i in blocks else PassThrough() for i, block in enumerate(backbone.h))
    if not first:
        backbone.wte, backbone.wpe, backbone.drop = None, None, nn.Identity()
    if not last:
        backbone.ln_f, model.lm_head = nn.Identity(), None


class Stage(nn.Module):
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
        if not first and model.config.position_embedding_type == "learned":  # they are in the hidden states already
            self.model.transformer.config = copy.copy(model.config)
            self.model.transformer.config.position_embedding_type = "none"

    def forward(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: int,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        arguments: dict[str, Any] = {("input_ids" if self.first else "inputs_embeds"): inputs, "use_cache": False}
        with self.autocast():
            if not self.last:
                return self.model.transformer(position_ids=position_ids, **arguments).last_hidden_state
            return self.model(
                position_ids=position_ids,
                labels=labels,
                shift_labels=labels,
                num_items_in_batch=num_items_in_batch,
                skip_logits=True,
                **arguments,
            ).loss


# ------------------------------------------------------------------------------------------------ the pipeline


class Pipeline(nn.Module):
    """This process's stages of a model of which the other processes of a mesh (pipeline, data) have the rest.

    ``model``, whole and the same on all of them, is reduced to what this one holds, under the names of the whole.
    """

    def __init__(
        self,
        model: ScratchGPTForCausalLM,
        mesh: DeviceMesh,
        schedule: str,
        context_length: int,
        autocast: Callable[[], AbstractContextManager],
    ):
        super().__init__()
        self.group, self.data_group = mesh["pipeline"].get_group(), mesh["data"].get_group()
        self.rank, self.size = self.group.rank(), self.group.size()
        self.device = next(model.parameters()).device
        self.schedule = schedule
        self.num_stages = self.size * STAGES_PER_PROCESS[schedule]
        self.split = split(model.config, context_length, self.num_stages)
        own = range(self.rank, self.num_stages, self.size)
        self.stages = nn.ModuleList(
            Stage(model, self.split.blocks[stage], stage == 0, stage == self.num_stages - 1, autocast) for stage in own
        )
        _keep(model, {i for stage in own for i in self.split.blocks[stage]}, 0 in own, self.num_stages - 1 in own)
        self.model = model

        self.tied_end: nn.Parameter | None = None
        """This process's copy of a matrix that is both embedding and head."""
        if model.config.tie_word_embeddings:
            self.tied_end = dict(model.named_parameters()).get(EMBEDDING if self.rank == 0 else HEAD)
            ends = [dist.get_global_rank(self.group, rank) for rank in (0, self.size - 1)]
            self.tied_group, _ = dist.new_subgroups_by_enumeration(_of_all_processes(ends))
        self.loss_factor = 1.0
        self._schedules: dict[tuple[int, torch.Size], Any] = {}

    def forward_backward(self, batches: list[Batch], num_targets: int, loss_factor: float = 1.0) -> torch.Tensor:
        """The loss of ``batches``, one micro-batch each, in nats per ``num_targets``: on every process of the pipeline.

        The gradients, times ``loss_factor``, are summed over the copies of the pipeline that have other data.
        """
        self.loss_factor = loss_factor
        labels = torch.cat([batch.labels for batch in batches])
        arguments: dict[str, Any] = {"labels": labels, "num_items_in_batch": num_targets}
        if batches[0].position_ids is not None:
            arguments["position_ids"] = torch.cat([batch.position_ids for batch in batches])
        inputs = (torch.cat([batch.input_ids for batch in batches]),) if self.rank == 0 else ()
        losses: list[torch.Tensor] = []
        schedule = self._schedule(len(batches), batches[0].input_ids.shape)
        schedule.step(*inputs, target=labels, losses=losses, return_outputs=False, **arguments)
        self._reduce_gradients()
        loss = torch.stack(losses).detach().sum() / loss_factor if losses else torch.zeros((), device=self.device)
        dist.all_reduce(loss, group=self.group)
        return loss

    def _reduce_gradients(self) -> None:
        for parameter in self.model.parameters():
            dist.all_reduce(parameter.grad, group=self.data_group)
        if self.tied_end is not None:
            dist.all_reduce(self.tied_end.grad, group=self.tied_group)

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
            of_loss = {"loss_fn": lambda loss, labels: loss * self.loss_factor, "scale_grads": False}
            self._schedules[micro_batches, shape] = (
                Schedule1F1B(stages[0], micro_batches, **of_loss)
                if self.schedule == "1f1b"
                else ScheduleInterleaved1F1B(stages, micro_batches, **of_loss)
            )
        return self._schedules[micro_batches, shape]

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        labels: torch.Tensor,
        num_items_in_batch: int,
        **arguments: Any,
    ) -> CausalLMOutputWithPast:
        """The loss of one batch of any shape, without gradients, on every process of the pipeline."""
        inputs, loss = input_ids, torch.zeros((), device=self.device)
        for index in range(self.num_stages):
            here, there = index % self.size, (index + 1) % self.size
            if here == self.rank:
                output = self.stages[index // self.size](inputs, labels, num_items_in_batch, position_ids)
                if index == self.num_stages - 1:
                    loss = output
                else:
                    dist.send(output, group=self.group, group_dst=there)
            elif there == self.rank and index < self.num_stages - 1:
                inputs = torch.empty(*input_ids.shape, self.model.config.hidden_size, device=self.device)
                dist.recv(inputs, group=self.group, group_src=here)
        dist.broadcast(loss, group=self.group, group_src=self.size - 1)
        return CausalLMOutputWithPast(loss=loss)

    def gather(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of all processes of the pipeline, by name, tied ones once: on its first process, on the CPU."""
        if self.rank > 0 and self.tied_end is not None:
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(HEAD)}
        described: list[Any] = [None] * self.size
        own = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        dist.all_gather_object(described, own, group=self.group)
        whole = {name: tensor.detach().cpu() for name, tensor in tensors.items()} if self.rank == 0 else {}
        for source in range(1, self.size):
            for name, (shape, dtype) in described[source].items():
                if self.rank == source:
                    dist.send(tensors[name].detach().to(self.device).contiguous(), group=self.group, group_dst=0)
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
