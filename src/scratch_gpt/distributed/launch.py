"""The processes of a launch, as Accelerate sees them."""

import functools
import os
from datetime import timedelta

import torch.distributed as dist
from accelerate import Accelerator, ParallelismConfig, PartialState
from accelerate.utils import DistributedType, parse_flag_from_env, patch_environment

from scratch_gpt.errors import UserError

WITHOUT_DEEPSPEED = functools.partial(patch_environment, ACCELERATE_USE_DEEPSPEED="false")
"""`zero.py` sets DeepSpeed up by itself, alike on all devices; on CPUs Accelerate drops it without a word."""

WITHOUT_LAYOUT = functools.partial(
    patch_environment, ACCELERATE_USE_PARALLELISM_CONFIG="false", ACCELERATE_USE_FSDP="false"
)
"""For what sees data parallelism alone, where `layout.py` sets the rest up."""

_parted: list[object] = []


def shutdown(accelerator: Accelerator) -> None:
    """Take leave of the other processes of the launch; the memory of their group goes with this process.

    `DistributedDataParallel` has the group too. Were it the last to free it, it would wait for the group's threads with the
    interpreter locked, which one of them may need to free the tensors of the last collective.
    """
    if dist.is_initialized():
        _parted.append(dist.group.WORLD)
    accelerator.end_training()


def requested_model_parallel_size() -> int:
    """How many processes of the launch share each row: its matrix products, or its columns."""
    tensor, context = (os.environ.get(f"PARALLELISM_CONFIG_{kind}_SIZE", "1") for kind in ("TP", "CP"))
    return int(tensor) * int(context)


def data_parallel_size() -> int:
    """Over how many processes of the launch, or groups that share rows, the rows of a step are divided."""
    return launch_state().num_processes // requested_model_parallel_size()


def deepspeed_requested() -> bool:
    """Whether the configuration file says distributed_type: DEEPSPEED; Accelerate's own state does not, see above."""
    return parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")


def launch_state(timeout: float | None = None) -> PartialState:
    """Device and rank of this process.

    ``timeout``: the seconds of `--parallel.timeout`. torch's own time-out does not name a process that hangs and comes
    after that of `watch.py`, which does.

    Raises:
        UserError: the launcher started several processes that Accelerate does not take as one run.
    """
    patience = {} if timeout is None else {"timeout": timedelta(seconds=2 * timeout)}
    with WITHOUT_DEEPSPEED():
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), **patience)
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != expected:
        raise UserError(
            f"the launcher started {expected} processes, but each would train a copy of its own. On CPUs launch with "
            "ACCELERATE_USE_CPU=true and a configuration file whose distributed_type is MULTI_GPU, such as "
            "configs/accelerate/ddp_cpu.yaml."
        )
    _let_cpus_shard(state)
    if state.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, where installed, takes the GPU, or warns of none
    return state


def build_accelerator() -> Accelerator:
    """Accelerate's view of the launch: the plugins and sizes of its configuration file.

    Raises:
        UserError: it refuses the combination.
    """
    world = launch_state().num_processes
    try:
        if (
            parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG")
            and (asked := ParallelismConfig().total_size) != world
        ):
            raise ValueError(f"parallelism_config asks for {asked} processes, the launcher started {world}")
        with WITHOUT_DEEPSPEED():
            return Accelerator()
    except (ValueError, ImportError) as error:
        raise UserError(f"this launch is refused: {error}") from error


def _let_cpus_shard(state: PartialState) -> None:
    """Accelerate 1.15 shards on accelerators only, and with MULTI_CPU falls back to copies without a word. torch itself
    shards on CPUs just as well, so that layouts can be tried without a GPU: only the name has to change.
    """
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU
        os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"  # or copies under that name would be given numbers of GPUs
