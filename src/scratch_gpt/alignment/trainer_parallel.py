"""Run `transformers.Trainer` and TRL's trainers under DeepSpeed ZeRO, tensor and context parallelism, and FSDP2.

    class OurTrainer(ParallelTrainerMixin, SFTTrainer): ...

All overrides of Trainer, TRL and Accelerate that this takes are in this file. Under ZeRO, tensor and context parallelism the
mixin runs the model through a :class:`~scratch_gpt.distributed.strategy.Strategy` and lets Trainer and TRL believe that they
run plain data parallelism: left to themselves they would set DeepSpeed up with weights and gradients in bf16 (and on CPUs not
at all), and would not shard the models of this package.

`tests/alignment/test_private_attributes.py` lists every private attribute of these libraries that the alignment code relies
on, with its signature.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env, set_seed
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from transformers import Trainer
from trl.models.utils import add_hooks, remove_hooks

from scratch_gpt.alignment.models import unwrap_peft
from scratch_gpt.console import print0
from scratch_gpt.distributed import context_parallel
from scratch_gpt.distributed.deepspeed import DeepSpeedStrategy
from scratch_gpt.distributed.dtensor import num_shards
from scratch_gpt.distributed.launch import launch_state
from scratch_gpt.distributed.optimizer import Optimizers, group_by_mesh
from scratch_gpt.distributed.strategy import Strategy
from scratch_gpt.errors import UserError
from scratch_gpt.model.modeling_scratch_gpt import ScratchGPTPreTrainedModel


class ParallelTrainerMixin(Trainer):
    """Add to a trainer, as its first base class, to train under the strategies of `scratch_gpt.distributed`."""

    optimizer: Any
    frozen_models: Sequence[Any] = ()
    """Models that are evaluated but not trained, such as reward models; a reference in ``ref_model`` need not be listed."""
    generates = False
    """Whether the trainer generates completions; ranks of one model-parallel group then generate the same ones."""
    deepspeed: DeepSpeedStrategy | None = None
    """The ZeRO strategy, if the launch requests DeepSpeed."""
    strategy: Strategy | None = None
    """The tensor- or context-parallel strategy, if the launch requests one."""

    # ------------------------------------------------------------------------------------------------ models

    @property
    def output_model(self) -> Any:
        """The unwrapped model that the run produces, including its adapters; for PPO, the policy."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def trained_models(self) -> list[Any]:
        """The unwrapped models whose weights are trained."""
        return [self.model]

    def all_frozen_models(self) -> list[Any]:
        """``frozen_models`` and the reference model, each once."""
        models = [*self.frozen_models, getattr(self, "ref_model", None)]
        return list({id(model): model for model in models if model is not None}.values())

    def apply_parallelism(self) -> None:
        """Shard the models where Accelerate does not do it itself; called once, before there is an optimizer."""
        if self.strategy is None:
            return
        precision = "bf16" if self.args.bf16 else "fp32"
        self.parallelize_trained_models(self.strategy, precision)
        frozen = [model for model in self.all_frozen_models() if isinstance(model, ScratchGPTPreTrainedModel)]
        for model in frozen:
            self.strategy.parallelize(model.requires_grad_(False), precision)
        for model in [*self.trained_models, *frozen]:
            self.strategy.apply_context_parallel(unwrap_peft(model).base_model)
        print0(f"layout     {self.strategy.describe(self.trained_models[0], precision, '')[0]}")

    def parallelize_trained_models(self, strategy: Strategy, precision: str) -> None:
        """Shard :attr:`trained_models` in place."""
        # TRL generates with the model inside the adapters, so that is the module to parallelize.
        strategy.parallelize(unwrap_peft(self.model), precision)

    def full_weights(self) -> dict[str, torch.Tensor] | None:
        """Gather the trained weights by name on the main process; None if the model is not sharded.

        All ranks must call it. With adapters only the adapters' weights are gathered.
        """
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # an evaluation leaves them gathered
        parameters = dict(self.model.named_parameters())
        if not any(num_shards(parameter) > 1 for parameter in parameters.values()):
            return None
        has_adapters = hasattr(self.output_model, "get_base_model")
        selected = {name: p for name, p in parameters.items() if p.requires_grad or not has_adapters}
        if self.deepspeed is not None:
            self.deepspeed.release_gathered_weights(self.deepspeed.engine)
            return self.deepspeed.gather_full(selected)
        return gather_full(selected, self.accelerator.is_main_process)

    # ------------------------------------------------------------------------------------------------ ranks

    @property
    def dp_size(self) -> int:
        """Number of data-parallel ranks: model-parallel groups, each of which reads its own sequences."""
        return self.args.world_size if self.strategy is None else self.strategy.dp_size

    @property
    def dp_rank(self) -> int:
        return self.args.process_index if self.strategy is None else self.strategy.dp_rank

    def get_tp_size(self) -> int:
        """Number of ranks that read the same sequences: Trainer divides its token and sample counts by it."""
        return 1 if self.strategy is None else self.strategy.model_parallel_size

    def broadcast_from_first_rank(self, compute: Callable[[], Any]) -> Any:
        """Run ``compute`` on the first rank of each model-parallel group; broadcast its result or exception.

        For functions of the user, which need not return the same value twice.
        """
        return compute() if self.strategy is None else self.strategy.broadcast_from_first_rank(compute)

    # ------------------------------------------------------------------------------------------------ set-up

    def use_deepspeed(self, deepspeed: DeepSpeedStrategy) -> None:
        """Train with ZeRO: shard optimizer state and, by its stage, gradients and weights."""
        self.deepspeed = deepspeed
        self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True  # or Trainer would ask for `no_sync`
        self.accelerator.backward = self._backward_deepspeed
        if deepspeed.stage == 3:
            for model in self.all_frozen_models():
                deepspeed.shard_frozen_model(model)

    def use_model_parallel(self, strategy: Strategy) -> None:
        """Train with tensor or context parallelism.

        Raises:
            UserError: the model is not of this package, or its sizes are not divisible.
        """
        model = unwrap_peft(self.output_model)
        if not isinstance(model, ScratchGPTPreTrainedModel):
            raise UserError(
                f"{strategy.name} shards models of this package, and this is a {type(model).__name__}: convert it with "
                "`scratch-gpt import`, or use configs/accelerate/fsdp2.yaml"
            )
        context_parallel.check_context_length(model.config, 2 * strategy.cp_size, strategy.cp_size)
        self.strategy = strategy
        # Accelerate's data loaders read it to find the ranks that take the same batches.
        self.accelerator.state.device_mesh = strategy.mesh
        self.accelerator.backward = self._backward_model_parallel
        if self.generates:
            set_seed(self.args.seed + strategy.dp_rank)

    def create_accelerator_and_postprocess(self) -> None:
        """Build Accelerate's accelerator; under FSDP2 shard each block, also on CPUs, and reduce gradients in float32.

        Raises:
            ValueError: FSDP2 was requested, but is not in effect.
        """
        fsdp_requested = parse_flag_from_env("ACCELERATE_USE_FSDP")
        if fsdp_requested:
            launch_state()  # TrainingArguments have built a process state of their own
        super().create_accelerator_and_postprocess()
        if fsdp_requested:
            if not self.accelerator.is_fsdp2:
                raise ValueError(f"FSDP2 was requested, but Accelerate runs {self.accelerator.distributed_type.value}")
            plugin = self.accelerator.state.fsdp_plugin
            plugin.auto_wrap_policy = transformer_auto_wrap_policy
            if self.args.bf16:  # Accelerate would reduce gradients in bf16, too
                plugin.mixed_precision_policy = MixedPrecisionPolicy(
                    param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
                )

    def create_optimizer(self, *arguments: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*arguments)
        if self.strategy is not None:  # torch's fused step takes parameters of one device mesh at a time
            optimizer.param_groups[:] = [
                {**group, "params": [parameter for _, parameter in of_one_mesh]}
                for group in optimizer.param_groups
                for of_one_mesh in group_by_mesh([("", parameter) for parameter in group["params"]])
            ]
        return optimizer

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        if (self.deepspeed is None and self.strategy is None) or not training:
            return super()._wrap_model(model, training, dataloader)
        self.accelerator.prepare_model(self.model, evaluation_mode=True)  # adds autocast, without a wrapper
        if self.deepspeed is None:
            self.model._is_accelerate_prepared = True  # or Accelerate would wrap it in DistributedDataParallel
            return self.model
        optimizer = self.optimizer
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        model = self.deepspeed.parallelize(self.model, "fp32")
        engine, sharded = self.deepspeed.wrap(model, Optimizers(optimizer))
        self.optimizer = ShardedStepOptimizer(sharded, optimizer)
        name, world_size = self.deepspeed.name, self.deepspeed.world_size
        print0(f"layout     {name} on {world_size} process(es): {self.deepspeed.describe_sharding()}")
        return engine

    # ------------------------------------------------------------------------------------------------ steps

    def _backward_deepspeed(self, loss: torch.Tensor) -> None:
        assert self.deepspeed is not None
        with self.deepspeed.micro_batch(self.deepspeed.engine, last=self.accelerator.sync_gradients):
            self.deepspeed.backward(self.deepspeed.engine, loss)
        self.optimizer.has_gradients = True

    def _backward_model_parallel(self, loss: torch.Tensor) -> None:
        assert self.strategy is not None
        with ExitStack() as stack:
            for model in self.trained_models:
                stack.enter_context(self.strategy.micro_batch(model, last=self.accelerator.sync_gradients))
            self.strategy.backward(self.model, loss)

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.deepspeed is None and self.strategy is None:
            return super()._clip_grad_norm(model)
        return self._clip_sharded(self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """Return the norm of the gradient. Trainer calls it right before the optimizer's step.

        Raises:
            FloatingPointError: the norm is not finite.
        """
        if grad_norm is None and (self.deepspeed is not None or self.strategy is not None):
            grad_norm = self._clip_sharded(math.inf)
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"step {self.state.global_step + 1:,} was not taken: its gradient's norm is {float(norm)}. Earlier "
                "checkpoints are good; start over with --fresh and a lower learning rate, or with other data"
            )
        return float(norm)

    def _clip_sharded(self, max_norm: float) -> float:
        """Clip gradients whose shards lie on several ranks; return their norm before clipping."""
        if self.strategy is not None:
            return self.strategy.clip_grad_norm(self.model.parameters(), max_norm)
        assert self.deepspeed is not None
        if not self.optimizer.has_gradients:
            return 0.0
        return self.deepspeed.clip_grad_norm(self.deepspeed.engine.parameters(), max_norm)

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Enter while completions are generated, each rank at its own pace: gathers the weights of ZeRO-3."""
        if self.deepspeed is None or self.deepspeed.stage < 3:
            yield
            return
        engine = self.deepspeed.engine
        offload = engine.optimizer.parameter_offload
        # `remove_hooks` keeps one hook, in which the ranks synchronize at the start of each forward pass.
        start_of_forward = offload.module._forward_pre_hooks[offload.fwd_pre_hook.id]
        with self.deepspeed.deepspeed.zero.GatheredParameters(list(engine.parameters())):
            offload.fwd_pre_hook.remove()
            remove_hooks(engine)
            yield
            offload.fwd_pre_hook = offload.module.register_forward_pre_hook(start_of_forward)
            add_hooks(engine)


class ShardedStepOptimizer(torch.optim.Optimizer):
    """The optimizer that Trainer sees under ZeRO: holds the learning rates, and steps DeepSpeed's shards."""

    _is_accelerate_prepared = True
    step_was_skipped = False

    def __init__(self, sharded: Optimizers, optimizer: torch.optim.Optimizer):
        self.sharded = sharded
        self.has_gradients = False
        """Whether there was a backward pass since the last step."""
        self.defaults, self.param_groups, self.state = optimizer.defaults, optimizer.param_groups, optimizer.state

    def step(self, closure: Any = None) -> None:
        if self.has_gradients:  # a step without gradients changes nothing
            self.sharded.step()
        self.has_gradients = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.sharded.zero_grad()


def gather_full(tensors: Mapping[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Gather sharded ``tensors`` on the CPU. All ranks must call it; those with ``keep`` false get an empty dictionary."""
    gathered: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            gathered[name] = full.detach().cpu().contiguous()
    return gathered
