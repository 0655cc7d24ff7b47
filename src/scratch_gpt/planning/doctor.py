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
from scratch_gpt.compute.activation_checkpointing import checkpoint_activations
from scratch_gpt.compute.precision import check_precision, has_bf16
from scratch_gpt.config import DoctorSettings
from scratch_gpt.console import say
from scratch_gpt.data.workers import available_cores
from scratch_gpt.distributed.launch import part
from scratch_gpt.distributed.optimizer import build_optimizer
from scratch_gpt.distributed.pipeline import choose_pipeline
from scratch_gpt.distributed.setup import choose_layout
from scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM

PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "deepspeed", "torchao", "liger-kernel")


def doctor_command(settings: DoctorSettings) -> None:
    """`scratch-gpt doctor`."""
    cores, memory = available_cores(), psutil.virtual_memory().total
    say(f"machine    {socket.gethostname()}, {platform.system()} {platform.machine()}, {cores} cores, {_size(memory)}")
    say(f"versions   scratch-gpt {__version__}, Python {sys.version.split()[0]}, {', '.join(_versions())}")

    layout = choose_layout()
    asked = settings.training
    layout.check(asked.optimizer, asked.precision, asked.compile == "on")
    tiny = ScratchGPTConfig(
        vocab_size=256,
        hidden_size=64,
        num_attention_heads=8,
        intermediate_size=128,
        num_hidden_layers=2 * settings.parallel.pipeline,
        max_position_embeddings=32,
    )
    if settings.parallel.pipeline > 1:
        layout = choose_pipeline(layout, settings, tiny, tiny.max_position_embeddings)
    precision = settings.training.precision
    if precision == "auto":
        precision = "bf16" if layout.device.type == "cuda" and has_bf16(layout.device) else "fp32"
    check_precision(precision, layout.device)

    own = f"process {layout.rank} on {socket.gethostname()}: {_device(layout.device)}"
    for number, line in enumerate(gather_object([own]) if layout.world > 1 else [own]):
        say(("devices    " if number == 0 else "           ") + line)
    torch.manual_seed(settings.seed)
    model = ScratchGPTForCausalLM(tiny).train()
    checkpoint_activations(model, settings.training)
    spread, _ = layout.engage(layout.spread(model, precision), build_optimizer(model, settings.training))
    for number, line in enumerate(layout.describe(spread, precision, "")):
        say(("layout     " if number == 0 else "           ") + line)
    say("           (numbers of a tiny model, on which it was tried)")
    part(layout.accelerator)


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
