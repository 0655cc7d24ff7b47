"""Build the strategy that a launch requests."""

from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env

from scratch_gpt.distributed.launch import build_accelerator, deepspeed_requested
from scratch_gpt.distributed.strategy import Strategy
from scratch_gpt.errors import UserError


def build_strategy() -> Strategy:
    """Build the strategy of the configuration file of `accelerate launch`. Default: a single process.

    Raises:
        UserError: The file requests what is not supported, or its request is not in effect.
    """
    if parse_flag_from_env("ACCELERATE_USE_MEGATRON_LM"):
        raise UserError("Megatron-LM is not supported: take one of configs/accelerate/")
    if deepspeed_requested():
        from scratch_gpt.distributed.deepspeed import build_deepspeed_strategy

        return build_deepspeed_strategy()
    accelerator = build_accelerator()
    world_size: int = accelerator.num_processes
    uses_fsdp = parse_flag_from_env("ACCELERATE_USE_FSDP")
    sizes: ParallelismConfig = accelerator.parallelism_config or ParallelismConfig(
        dp_replicate_size=1 if uses_fsdp else world_size, dp_shard_size=world_size if uses_fsdp else 1
    )
    if sizes.sp_size > 1:
        raise UserError("parallelism_config: DeepSpeed's sequence parallelism (sp_size) is not supported: take cp_size")
    if not uses_fsdp and sizes.dp_shard_size > 1:
        raise UserError("parallelism_config requests dp_shard_size without distributed_type: FSDP")
    if uses_fsdp:
        _check_fsdp(accelerator)
    elif sizes.tp_size == 1:
        return Strategy(accelerator, "ddp" if world_size > 1 else "single")
    return Strategy(accelerator, _name(sizes, uses_fsdp), sizes.get_device_mesh(accelerator.device.type))


def build_model_parallel_strategy(accelerator: Accelerator) -> Strategy:
    """Build the tensor- or context-parallel strategy of the configuration file, for an ``accelerator`` that was built
    under :func:`launch.hide_sharding` and sees plain data parallelism.
    """
    sizes, uses_fsdp = ParallelismConfig(), parse_flag_from_env("ACCELERATE_USE_FSDP")
    mesh = sizes.get_device_mesh(accelerator.device.type)
    plugin = FullyShardedDataParallelPlugin() if uses_fsdp else None
    return Strategy(accelerator, _name(sizes, uses_fsdp), mesh, plugin)


def _name(sizes: ParallelismConfig, uses_fsdp: bool) -> str:
    """Name a sharded strategy, as in "fsdp2 x tp"."""
    if not uses_fsdp:
        return "tp"
    name = "hsdp" if sizes.dp_replicate_size > 1 else "fsdp2"
    return name + " x cp" * (sizes.cp_size > 1) + " x tp" * (sizes.tp_size > 1)


def _check_fsdp(accelerator: Accelerator) -> None:
    if accelerator.distributed_type != DistributedType.FSDP:
        raise UserError(
            f"FSDP was requested, but Accelerate runs {accelerator.distributed_type.value} on "
            f"{accelerator.num_processes} process(es)"
        )
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise UserError("FSDP version 1 is not supported: put fsdp_version: 2 under fsdp_config")
    if plugin.activation_checkpointing:
        raise UserError(
            "fsdp_activation_checkpointing recomputes activations with other random numbers: leave it false and give "
            "--training.activation_checkpointing full"
        )
