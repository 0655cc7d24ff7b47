"""The processes of a launch, as Accelerate sees them."""

import os

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from scratch_gpt.errors import UserError


def launched_processes() -> PartialState:
    """Device and rank of this process.

    Raises:
        UserError: the launcher started several processes that Accelerate does not take as one run.
    """
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != expected:
        raise UserError(
            f"the launcher started {expected} processes, but each would train a copy of its own. On CPUs launch with "
            "ACCELERATE_USE_CPU=true and a configuration file whose distributed_type is MULTI_GPU, such as "
            "configs/accelerate/ddp_cpu.yaml."
        )
    return state
