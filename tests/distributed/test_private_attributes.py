"""Contracts with other libraries: every private or undocumented attribute that `distributed` and `compute` touch.

The dependencies are pinned. If an upgrade fails here, the file that is named next to the attribute needs a look; if nothing
fails here, nothing else should fail for this reason.
"""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import PreTrainedModel

from scratch_gpt.compute.activation_checkpointing import _SAVED_OPERATIONS
from scratch_gpt.planning.dry_run import fake_process_group

SOURCE = Path(__file__).parents[2] / "src" / "scratch_gpt"


# ------------------------------------------------------------------------------------------------ torch


def test_module_compiled_call_impl():
    """compute/compile.py asks whether a module is compiled, and undoes it."""
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    module = nn.Linear(2, 2)
    assert module._compiled_call_impl is None
    module.compile(backend=backend)
    assert module._compiled_call_impl is not None
    module._compiled_call_impl = None
    module(torch.ones(1, 2))
    assert not calls


def test_dtensor_create_chunk_list():
    """distributed/safetensors_reader.py: offsets and sizes of the local shard."""
    with fake_process_group(6):
        mesh = init_device_mesh("cpu", (2, 3), mesh_dim_names=("replicate", "shard"))
        tensor = distribute_tensor(torch.arange(14).view(7, 2), mesh, [Replicate(), Shard(0)], src_data_rank=None)
        (chunk,) = tensor.__create_chunk_list__()
        assert (tuple(chunk.offsets), tuple(chunk.sizes)) == ((0, 0), tuple(tensor.to_local().shape))


def test_foreach_norm_and_mul():
    """distributed/strategy.py: the norm of each gradient, and scaling all in place."""
    tensors = [torch.tensor([3.0, 4.0]), torch.tensor([2.0])]
    assert [norm.item() for norm in torch._foreach_norm(tensors)] == [5.0, 2.0]
    torch._foreach_mul_(tensors, 0.5)
    assert tensors[0].tolist() == [1.5, 2.0]


def test_operations_that_selective_checkpointing_saves():
    """compute/activation_checkpointing.py: the operations that torch's attention dispatches to on this machine."""
    assert all(isinstance(operation, torch._ops.OpOverload) for operation in _SAVED_OPERATIONS)
    seen = set()

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(function)
            return function(*args, **(kwargs or {}))

    query = torch.ones(1, 1, 4, 8, requires_grad=True)
    with Record():
        nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    assert seen & _SAVED_OPERATIONS


def test_store_of_the_backend_without_communication():
    """planning/dry_run.py: FakeStore and the backend "fake"; their collectives return at once."""
    with fake_process_group(4):
        assert dist.get_world_size() == 4
        dist.all_reduce(torch.ones(2))


# ------------------------------------------------------------------------------------------------ transformers, Accelerate


def test_init_weights_of_one_module():
    """distributed/materialize.py calls it with a module whose parameters it initializes in place."""
    assert callable(PreTrainedModel._init_weights)


def test_partial_state_can_be_called_multi_gpu():
    """distributed/launch.py: the type of several CPU processes, and the variable that keeps copies off GPUs."""
    assert {"MULTI_CPU", "MULTI_GPU"} <= set(DistributedType.__members__)
    assert not isinstance(getattr(PartialState, "distributed_type", None), property)
    package = Path(find_spec("accelerate").origin).parent
    assert "ACCELERATE_BYPASS_DEVICE_MAP" in (package / "accelerator.py").read_text()


# ------------------------------------------------------------------------------------------------ DeepSpeed

DEEPSPEED = {
    "runtime/engine.py": {"set_gradient_accumulation_boundary", "empty_partition_cache"},
    "runtime/zero/partition_parameters.py": {
        "ds_tensor",
        "ds_shape",
        "ds_numel",
        "ds_zero_partition_rank",
        "ds_zero_partition_world_size",
        "register_external_parameter",
    },
    "runtime/zero/stage3.py": {
        "fp32_partitioned_groups_flat",
        "offload_optimizer",
        "averaged_gradients",
        "grad_position",
        "get_param_id",
        "persistent_parameters",
        "refresh_fp32_params",
    },
    "runtime/zero/stage_1_and_2.py": {
        "single_partition_of_fp32_groups",
        "partition_gradients",
        "cpu_offload",
        "averaged_gradients",
        "all_grad_tensors",
        "micro_step_id",
        "refresh_fp32_params",
    },
    "utils/mixed_precision_linkage.py": {"_hp_mapping"},
    "utils/tensor_fragment.py": {"hp_fragment_address", "lp_fragment_address", "param_group_index", "numel", "start"},
    "ops/__init__.py": {"__compatible_ops__"},
}
"""By file of DeepSpeed, what distributed/deepspeed.py and distributed/dtensor.py touch."""


def test_the_attributes_of_deepspeed_are_those_that_are_used():
    source = "".join((SOURCE / "distributed" / name).read_text() for name in ("deepspeed.py", "dtensor.py"))
    listed = set().union(*DEEPSPEED.values())
    assert {name for name in listed if not re.search(rf"\b{name}\b", source)} == set()
    assert set(re.findall(r"\.(ds_\w+)|\bself\.zero\.(?!optimizer|zero_grad)(\w+)", source)) <= {
        pair for name in listed for pair in ((name, ""), ("", name))
    }


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("file", list(DEEPSPEED))
def test_deepspeed_has_the_attributes(file):
    package = Path(find_spec("deepspeed").origin).parent
    source = (package / file).read_text()
    assert {name for name in DEEPSPEED[file] if not re.search(rf"\b{name}\b", source)} == set()
