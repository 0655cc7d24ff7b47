"""`scratch-gpt doctor`: the machine, the versions, and the layout that each process of this launch runs.

    scratch-gpt doctor
    accelerate launch --config_file configs/accelerate/fsdp2.yaml -m scratch_gpt doctor --config run.yaml

The layout is put in force on a tiny model, so that one that does not come true is found before the large one is built.
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
        f"machine    {socket.gethostname()}, {platform.system()} {platform.machine()}, {cores} cores, {_size(memory)}"
    )
    print0(f"versions   scratch-gpt {__version__}, Python {sys.version.split()[0]}, {', '.join(_versions())}")

    strategy = build_strategy()
    asked = settings.training
    strategy.check(asked.optimizer, asked.precision, asked.compile == "on")
    tiny = ScratchGPTConfig(
        vocab_size=256,
        hidden_size=64,
        num_attention_heads=8,
        intermediate_size=128,
        num_hidden_layers=2 * settings.parallel.pipeline,
        max_position_embeddings=32,
    )
    if settings.parallel.pipeline > 1:
        strategy = build_pipeline_strategy(strategy, settings, tiny, tiny.max_position_embeddings)
    precision = settings.training.precision
    if precision == "auto":
        precision = "bf16" if strategy.device.type == "cuda" and has_bf16(strategy.device) else "fp32"
    check_precision(precision, strategy.device)

    own = f"process {strategy.rank} on {socket.gethostname()}: {_device(strategy.device)}"
    for number, line in enumerate(gather_object([own]) if strategy.world_size > 1 else [own]):
        print0(("devices    " if number == 0 else "           ") + line)
    torch.manual_seed(settings.seed)
    model = ScratchGPTForCausalLM(tiny).train()
    enable_activation_checkpointing(model, settings.training)
    spread, _ = strategy.wrap(strategy.parallelize(model, precision), build_optimizer(model, settings.training))
    for number, line in enumerate(strategy.describe(spread, precision, "")):
        print0(("layout     " if number == 0 else "           ") + line)
    print0("           (numbers of a tiny model, on which it was tried)")
    shutdown(strategy.accelerator)


def _versions() -> list[str]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return found


def _device(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    major, minor = torch.cuda.get_device_capability(device)
    return f"{device}, {properties.name}, {_size(properties.total_memory)}, compute capability {major}.{minor}"


def _size(number: int) -> str:
    return f"{number / 2**30:.1f} GiB"
