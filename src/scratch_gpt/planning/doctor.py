"""`scratch-gpt doctor`: the machine, the versions, and the parallel layout that this launch puts into effect.

    scratch-gpt doctor
    accelerate launch --config_file configs/accelerate/fsdp2.yaml -m scratch_gpt doctor --config run.yaml

It applies the layout to a tiny model, so that a layout that does not take effect is found before a large model is built.
"""

import platform
import socket
import sys
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch
from accelerate.utils import gather_object

from scratch_gpt import __version__
from scratch_gpt.compute.activation_checkpointing import enable_activation_checkpointing
from scratch_gpt.compute.precision import check_precision, has_bf16
from scratch_gpt.config import DoctorSettings
from scratch_gpt.console import print0
from scratch_gpt.data.workers import available_cores
from scratch_gpt.distributed.launch import shutdown
from scratch_gpt.distributed.optimizer import build_optimizer
from scratch_gpt.distributed.pipeline import build_pipeline_strategy
from scratch_gpt.distributed.setup import build_strategy
from scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM

PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "deepspeed", "torchao", "liger-kernel")


def doctor_command(settings: DoctorSettings) -> None:
    """`scratch-gpt doctor`."""
    cores, memory = available_cores(), psutil.virtual_memory().total
    print0(
        f"machine    {socket.gethostname()}, {platform.system()} {platform.machine()}, {cores} cores, {_gib(memory)}"
    )
    print0(f"versions   scratch-gpt {__version__}, Python {sys.version.split()[0]}, {', '.join(_versions())}")

    training = settings.training
    strategy = build_strategy()
    strategy.check(training.optimizer, training.precision, training.compile == "on")
    config = ScratchGPTConfig(
        vocab_size=256,
        hidden_size=64,
        num_attention_heads=8,
        intermediate_size=128,
        num_hidden_layers=2 * settings.parallel.pipeline,
        max_position_embeddings=32,
    )
    if settings.parallel.pipeline > 1:
        strategy = build_pipeline_strategy(strategy, settings, config, config.max_position_embeddings)
    precision = training.precision
    if precision == "auto":
        precision = "bf16" if strategy.device.type == "cuda" and has_bf16(strategy.device) else "fp32"
    check_precision(precision, strategy.device)

    this_rank = f"rank {strategy.rank} on {socket.gethostname()}: {_describe_device(strategy.device)}"
    _print_section("devices", gather_object([this_rank]) if strategy.world_size > 1 else [this_rank])
    torch.manual_seed(settings.seed)
    model = ScratchGPTForCausalLM(config).train()
    enable_activation_checkpointing(model, training)
    wrapped, _ = strategy.wrap(strategy.parallelize(model, precision), build_optimizer(model, training))
    _print_section("layout", [*strategy.describe(wrapped, precision, ""), "(numbers of the tiny test model)"])
    shutdown(strategy.accelerator)


def _print_section(title: str, lines: list[str]) -> None:
    for number, line in enumerate(lines):
        print0(f"{title if number == 0 else '':<10} {line}")


def _versions() -> list[str]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return found


def _describe_device(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    major, minor = torch.cuda.get_device_capability(device)
    return f"{device}, {properties.name}, {_gib(properties.total_memory)}, compute capability {major}.{minor}"


def _gib(number_of_bytes: int) -> str:
    return f"{number_of_bytes / 2**30:.1f} GiB"
