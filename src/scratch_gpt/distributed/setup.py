"""Build the strategy that this launch asks for."""

from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env

from scratch_gpt.distributed.launch import build_accelerator, deepspeed_requested
from scratch_gpt.distributed.strategy import Strategy
from scratch_gpt.errors import UserError


def build_strategy() -> Strategy:
    """The layout that the configuration file of `accelerate launch` asks for.

    Raises:
        UserError: it asks for what is not supported, or would not be in force.
    """
    if parse_flag_from_env("ACCELERATE_USE_MEGATRON_LM"):
        raise UserError("Megatron-LM is not supported: take one of configs/accelerate/")
    if deepspeed_requested():
        from scratch_gpt.distributed.deepspeed import build_deepspeed_strategy

        return build_deepspeed_strategy()
    accelerator = build_accelerator()
    world: int = accelerator.num_processes
    shard_blocks = parse_flag_from_env("ACCELERATE_USE_FSDP")
    sizes: ParallelismConfig = accelerator.parallelism_config or ParallelismConfig(
        dp_replicate_size=1 if shard_blocks else world, dp_shard_size=world if shard_blocks else 1
    )
    if sizes.sp_size > 1:
        raise UserError("parallelism_config: DeepSpeed's sequence parallelism (sp_size) is not supported: take cp_size")
    if not shard_blocks and sizes.dp_shard_size > 1:
        raise UserError("parallelism_config asks for dp_shard_size without distributed_type: FSDP")
    if shard_blocks:
        _check_plugin(accelerator)
        strategy = "hsdp" if sizes.dp_replicate_size > 1 else "fsdp2"
        strategy += " x cp" * (sizes.cp_size > 1) + " x tp" * (sizes.tp_size > 1)
    elif sizes.tp_size > 1:
        strategy = "tp"
    else:
        return Strategy(accelerator, "ddp" if world > 1 else "single")
    return Strategy(accelerator, strategy, sizes.get_device_mesh(accelerator.device.type))


def build_model_parallel_strategy(accelerator: Accelerator) -> Strategy:
    """Tensor or context parallel, as the configuration file asks for, over processes which to ``accelerator`` have copies."""
    sizes = ParallelismConfig()
    mesh = sizes.get_device_mesh(accelerator.device.type)
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return Strategy(accelerator, "tp", mesh)
    strategy = "hsdp" if sizes.dp_replicate_size > 1 else "fsdp2"
    strategy += " x cp" if sizes.cp_size > 1 else " x tp"
    return Strategy(accelerator, strategy, mesh, FullyShardedDataParallelPlugin())


def _check_plugin(accelerator: Accelerator) -> None:
    if accelerator.distributed_type != DistributedType.FSDP:
        raise UserError(
            f"FSDP was asked for, but Accelerate runs {accelerator.distributed_type.value} on "
            f"{accelerator.num_processes} process(es)"
        )
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise UserError("FSDP version 1 is not supported: put fsdp_version: 2 under fsdp_config")
    if plugin.activation_checkpointing:
        raise UserError(
            "fsdp_activation_checkpointing draws other random numbers when it recomputes: leave it false and give "
            "--training.activation_checkpointing full"
        )
