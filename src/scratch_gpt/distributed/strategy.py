"""Placement of a model and its optimizer on the ranks of a run.

Accelerate provides processes and devices and reads its configuration file. torch provides the means:
DistributedDataParallel, and `fully_shard` for FSDP2 (Zhao et al., 2023, arXiv:2304.11277; per parameter since torch 2.6)
and HSDP, both also combined with tensor or context parallelism. Accelerate's `prepare` is not used: under bf16 it reduces
gradients in bf16 and returns a bf16 loss, and its activation checkpointing recomputes with other random numbers.

The trainer asks a `Strategy` which sequences to read, for forward and backward, and for norms and sums over all ranks.
Checkpoints hold full tensors by name and nothing of the strategy, so that any strategy resumes from any other.
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

from scratch_gpt.compute.compile import is_compiled
from scratch_gpt.compute.precision import COMPUTE_DTYPES, autocast
from scratch_gpt.data.batches import Batch
from scratch_gpt.distributed import context_parallel
from scratch_gpt.distributed.dtensor import full_shape, num_shards, to_local
from scratch_gpt.distributed.materialize import materialize
from scratch_gpt.distributed.optimizer import Optimizers
from scratch_gpt.distributed.safetensors_reader import SafetensorsReader, load_weights
from scratch_gpt.distributed.tensor_parallel import apply_tensor_parallel, parameters_with_partial_gradients
from scratch_gpt.errors import UserError
from scratch_gpt.evaluation.bits_per_byte import score_batch
from scratch_gpt.model.modeling_scratch_gpt import ScratchGPTBlock


class Strategy:
    """One model on all ranks of the launch. Every method is called by all ranks.

    ``name`` is single, ddp, fsdp2, hsdp or tp, or a combination such as "fsdp2 x tp" or "fsdp2 x cp". ``mesh`` arranges
    the ranks in named dimensions. Default: no sharding. ``plugin`` has Accelerate's settings of FSDP. Default: those of
    ``accelerator``.
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
        """The number of ranks that compute the same sequences together."""
        return self.tp_size * self.cp_size

    @property
    def dp_size(self) -> int:
        """The number of data-parallel ranks: the sequences of a step are divided by it."""
        return self.world_size // self.model_parallel_size

    @property
    def dp_rank(self) -> int:
        """The data-parallel rank of this process, which says which sequences it reads."""
        return self.rank // self.model_parallel_size

    @property
    def rng_rank(self) -> int:
        """Ranks with the same value generate the same random numbers, as tensor parallelism needs for dropout."""
        return self.rank // self.tp_size

    def shard_batch(self, batch: Batch, model: nn.Module) -> tuple[Batch, Any]:
        """Return the positions of ``batch`` that this rank computes, and the attention mask to pass to ``model``."""
        if self.cp_size == 1:
            return batch, None
        assert self.mesh is not None
        return context_parallel.shard_batch(batch, self.unwrap(model).config, self.mesh["cp"].get_group())

    def apply_context_parallel(self, backbone: Any) -> None:
        """Let ``backbone`` take and return full sequences under context parallelism; otherwise do nothing."""
        if self.cp_size > 1:
            assert self.mesh is not None
            context_parallel.apply_context_parallel(backbone, self.mesh["cp"].get_group())

    def device_batch_size(self, num_sequences: int, requested: int | None) -> int:
        """Return the sequences of one forward pass, on a rank that reads ``num_sequences`` for each step."""
        return requested or num_sequences

    @property
    def gradient_divide_factor(self) -> int:
        """The number of ranks over which the backward pass averages gradients."""
        return self.world_size // self.tp_size

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum ``tensor`` over all data; the same result on all ranks, bit for bit."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor / self.tp_size

    def broadcast_from_first_rank(self, compute: Callable[[], Any]) -> Any:
        """Run ``compute`` on the first rank of the model-parallel group; broadcast its result or exception."""
        if self.model_parallel_size == 1:
            return compute()
        assert self.mesh is not None and 1 in (self.tp_size, self.cp_size)
        mesh = self.mesh["tp" if self.tp_size > 1 else "cp"]
        outcome: list[Any] = [None, None]  # result, exception
        if mesh.get_local_rank() == 0:
            try:
                outcome[0] = compute()
            except Exception as error:  # noqa: BLE001 (raised below, on all ranks)
                outcome[1] = error
        dist.broadcast_object_list(outcome, group_src=0, group=mesh.get_group())
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    # ------------------------------------------------------------------------------------------------ model

    @property
    def is_sharded(self) -> bool:
        """Whether a rank holds only shards of the model's weights."""
        return self.mesh is not None

    @property
    def can_compile(self) -> bool:
        """Whether blocks can be compiled.

        Not under tensor parallelism: in torch 2.13 the backward pass of a compiled block loses the sharding of the weights
        and fails.
        """
        return self.tp_size == 1

    def check(self, optimizer: str, precision: str, compiled: bool) -> None:
        """Raise a UserError if this strategy does not support the settings of a run."""
        if compiled and not self.can_compile:
            raise UserError(
                "--training.compile is on, and torch's compiler does not take blocks whose matrices are sharded by tensor "
                "parallelism: leave it at auto, or take configs/accelerate/fsdp2.yaml"
            )

    def parallelize(self, model: Any, precision: str, roots: Sequence[nn.Module] | None = None) -> nn.Module:
        """Place ``model`` on the ranks, and return the module to call in its stead.

        ``model`` has the same weights on every rank, or is on the meta device; then its shards are allocated, not
        initialized. ``roots`` are the modules that are called from outside, together all that has weights; under FSDP each
        gathers the weights outside of the blocks. Default: ``model`` itself.

        Raises:
            UserError: The requested sharding is not in effect.
        """
        on_meta = next(model.parameters()).is_meta
        if not on_meta:
            model.to(self.device)
        wrapped: nn.Module = model
        if self.tp_size > 1:
            assert self.mesh is not None
            apply_tensor_parallel(model, self.mesh["tp"])
        if self.cp_size > 1:
            model.set_attn_implementation(context_parallel.ATTENTION)
        if self.uses_fsdp:
            self._fully_shard(model, model.transformer.h, precision, roots or (model,))
        elif self.name == "ddp":
            devices = [self.device.index] if self.device.type == "cuda" else None
            wrapped = DistributedDataParallel(model, device_ids=devices)
        self._verify_sharding(wrapped)
        if on_meta:
            materialize(model, torch.device("cpu") if self.offloads_to_cpu else self.device)
        return wrapped

    def _fully_shard(
        self, model: nn.Module, blocks: Iterable[nn.Module], precision: str, roots: Iterable[nn.Module]
    ) -> None:
        """Apply FSDP2: a block is gathered when it computes; embeddings, final norm and head are gathered with their root,
        once for forward and backward.

        Embeddings and head are one group because the loss multiplies by the head's weight without calling the head, and
        that weight may be the embedding's. The group stays float32, as embedding and residual stream do under autocast;
        blocks are gathered in the dtype to which autocast would cast their weights.
        """
        offload = CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if self.offloads_to_cpu else OffloadPolicy()

        def mixed_precision(dtype: torch.dtype) -> MixedPrecisionPolicy:
            return MixedPrecisionPolicy(
                param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32, cast_forward_inputs=False
            )

        common: dict[str, Any] = {"mesh": self._fsdp_mesh(), "offload_policy": offload}
        for block in blocks:
            fully_shard(
                block,
                mp_policy=mixed_precision(COMPUTE_DTYPES[precision]),
                reshard_after_forward=self.plugin.reshard_after_forward,
                **common,
            )
        # None keeps a root gathered until its backward pass; a frozen model has none, so it is resharded at once.
        is_trained = any(parameter.requires_grad for parameter in model.parameters())
        for root in roots:
            fully_shard(
                root,
                mp_policy=mixed_precision(torch.float32),
                reshard_after_forward=None if is_trained else True,
                **common,
            )

    def _fsdp_mesh(self) -> DeviceMesh:
        """Return the mesh of FSDP: (shards of a copy), or (copies, shards of a copy)."""
        assert self.mesh is not None
        shards = "dp_shard_cp" if self.cp_size > 1 else "dp_shard"  # Accelerate's name of both dimensions flattened
        return self.mesh[("dp_replicate", shards) if "dp_replicate" in self.mesh.mesh_dim_names else shards]

    @property
    def offloads_to_cpu(self) -> bool:
        """Whether shards stay in the memory of the CPU while they are not used."""
        return self.uses_fsdp and isinstance(self.plugin.cpu_offload, CPUOffloadPolicy)

    def _verify_sharding(self, model: nn.Module) -> None:
        if self.mesh is not None:
            fsdp_shards = self._fsdp_mesh().shape[-1] if self.uses_fsdp else 1
            wrong = [
                name
                for name, parameter in model.named_parameters()
                # tensor parallelism replicates biases and norms, and one of the two matrices of a LoRA adapter
                if num_shards(parameter)
                not in {fsdp_shards * self.tp_size, fsdp_shards if parameter.ndim == 1 or ".lora_" in name else 0}
                and not name.endswith("wpe.weight")
                and ".score." not in f".{name}"
            ]
            if wrong:
                raise UserError(
                    f"{self.name} was requested, but {', '.join(wrong[:3])} ({len(wrong)} parameters) are not in "
                    f"{fsdp_shards * self.tp_size} shards"
                )
        elif (self.name == "ddp") != isinstance(model, DistributedDataParallel):
            raise UserError(f"{self.name} was requested, but the model is a {type(model).__name__}")

    def wrap(self, model: nn.Module, optimizers: Optimizers) -> tuple[nn.Module, Optimizers]:
        """Wrap the sharded, initialized model and its optimizers."""
        return model, optimizers

    def load_weights(self, model: nn.Module, saved: SafetensorsReader) -> None:
        """Load the weights of ``model``, which has been wrapped."""
        load_weights(self.unwrap(model), saved)

    @staticmethod
    def unwrap(model: nn.Module) -> Any:
        """Return the model that :meth:`parallelize` and :meth:`wrap` have wrapped."""
        return model.module if isinstance(model, DistributedDataParallel) else model

    @contextmanager
    def micro_batch(self, model: Any, last: bool) -> Iterator[None]:
        """Enclose forward and backward of one micro-batch; communication that can wait is left to the ``last`` of a step.

        FSDP reduce-scatters the gradients of each micro-batch, because full gradients would not fit.
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
            The sum of this rank's cross-entropies in nats, divided by ``num_targets``, the targets of all ranks.
        """
        total = torch.zeros((), device=self.device)
        # The backward pass averages gradients over ranks; the gradient of the mean over all targets is their sum.
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
        """Return the sum of the cross-entropies in nats and the number of targets, of this rank's positions of ``batch``."""
        return score_batch(model, *self.shard_batch(batch, model))

    def backward(self, model: nn.Module, loss: torch.Tensor) -> None:
        """Run the backward pass of one micro-batch."""
        loss.backward()

    def _reduce_partial_gradients(self, model: Any) -> None:
        assert self.mesh is not None
        for parameter in model.parameters():  # torch may leave gradients sharded otherwise, or as partial sums
            if isinstance(parameter.grad, DTensor) and parameter.grad.placements != parameter.placements:
                parameter.grad = parameter.grad.redistribute(placements=parameter.placements)
        gradients = [to_local(parameter.grad) for parameter in parameters_with_partial_gradients(model)]
        if gradients:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat, group=self.mesh["tp"].get_group())
            for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def release_gathered_weights(self, model: Any) -> None:
        """Free the weights that a forward pass without a backward pass, as in evaluation, has left gathered."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    # ------------------------------------------------------------------------------------------------ gradients

    def grad_norm_weight(self, parameter: nn.Parameter) -> float:
        """Return the weight of this rank's gradient in the squared norm: equal copies on several ranks count once."""
        return num_shards(parameter) / self.world_size

    def local_gradients(self, parameters: Iterable[nn.Parameter]) -> tuple[list[torch.Tensor], list[float]]:
        """Return this rank's shards of the gradients, and the :meth:`grad_norm_weight` of each."""
        with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
        return [to_local(parameter.grad) for parameter in with_gradient], [
            self.grad_norm_weight(parameter) for parameter in with_gradient
        ]

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> float:
        """Scale the gradients so that their norm over the whole model is at most ``max_norm``; return the norm before."""
        gradients, weights = self.local_gradients(parameters)
        if not gradients:  # on no rank
            return 0.0
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        norms = torch.stack(torch._foreach_norm(gradients)).to(self.device, dtype)
        squares = norms.square() * torch.tensor(weights, dtype=dtype, device=self.device)
        total = squares.sum()
        if self.world_size > 1:
            dist.all_reduce(total)
        norm: float = total.sqrt().item()
        if norm > max_norm:
            torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))
        return norm

    # ------------------------------------------------------------------------------------------------ full tensors

    def gather_full(self, tensors: Mapping[str, torch.Tensor], copy: bool = False) -> dict[str, torch.Tensor]:
        """Gather ``tensors`` one by one, unsharded, on the CPU of the main process; other ranks get an empty dict.

        With ``copy``, tensors that are on the CPU already are copied as well.
        """
        full: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor):
                tensor = tensor.to(self.device).full_tensor()
            if self.is_main_process:
                full[name] = tensor.detach().to("cpu", copy=copy).contiguous()
        return full

    # ------------------------------------------------------------------------------------------------ description

    def describe(self, model: nn.Module, precision: str, data: str) -> list[str]:
        """Return lines that say what each rank runs, as observed on the live ``model``.

        ``data`` is the fingerprint of the token shards, or empty.

        Raises:
            UserError: Ranks read different data.
        """
        parameters = list(model.parameters())
        blocks = [block for block in self.unwrap(model).transformer.h if isinstance(block, ScratchGPTBlock)]
        num_sharded = sum(num_shards(parameter) > 1 for parameter in parameters)
        local = sum(to_local(p).numel() for p in parameters)
        total = sum(full_shape(p).numel() for p in parameters)
        num_recomputed = sum(block.gradient_checkpointing for block in blocks)
        num_compiled = sum(is_compiled(block) for block in blocks)
        line = (
            f"{num_sharded} of {len(parameters)} parameters sharded, {local:,} of {total:,} weights held; "
            f"{precision if precision != 'fp32' else 'float32'}, gradients reduced in float32; "
            f"{num_recomputed} of {len(blocks)} blocks recomputed, {num_compiled} compiled"
            + (f"; data {data[:8]}" if data else "")
        )
        lines = gather_object([line]) if self.world_size > 1 else [line]
        if len({line.rpartition(" ")[2] for line in lines}) > 1:
            raise UserError("the processes read different data: is the run directory on a file system that all share?")
        mesh = ""
        if self.mesh is not None:
            mesh = ", " + " x ".join(f"{n} {s}" for n, s in zip(self.mesh.mesh_dim_names, self.mesh.shape, strict=True))
        description = [f"{self.name} on {self.world_size} process(es){mesh}, {self.device.type}"]
        for line in dict.fromkeys(lines):
            ranks = [rank for rank, other in enumerate(lines) if other == line]
            who = "each" if len(ranks) == self.world_size else f"process {', '.join(map(str, ranks))}"
            description.append(f"{who}: {line}")
        return description
