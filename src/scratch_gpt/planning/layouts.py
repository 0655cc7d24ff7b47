"""The layouts that a plan compares: how one model, its gradients and its optimizer state lie on N devices."""

import math
from dataclasses import dataclass

from scratch_gpt.model import ScratchGPTConfig


@dataclass(frozen=True)
class Layout:
    """Placement of a model on devices: the number of shards of each kind of memory."""

    name: str
    devices: int
    description: str
    weight_shards: int = 1
    gradient_shards: int = 1
    optimizer_shards: int = 1
    tensor_parallel: int = 1
    deepspeed: bool = False

    @property
    def dp_size(self) -> int:
        """Number of devices, or tensor-parallel groups, that each read their own sequences."""
        return self.devices // self.tensor_parallel

    @property
    def gathers_weights(self) -> bool:
        return self.weight_shards > 1


SIMPLE_LAYOUTS = ("single", "ddp", "fsdp2", "hsdp")
"""In order of preference; a plan then tries the others, which shard more. It never chooses DeepSpeed, which needs another
package to do what FSDP2 does."""


def possible_layouts(config: ScratchGPTConfig, devices: int, devices_per_node: int) -> list[Layout]:
    """The layouts that this number of devices and of attention heads allows, from simple to elaborate."""
    single = Layout("single", 1, "one device")
    if devices == 1:
        return [single]
    found = [
        single,
        Layout("ddp", devices, "a full copy of the model on each device"),
        Layout("zero1", devices, "DeepSpeed: optimizer state sharded", optimizer_shards=devices, deepspeed=True),
        Layout(
            "zero2",
            devices,
            "DeepSpeed: optimizer state and gradients sharded",
            gradient_shards=devices,
            optimizer_shards=devices,
            deepspeed=True,
        ),
        Layout(
            "zero3",
            devices,
            "DeepSpeed: weights, gradients and optimizer state sharded",
            devices,
            devices,
            devices,
            deepspeed=True,
        ),
        Layout(
            "fsdp2",
            devices,
            "weights, gradients and optimizer state sharded over all devices",
            devices,
            devices,
            devices,
        ),
    ]
    if devices > devices_per_node and devices % devices_per_node == 0:
        shards, nodes = devices_per_node, devices // devices_per_node
        description = f"sharded over the {shards} devices of each node, replicated over {nodes} nodes"
        found.append(Layout("hsdp", devices, description, shards, shards, shards))
    tensor_parallel = math.gcd(
        devices, devices_per_node, config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    )
    if tensor_parallel > 1:
        shards = devices // tensor_parallel
        name = f"tp{tensor_parallel}" if shards == 1 else f"fsdp2 x tp{tensor_parallel}"
        description = f"attention heads and MLP split over {tensor_parallel} devices"
        if shards > 1:
            description += f", and each split sharded over {shards} such groups"
        found.append(Layout(name, devices, description, shards, shards, shards, tensor_parallel))
    return found
