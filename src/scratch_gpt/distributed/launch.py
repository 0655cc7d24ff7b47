"""The processes of a launch, as Accelerate sees them."""

import os
from contextlib import AbstractContextManager
from datetime import timedelta

import torch.distributed as dist
from accelerate import Accelerator, ParallelismConfig, PartialState
from accelerate.utils import DistributedType, parse_flag_from_env, patch_environment

from scratch_gpt.errors import UserError

_process_groups: list[object] = []
"""Groups that must not be freed before the process ends; see :func:`shutdown`."""


def hide_deepspeed() -> AbstractContextManager[None]:
    """Hide DeepSpeed's settings from Accelerate, which drops them silently on CPUs: `deepspeed.py` applies them itself."""
    return patch_environment(ACCELERATE_USE_DEEPSPEED="false")


def hide_sharding() -> AbstractContextManager[None]:
    """Hide FSDP and parallelism_config from Accelerate and Trainer, which then see plain data parallelism."""
    return patch_environment(ACCELERATE_USE_PARALLELISM_CONFIG="false", ACCELERATE_USE_FSDP="false")


def shutdown(accelerator: Accelerator) -> None:
    """Leave the process group, and keep its memory until this process ends.

    `DistributedDataParallel` refers to the group as well. If it were the last to free it, it would wait, holding the GIL,
    for the group's threads, one of which may need the GIL to free the tensors of the last collective.
    """
    if dist.is_initialized():
        _process_groups.append(dist.group.WORLD)
    accelerator.end_training()


def requested_model_parallel_size() -> int:
    """Return tp_size x cp_size of the launch: the number of ranks that read the same sequences."""
    tensor, context = (os.environ.get(f"PARALLELISM_CONFIG_{kind}_SIZE", "1") for kind in ("TP", "CP"))
    return int(tensor) * int(context)


def data_parallel_size() -> int:
    """Return the number of data-parallel ranks of the launch: the sequences of a batch are divided by it."""
    return launch_state().num_processes // requested_model_parallel_size()


def deepspeed_requested() -> bool:
    """Whether the launch's configuration file says distributed_type: DEEPSPEED; Accelerate's own state does not show it."""
    return parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")


def launch_state(timeout: float | None = None) -> PartialState:
    """Return device and rank of this process, and initialize the process group if there are several.

    ``timeout``: seconds, of `--parallel.timeout`. torch's own timeout is twice as long, because it cannot name the rank
    that hangs and `watchdog.py`, which can, must come first. Default: torch's.

    Raises:
        UserError: The launcher started several processes that Accelerate does not join into one run.
    """
    options = {} if timeout is None else {"timeout": timedelta(seconds=2 * timeout)}
    with hide_deepspeed():
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), **options)
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != expected:
        raise UserError(
            f"the launcher started {expected} processes, but each would train a copy of its own. On CPUs launch with "
            "ACCELERATE_USE_CPU=true and a configuration file whose distributed_type is MULTI_GPU, such as "
            "configs/accelerate/ddp_cpu.yaml."
        )
    _allow_sharding_on_cpu(state)
    if state.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, if installed, picks a GPU or warns of none
    return state


def build_accelerator() -> Accelerator:
    """Build Accelerate's view of the launch, with the plugins and sizes of its configuration file.

    Raises:
        UserError: Accelerate refuses the combination.
    """
    world_size = launch_state().num_processes
    try:
        if (
            parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG")
            and (requested := ParallelismConfig().total_size) != world_size
        ):
            raise ValueError(f"parallelism_config requests {requested} processes, the launcher started {world_size}")
        with hide_deepspeed():
            return Accelerator()
    except (ValueError, ImportError) as error:
        raise UserError(f"this launch is refused: {error}") from error


def _allow_sharding_on_cpu(state: PartialState) -> None:
    """Call several CPU processes MULTI_GPU: with MULTI_CPU, Accelerate 1.15 silently replaces sharding by copies.

    torch shards on CPUs too, so every strategy can be tried without a GPU.
    """
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU
        os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"  # or Accelerate assigns GPU numbers to the copies
