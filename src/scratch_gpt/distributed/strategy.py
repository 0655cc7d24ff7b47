"""How a model is spread over the processes of a run: the one place that knows.

Accelerate brings processes and devices and reads its configuration file; torch brings the means: DistributedDataParallel,
and `fully_shard` for FSDP2 (Zhao et al., 2023, arXiv:2304.11277, per parameter since torch 2.6) and HSDP, both also over
a model that tensor parallelism has divided before, or whose rows context parallelism divides. Accelerate's `prepare` is
not used: under bf16 it reduces gradients in bf16 and returns a bf16 loss, and it recomputes activations with other random
numbers.

The loop asks a `Strategy` which rows to read, how much a loss counts, and for norms and sums over everything. Checkpoints
hold whole tensors by name and say nothing of the layout, so that any layout goes on from any other.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from scratch_gpt.compute.precision import COMPUTE_DTYPES, autocast
from scratch_gpt.data.batches import Batch
from scratch_gpt.distributed import context_parallel
from scratch_gpt.distributed.dtensor import full_shape, num_shards, to_local
from scratch_gpt.distributed.materialize import materialize
from scratch_gpt.distributed.optimizer import Optimizers
from scratch_gpt.distributed.safetensors_reader import SafetensorsReader, load_weights
from scratch_gpt.distributed.tensor_parallel import apply_tensor_parallel, partial_gradients
from scratch_gpt.errors import UserError
from scratch_gpt.evaluation.bits_per_byte import score_batch
from scratch_gpt.model.modeling_scratch_gpt import ScratchGPTBlock


class Strategy:
    """One model on all processes of the launch. Every method is called by all of them.

    ``strategy`` is single, ddp, fsdp2, hsdp or tp, or "fsdp2 x tp", "fsdp2 x cp"; ``mesh`` names the dimensions that the
    processes are arranged in; ``plugin`` has Accelerate's settings of FSDP, by default those of ``accelerator``.
    """

    def __init__(self, accelerator: Accelerator, name: str, mesh: DeviceMesh | None = None, plugin: Any = None):
        self.accelerator, self.name, self.mesh = accelerator, name, mesh
        self.plugin: Any = plugin or getattr(accelerator.state, "fsdp_plugin", None)
        self.device: torch.device = accelerator.device
        self.world_size: int = accelerator.num_processes
        self.rank: int = accelerator.process_index
        self.is_main_process: bool = accelerator.is_main_process
        sizes = {} if mesh is None else dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True))
        self.tp_size: int = sizes.get("tp", 1)
        self.cp_size: int = sizes.get("cp", 1)
        self.uses_fsdp: bool = "dp_shard" in sizes or "cp" in sizes

    # ------------------------------------------------------------------------------------------------ data

    @property
    def model_parallel_size(self) -> int:
        """How many processes share each row: its matrix products, or its columns."""
        return self.tp_size * self.cp_size

    @property
    def dp_size(self) -> int:
        """Into how many parts the rows of a step are divided."""
        return self.world_size // self.model_parallel_size

    @property
    def dp_rank(self) -> int:
        """Which part this process reads."""
        return self.rank // self.model_parallel_size

    @property
    def rng_rank(self) -> int:
        """Processes of the same one draw the same random numbers."""
        return self.rank // self.tp_size

    def shard_batch(self, batch: Batch, model: nn.Module) -> tuple[Batch, Any]:
        """Of the rows that this process reads, what it computes; and what the model is given as attention mask."""
        if self.cp_size == 1:
            return batch, None
        assert self.mesh is not None
        return context_parallel.shard_batch(batch, self.unwrap(model).config, self.mesh["cp"].get_group())

    def apply_context_parallel(self, backbone: Any) -> None:
        """Where processes share columns: let ``backbone`` be given whole rows, and give them back."""
        if self.cp_size > 1:
            assert self.mesh is not None
            context_parallel.apply_context_parallel(backbone, self.mesh["cp"].get_group())

    def device_batch_size(self, rows: int, asked: int | None) -> int:
        """Rows of one forward pass of a process that reads ``rows`` a step."""
        return asked or rows

    @property
    def gradient_divide_factor(self) -> int:
        """Over how many processes gradients are averaged, where their sum is wanted."""
        return self.world_size // self.tp_size

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` of every part of the data, added up; the same on all processes, bit for bit."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor / self.tp_size

    def broadcast_from_first_rank(self, compute: Callable[[], Any]) -> Any:
        """What ``compute`` gives, or raises, in the first of the processes that read the same rows; the others do not call it."""
        if self.model_parallel_size == 1:
            return compute()
        assert self.mesh is not None and 1 in (self.tp_size, self.cp_size)
        mesh = self.mesh["tp" if self.tp_size > 1 else "cp"]
        told: list[Any] = [None, None]
        if mesh.get_local_rank() == 0:
            try:
                told[0] = compute()
            except Exception as error:  # noqa: BLE001 (raised below, everywhere)
                told[1] = error
        dist.broadcast_object_list(told, group_src=0, group=mesh.get_group())
        if told[1] is not None:
            raise told[1]
        return told[0]

    # ------------------------------------------------------------------------------------------------ model

    @property
    def is_sharded(self) -> bool:
        """Whether a process holds only parts of the model."""
        return self.mesh is not None

    @property
    def can_compile(self) -> bool:
        """Whether blocks can be compiled: in torch 2.13 the backward pass of a compiled block forgets how tensor
        parallelism divides the weights, and fails.
        """
        return self.tp_size == 1

    def check(self, optimizer: str, precision: str, compiled: bool) -> None:
        """Raises a UserError if this layout cannot do what a run asks for, or has begun with."""
        if compiled and not self.can_compile:
            raise UserError(
                "--training.compile is on, and torch's compiler does not take blocks whose matrices are divided by tensor "
                "parallelism: leave it at auto, or take configs/accelerate/fsdp2.yaml"
            )

    def parallelize(self, model: Any, precision: str) -> nn.Module:
        """Put ``model`` in force, whole and the same on every process, or empty; returns what to call in its place.

        An empty one (on torch's meta device) has memory for its parts then, to be filled.

        Raises:
            UserError: the layout that was asked for did not come true.
        """
        return self.parallelize_roots(model, precision, (model,))

    def parallelize_roots(self, model: Any, precision: str, called: Iterable[nn.Module]) -> nn.Module:
        """:meth:`spread`, for a model of which ``called`` are called, together all that has weights."""
        empty = next(model.parameters()).is_meta
        if not empty:
            model.to(self.device)
        spread: nn.Module = model
        if self.tp_size > 1:
            assert self.mesh is not None
            apply_tensor_parallel(model, self.mesh["tp"])
        if self.cp_size > 1:
            model.set_attn_implementation(context_parallel.ATTENTION)
        if self.uses_fsdp:
            self._shard(model, model.transformer.h, precision, called)
        elif self.name == "ddp":
            devices = [self.device.index] if self.device.type == "cuda" else None
            spread = DistributedDataParallel(model, device_ids=devices)
        self._verify_sharding(spread)
        if empty:
            materialize(model, torch.device("cpu") if self.offloads_to_cpu else self.device)
        return spread

    def _shard(
        self, model: nn.Module, blocks: Iterable[nn.Module], precision: str, called: Iterable[nn.Module]
    ) -> None:
        """Each of the model's blocks is gathered when it computes; embeddings, final norm and head once for forward and
        backward, when ``called``.

        The loss multiplies by the head's weight without calling the head, whose weight may be that of the embedding: so
        they are one group, which belongs to the whole model. It stays float32, as autocast has embedding and residual
        stream; blocks are gathered in the dtype that autocast would cast them to.
        """
        offload = CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if self.offloads_to_cpu else OffloadPolicy()

        def policy(dtype: torch.dtype) -> MixedPrecisionPolicy:
            return MixedPrecisionPolicy(
                param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32, cast_forward_inputs=False
            )

        common: dict[str, Any] = {"mesh": self._shard_mesh(), "offload_policy": offload}
        for block in blocks:
            fully_shard(
                block,
                mp_policy=policy(COMPUTE_DTYPES[precision]),
                reshard_after_forward=self.plugin.reshard_after_forward,
                **common,
            )
        # None: torch keeps what a forward pass has gathered for the backward pass, which a frozen model does not have.
        again = None if any(parameter.requires_grad for parameter in model.parameters()) else True
        for module in called:
            fully_shard(module, mp_policy=policy(torch.float32), reshard_after_forward=again, **common)

    def _shard_mesh(self) -> DeviceMesh:
        """The processes that have parts of a copy, which share rows or not, and if there are several copies those too."""
        assert self.mesh is not None
        shards = "dp_shard_cp" if self.cp_size > 1 else "dp_shard"  # one dimension of Accelerate's, made of two
        return self.mesh[("dp_replicate", shards) if "dp_replicate" in self.mesh.mesh_dim_names else shards]

    @property
    def offloads_to_cpu(self) -> bool:
        """Whether parts of the model lie in the memory of the CPU while they do not compute."""
        return self.uses_fsdp and isinstance(self.plugin.cpu_offload, CPUOffloadPolicy)

    def _verify_sharding(self, model: nn.Module) -> None:
        if self.mesh is not None:
            shards = self._shard_mesh().shape[-1] if self.uses_fsdp else 1
            wrong = [
                name
                for name, parameter in model.named_parameters()
                # biases and norms are whole under tensor parallelism, and of two matrices of an adapter one
                if num_shards(parameter)
                not in {shards * self.tp_size, shards if parameter.ndim == 1 or ".lora_" in name else 0}
                and not name.endswith("wpe.weight")
                and ".score." not in f".{name}"
            ]
            if wrong:
                raise UserError(
                    f"{self.name} was asked for, but {', '.join(wrong[:3])} ({len(wrong)} parameters) are not in "
                    f"{shards * self.tp_size} shards"
                )
        elif (self.name == "ddp") != isinstance(model, DistributedDataParallel):
            raise UserError(f"{self.name} was asked for, but the model is a {type(model).__name__}")

    def wrap(self, model: nn.Module, optimizers: Optimizers) -> tuple[nn.Module, Optimizers]:
        """What to call in the place of a model that is spread and filled, and of the optimizers over its parameters."""
        return model, optimizers

    def load_weights(self, model: nn.Module, saved: SafetensorsReader) -> None:
        """Fill ``model``, which is in training."""
        load_weights(self.unwrap(model), saved)

    @staticmethod
    def unwrap(model: nn.Module) -> Any:
        return model.module if isinstance(model, DistributedDataParallel) else model

    @contextmanager
    def micro_batch(self, model: Any, last: bool) -> Iterator[None]:
        """Around forward and backward of one of several micro-batches: what can wait for the last is not communicated.

        Shards of gradients are added up at once, for whole ones would not fit where models are sharded.
        """
        if isinstance(model, DistributedDataParallel) and not last:
            with model.no_sync():
                yield
            return
        for module in model.modules() if self.uses_fsdp else ():
            if isinstance(module, FSDPModule):
                module.set_requires_all_reduce(last, recurse=False)
        yield
        if last and self.tp_size > 1:
            self._reduce_partial_gradients(model)

    def forward_backward(
        self, model: nn.Module, batches: Sequence[Batch], num_targets: int, precision: str, loss_scale: float = 1.0
    ) -> torch.Tensor:
        """Accumulate the gradients of a step's micro-batches, times ``loss_scale``.

        Returns:
            This rank's part of the step's loss, in nats per target of the whole step (``num_targets`` over all ranks).
        """
        total = torch.zeros((), device=self.device)
        # Data parallelism averages gradients over ranks; the gradient of the whole step's mean is their sum.
        factor = self.gradient_divide_factor * loss_scale
        for number, batch in enumerate(batches, start=1):
            batch, attention_mask = self.shard_batch(batch.to(self.device), model)
            with self.micro_batch(model, last=number == len(batches)):
                with autocast(self.device.type, precision):
                    loss = model(
                        input_ids=batch.input_ids,
                        attention_mask=attention_mask,
                        position_ids=batch.position_ids,
                        shift_labels=batch.targets,
                        num_items_in_batch=num_targets,
                    ).loss
                self.backward(model, loss * factor)
            total += loss.detach()
        return total

    def score(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of a batch's cross-entropies in nats and number of its targets, of the part that this rank computes."""
        return score_batch(model, *self.shard_batch(batch, model))

    def backward(self, model: nn.Module, loss: torch.Tensor) -> None:
        """The backward pass of one micro-batch."""
        loss.backward()

    def _reduce_partial_gradients(self, model: Any) -> None:
        assert self.mesh is not None
        for parameter in model.parameters():  # torch leaves gradients as they come: in parts, whole or as summands
            if isinstance(parameter.grad, DTensor) and parameter.grad.placements != parameter.placements:
                parameter.grad = parameter.grad.redistribute(placements=parameter.placements)
        gradients = [to_local(parameter.grad) for parameter in partial_gradients(model)]
        if gradients:
            together = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(together, group=self.mesh["tp"].get_group())
            for gradient, whole in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(whole.view_as(gradient))

    def release_gathered_weights(self, model: Any) -> None:
        """Give up the weights that a forward pass has gathered for a backward pass that does not come."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    # ------------------------------------------------------------------------------------------------ gradients

    def grad_norm_weight(self, parameter: nn.Parameter) -> float:
        """What this process's gradient counts for: of equal copies on several processes each is a part."""
        return num_shards(parameter) / self.world_size

    def local_gradients(self, parameters: Iterable[nn.Parameter]) -> tuple[list[torch.Tensor], list[float]]:
        """The gradients that this process holds, and the :meth:`share` of each."""
        there_is = [parameter for parameter in parameters if parameter.grad is not None]
        return [to_local(parameter.grad) for parameter in there_is], [
            self.grad_norm_weight(parameter) for parameter in there_is
        ]

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> float:
        """Scale the gradients so that their norm over the whole model is at most ``max_norm``; returns what it was."""
        pieces, shares = self.local_gradients(parameters)
        if not pieces:  # nowhere
            return 0.0
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        norms = torch.stack(torch._foreach_norm(pieces)).to(self.device, exact)
        squares = norms.square() * torch.tensor(shares, dtype=exact, device=self.device)
        total = squares.sum()
        if self.world_size > 1:
            dist.all_reduce(total)
        norm: float = total.sqrt().item()
        if norm > max_norm:
            torch._foreach_mul_(pieces, max_norm / (norm + 1e-6))
        return norm

    # ------------------------------------------------------------------------------------------------ whole tensors

    def gather_full(self, tensors: Mapping[str, torch.Tensor], copy: bool = False) -> dict[str, torch.Tensor]:
        """``tensors`` whole and on the CPU of the main process, one after the other; nothing on the other processes.

        What is whole on the CPU already is not copied, unless ``copy`` says so.
        """
        whole: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor):
                tensor = tensor.to(self.device).full_tensor()
            if self.is_main_process:
                whole[name] = tensor.detach().to("cpu", copy=copy).contiguous()
        return whole

    # ------------------------------------------------------------------------------------------------ words

    def describe(self, model: nn.Module, precision: str, data: str) -> list[str]:
        """What the processes really run, read off the live ``model``; ``data`` is the fingerprint of the shards,
        or empty.

        Raises:
            UserError: processes read different data.
        """
        parameters = list(model.parameters())
        blocks = [block for block in self.unwrap(model).transformer.h if isinstance(block, ScratchGPTBlock)]
        sharded = sum(num_shards(parameter) > 1 for parameter in parameters)
        held, number = sum(to_local(p).numel() for p in parameters), sum(full_shape(p).numel() for p in parameters)
        recomputed = sum(block.gradient_checkpointing for block in blocks)
        compiled = sum(block._compiled_call_impl is not None for block in blocks)
        line = (
            f"{sharded} of {len(parameters)} parameters sharded, {held:,} of {number:,} numbers held; "
            f"{precision if precision != 'fp32' else 'float32'}, gradients reduced in float32; "
            f"{recomputed} of {len(blocks)} blocks recomputed, {compiled} compiled"
            + (f"; data {data[:8]}" if data else "")
        )
        lines = gather_object([line]) if self.world_size > 1 else [line]
        if len({line.rpartition(" ")[2] for line in lines}) > 1:
            raise UserError("the processes read different data: is the run directory on a file system that all share?")
        mesh = ""
        if self.mesh is not None:
            mesh = ", " + " x ".join(f"{n} {s}" for n, s in zip(self.mesh.mesh_dim_names, self.mesh.shape, strict=True))
        said = [f"{self.name} on {self.world_size} process(es){mesh}, {self.device.type}"]
        for line in dict.fromkeys(lines):
            processes = [rank for rank, its in enumerate(lines) if its == line]
            who = "each" if len(processes) == self.world_size else f"process {', '.join(map(str, processes))}"
            said.append(f"{who}: {line}")
        return said
